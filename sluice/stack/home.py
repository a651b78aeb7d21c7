"""The ignored folder that holds a stack: its lock, its remembered ports and secrets, its logs."""

import fcntl
import json
import os
import secrets
import shutil
import socket
from pathlib import Path
from typing import Any

from sluice.stack.errors import StackError

# Below the kernel's range for outgoing connections (32768 and up), so that none of those takes our port
# while the server is down.
_PORTS = range(15000, 30000)


class Home:
    """Folder of one stack; `default_ports` asks for the usual port numbers where they are free."""

    def __init__(self, path: Path, *, default_ports: bool) -> None:
        self.path = path.resolve()
        self.logs = self.path / "logs"
        self._default_ports = default_ports
        self._state_file = self.path / "stack.json"
        self._lock_fd: int | None = None
        self._handed_out: set[int] = set()

    def lock(self) -> None:
        """Claim the folder for this object until `unlock`; raises StackError when another holds it."""
        if self._lock_fd is not None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o700)
        fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode().strip()
            os.close(fd)
            raise StackError(
                f"{self.path} is in use by process {holder}: stop that one (Ctrl-C), "
                "or set SLUICE_HOME to another folder"
            ) from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        self._lock_fd = fd
        self._handed_out.clear()

    def unlock(self) -> None:
        """Let others use the folder; harmless when it is not locked."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    @property
    def is_locked(self) -> bool:
        """Tell whether this object holds the folder."""
        return self._lock_fd is not None

    def fresh_logs(self) -> None:
        """Keep the logs of this run and of the one before."""
        previous = self.path / "logs.previous"
        if self.logs.exists():
            shutil.rmtree(previous, ignore_errors=True)
            self.logs.rename(previous)
        self.logs.mkdir()

    def folder(self, name: str) -> Path:
        """Make and return a folder inside."""
        made = self.path / name
        made.mkdir(parents=True, exist_ok=True)
        return made

    def secret(self, name: str) -> str:
        """Return the secret of that name, made on first use and kept for good."""
        state = self._state()
        value = state["secrets"].get(name)
        if value is None:
            value = state["secrets"][name] = secrets.token_urlsafe(24)
            self._save(state)
        return str(value)

    def port(self, name: str, usual: int | None = None) -> int:
        """Return a free loopback port: the one used last time, else the usual one, else any."""
        state = self._state()
        wanted = [state["ports"].get(name), usual if self._default_ports else None]
        for candidate in (*wanted, *(secrets.choice(_PORTS) for _ in range(200))):
            if candidate is not None and candidate not in self._handed_out and port_is_free(candidate):
                break
        else:
            raise StackError(f"no free port for {name} between {_PORTS.start} and {_PORTS.stop}")
        self._handed_out.add(candidate)
        if state["ports"].get(name) != candidate:
            state["ports"][name] = candidate
            self._save(state)
        return int(candidate)

    def purge(self) -> None:
        """Delete the folder with all data."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _state(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads(self._state_file.read_text())
        except FileNotFoundError:
            return {"ports": {}, "secrets": {}}
        except ValueError as error:
            raise StackError(f"{self._state_file} is not JSON ({error}); `./dev down --purge` starts anew") from error
        return state

    def _save(self, state: dict[str, Any]) -> None:
        # A rename, so that a kill in between leaves the old credentials and not half of the new.
        draft = self._state_file.with_suffix(".new")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump(state, file, indent=2)
        draft.replace(self._state_file)


def port_is_free(port: int) -> bool:
    """Tell whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
