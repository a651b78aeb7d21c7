"""A whole Sluice on one machine: servers, unless the environment names others, and services on top."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from sluice.stack.errors import StackError
from sluice.stack.home import Home
from sluice.stack.postgres import Postgres
from sluice.stack.process import MARK, kill_all, marked_processes
from sluice.stack.rabbitmq import RabbitMQ
from sluice.stack.seaweedfs import SeaweedFS
from sluice.stack.server import Server
from sluice.stack.services import Service

_TEMPORARY = "sluice-temporary-"


def say(message: str) -> None:
    """Tell a person, without getting into the way of a program's output."""
    print(message, file=sys.stderr, flush=True)


def default_home() -> Path:
    """Return the folder that SLUICE_HOME names, else `.sluice` in the current one."""
    return Path(os.environ.get("SLUICE_HOME") or ".sluice")


class Stack:
    """Embedded PostgreSQL, RabbitMQ and SeaweedFS, and service processes that use them.

    A server is not started when `given` (by default the environment) has its variables. `fast` makes
    PostgreSQL unsafe against a crash of the machine: for tests, never for benchmarks. Use as a context
    manager, or call `start` and `stop`; all calls block, so a coroutine runs the slow ones in a thread.
    """

    def __init__(
        self,
        home: Path | None = None,
        *,
        fast: bool = False,
        default_ports: bool = False,
        given: Mapping[str, str] = os.environ,
        report: Callable[[str], None] = say,
    ) -> None:
        self.home = Home(home or default_home(), default_ports=default_ports)
        self.postgres = Postgres(self.home, fast=fast)
        self.rabbitmq = RabbitMQ(self.home)
        self.seaweedfs = SeaweedFS(self.home)
        self.services: list[Service] = []
        self._report = report
        self._given = {name: value for name, value in given.items() if name.startswith("SLUICE_")}
        self.servers: list[Server] = []
        for server, variables in (
            (self.postgres, ["SLUICE_POSTGRES_DSN"]),
            (self.rabbitmq, ["SLUICE_AMQP_URL"]),
            (self.seaweedfs, ["SLUICE_S3_ENDPOINT", "SLUICE_S3_ACCESS_KEY", "SLUICE_S3_SECRET_KEY"]),
        ):
            missing = [name for name in variables if not given.get(name)]
            if missing == variables:
                self.servers.append(server)
            elif missing:
                raise StackError(f"{', '.join(missing)} is not set: set all of {', '.join(variables)}, or none")

    @classmethod
    def temporary(cls, *, fast: bool = False, given: Mapping[str, str] = os.environ) -> Self:
        """Return a stack with a folder and ports of its own, to be ended with `purge`.

        Inside a process of another stack its folder lies in that one's, and it ends with that one at the latest.
        """
        parent = Path(os.environ.get(MARK) or tempfile.gettempdir())
        cls._purge_abandoned(parent)
        return cls(Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent)), fast=fast, given=given)

    @classmethod
    def _purge_abandoned(cls, parent: Path) -> None:
        """Delete temporary stacks whose starter was killed: their lock is free though they are there."""
        for left in parent.glob(f"{_TEMPORARY}*/lock"):
            with contextlib.suppress(StackError, FileNotFoundError):  # in use, or another was quicker
                found = left.stat()
                # A younger one may be about to be locked.
                if found.st_uid == os.geteuid() and time.time() - found.st_mtime > 60:
                    cls(left.parent, given={}).purge()

    def start(self) -> None:
        """Start the servers side by side and wait until they answer. Raises StackError."""
        self.home.lock()
        try:
            self._stop_leftovers()
            self.home.fresh_logs()
            for server in self.servers:
                server.prepare()
            begun = time.monotonic()
            # PostgreSQL last: its first start makes the cluster here while the others boot.
            for server in reversed(self.servers):
                server.start()
            for server in self.servers:
                self._report(f"waiting for {server.title} on {server.address} ...")
                server.wait_ready()
            if self.servers:
                self._report(f"servers ready after {time.monotonic() - begun:.1f} s")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop services, then servers, and leave no process behind; data stays. Idempotent."""
        if not self.home.is_locked:
            return  # never started, or the folder and what runs in it belong to another process
        try:
            for service in self.services:
                service.process.request_stop()
            for service in self.services:
                service.terminate()
            self.services.clear()
            for server in self.servers:
                server.process.request_stop()
            for server in self.servers:
                server.stop()
        finally:
            self._stop_leftovers()
            self.home.unlock()

    def purge(self) -> None:
        """Kill whatever runs and delete all data, also what lies outside the folder."""
        self.home.lock()
        for service in self.services:
            service.kill()
        for server in self.servers:
            server.kill()
        self.services.clear()
        try:
            self._stop_leftovers()
            if self.postgres in self.servers:
                self.postgres.purge()
            self.home.purge()
        finally:
            self.home.unlock()

    def environment(self) -> dict[str, str]:
        """Return the SLUICE_* variables with which services and tests find the servers."""
        found = dict(self._given)
        for server in self.servers:
            found |= server.environment()
        return found

    def spawn(self, name: str, count: int = 1, environment: Mapping[str, str] | None = None) -> list[Service]:
        """Start processes of a service (a key of SERVICES); they may not be ready yet."""
        spawned = []
        for _ in range(count):
            number = sum(service.name.rpartition("-")[0] == name for service in self.services) + 1
            service = Service(self.home, name, number, {**self.environment(), **(environment or {})})
            self.services.append(service)
            service.start()
            spawned.append(service)
        return spawned

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _stop_leftovers(self) -> None:
        left = marked_processes(self.home.path)
        if left:
            self._report(f"stopping {len(left)} processes that an earlier run left behind")
            kill_all(left)
        if self.postgres in self.servers:
            self.postgres.kill_orphans()
