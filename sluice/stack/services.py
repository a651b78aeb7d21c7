"""Sluice's own services as processes: which there are, how each is started and asked whether it is ready."""

import http.client
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from sluice.stack.errors import StackError
from sluice.stack.home import Home
from sluice.stack.process import MARK, Process


@dataclass(frozen=True)
class ServiceKind:
    """How a service is run; `port_variable` sets the port that answers /readyz."""

    module: str
    port_variable: str = "SLUICE_HEALTH_PORT"
    usual_port: int | None = None


SERVICES = {
    "control": ServiceKind("control_service.main"),
    "upload-worker": ServiceKind("upload_worker.main"),
    "export-worker": ServiceKind("export_worker.main"),
    "gateway": ServiceKind("gateway.main", "SLUICE_GATEWAY_PORT", 8080),
}


# As in the image: each of glibc's arenas keeps what was freed in it, and there may be eight for each core (mallopt(3)).
_ALLOCATOR = {"MALLOC_ARENA_MAX": "2"}


class Service:
    """One running process of a service."""

    def __init__(self, home: Home, name: str, number: int, environment: Mapping[str, str]) -> None:
        if name not in SERVICES:
            raise StackError(f"there is no service {name!r}; there are {', '.join(SERVICES)}")
        kind = SERVICES[name]
        self.name = f"{name}-{number}"
        usual = kind.usual_port if number == 1 else None
        self.port = int(environment.get(kind.port_variable) or home.port(self.name, usual))
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = Process(self.name, home.logs / f"{self.name}.log")
        self._home = home
        self._kind = kind
        self._environment = {**environment, kind.port_variable: str(self.port)}

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def start(self) -> None:
        """Start the process; raises StackError when it already runs."""
        # -P: a folder that happens to be the current one must not shadow a package.
        self.process.start(
            [sys.executable, "-P", "-m", self._kind.module],
            env={**_ALLOCATOR, **os.environ, **self._environment, MARK: str(self._home.path)},
            cwd=self._home.path,
        )

    def is_ready(self) -> bool:
        """Tell whether /readyz answers 200 now."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until it is ready; raises StackError with the end of its log when it dies or is late."""
        self.process.wait_ready(self.is_ready, timeout)

    def terminate(self, timeout: float = 30.0) -> int:
        """SIGTERM, so that it drains; returns the exit status, negative for a signal."""
        self.process.stop(timeout)
        return self.process.exit_status or 0

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def pause(self) -> None:
        """Freeze it (SIGSTOP)."""
        self.process.pause()

    def resume(self) -> None:
        """Let it go on after a freeze."""
        self.process.resume()

    def log_tail(self, lines: int = 30) -> str:
        """Return the end of its log."""
        return self.process.log_tail(lines)
