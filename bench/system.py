"""The whole of Sluice under test: servers with production defaults, services, one account, and a look at the rows.

Users' wishes go through the gateway, as users' do. What became of them is read from PostgreSQL on a connection of the
benchmark's own, every POLL_SECONDS: a state counts as reached once a reader sees it, after its commit.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from sluice.stack import Service, Stack, StackError

POLL_SECONDS = 0.001
WAIT_SECONDS = 300.0
_LOGIN = {"username": "bench", "password": "for-benchmarks-only"}


@dataclass(frozen=True, slots=True)
class Row:
    """What a benchmark looks at in a task's row."""

    state: str
    epoch: int
    attempts: int
    bytes_done: int
    rows_done: int
    running_seconds: float
    worker: str | None
    error: str | None

    @property
    def has_committed(self) -> bool:
        """Whether the present claim has committed a batch: a claim counts an attempt, a batch resets them."""
        return self.state == "running" and self.attempts == 0


class System:
    """Made by `running_system`; all times are `time.perf_counter` of this process."""

    def __init__(self, stack: Stack, http: aiohttp.ClientSession, database: "asyncpg.Connection[Any]") -> None:
        self.stack = stack
        self.http = http
        self.database = database
        self.workers = self.of("upload-worker")

    def of(self, kind: str) -> list[Service]:
        """The processes of one kind; `workers` are those that are watched and killed."""
        return [service for service in self.stack.services if service.name.startswith(kind)]

    @property
    def dsn(self) -> str:
        return self.stack.environment()["SLUICE_POSTGRES_DSN"]

    # --- as a user

    async def call(self, method: str, path: str, **request: Any) -> Any:
        """A request to the gateway; answers the JSON. Raises RuntimeError with the problem for status 400 and up."""
        async with self.http.request(method, path, **request) as response:
            body = await response.read()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path}: {response.status} {body.decode(errors='replace')}")
            return await response.json() if body else None

    async def upload(self, path: Path) -> int:
        """The file's number."""
        with path.open("rb") as file:
            return int((await self.call("PUT", f"/v1/files/{path.name}", data=file))["file_id"])

    async def start_import(self, file_id: int, dataset: str, **params: Any) -> int:
        """The task's number, once the gateway has accepted it."""
        body = {"kind": "import", "file_id": file_id, "dataset": dataset, **params}
        return int((await self.call("POST", "/v1/tasks", json=body))["task_id"])

    async def start_export(self, dataset: str, form: str, file_name: str, **params: Any) -> int:
        """The task's number, once the gateway has accepted it."""
        body = {"kind": "export", "dataset": dataset, "format": form, "file_name": file_name, **params}
        return int((await self.call("POST", "/v1/tasks", json=body))["task_id"])

    async def command(self, task_id: int, command: str) -> None:
        await self.call("POST", f"/v1/tasks/{task_id}/{command}")

    async def drop(self, dataset: str) -> None:
        await self.call("DELETE", f"/v1/datasets/{dataset}")

    # --- as an observer

    async def row(self, task_id: int) -> Row:
        found = await self.database.fetchrow(_ROW, task_id)
        assert found is not None, f"there is no task {task_id}"
        return Row(**found)

    async def until(self, task_id: int, reached: Callable[[Row], bool], *, poll_seconds: float = POLL_SECONDS) -> Row:
        """The first row seen that has `reached` it, or one in which the task has ended otherwise.

        Raises StackError, with the workers' last words, when it fails or stands still.
        """
        row = await self.row(task_id)
        deadline = time.perf_counter() + WAIT_SECONDS
        while not (reached(row) or row.state in ("succeeded", "aborted")):
            if row.state == "failed" or time.perf_counter() > deadline:
                logs = "\n".join(f"--- {worker.name}\n{worker.log_tail(10)}" for worker in self.workers)
                raise StackError(f"task {task_id} failed or stands still: {row}\n{logs}")
            await asyncio.sleep(poll_seconds)
            row = await self.row(task_id)
        return row

    async def settle(self) -> None:
        """Let nobody pay for what others have written."""
        await self.database.execute("CHECKPOINT")
        await asyncio.to_thread(os.sync)

    # --- as fate

    def worker_of(self, row: Row) -> Service:
        """The process that holds the task; workers sign with their process id."""
        pid = int((row.worker or ":0").rpartition(":")[2])
        return next(worker for worker in self.workers if worker.process.is_running() and worker.pid == pid)

    async def revive(self, worker: Service) -> None:
        """Start a worker again that was killed, and wait until it consumes."""
        await asyncio.to_thread(worker.kill)  # reaps what `kill_now` has killed
        await asyncio.to_thread(worker.start)
        await asyncio.to_thread(worker.wait_ready)

    def peak_worker_bytes(self) -> int:
        """The most memory that one of the running workers has ever held."""
        return max(peak_bytes(worker.pid) for worker in self.workers if worker.process.is_running())


_ROW = """
SELECT state, epoch, attempts, bytes_done, rows_done, running_seconds, worker, error::text AS error
FROM sluice.tasks WHERE task_id = $1
"""


def kill_now(worker: Service) -> None:
    os.kill(worker.pid, signal.SIGKILL)


def peak_bytes(pid: int) -> int:
    """The greatest resident set of a process so far (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


@asynccontextmanager
async def running_system(*, workers: int, exporters: int = 0) -> AsyncIterator[System]:
    """Servers of its own with all safety on, a control service, a gateway and workers; purged afterwards."""
    stack = Stack.temporary()
    try:
        await asyncio.to_thread(stack.start)
        for name, count in (("control", 1), ("upload-worker", workers), ("export-worker", exporters), ("gateway", 1)):
            stack.spawn(name, count)
        for service in stack.services:
            await asyncio.to_thread(service.wait_ready)
        gateway = stack.services[-1].url
        timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS)
        database = await asyncpg.connect(stack.environment()["SLUICE_POSTGRES_DSN"])
        try:
            headers = {"Authorization": f"Bearer {await _token(gateway)}"}
            async with aiohttp.ClientSession(gateway, headers=headers, timeout=timeout) as http:
                yield System(stack, http, database)
        finally:
            await database.close()
    finally:
        await asyncio.to_thread(stack.purge)


async def _token(gateway: str) -> str:
    login = aiohttp.encode_basic_auth(_LOGIN["username"], _LOGIN["password"])
    async with aiohttp.ClientSession(gateway, raise_for_status=True) as http:
        await http.post("/v1/accounts", json=_LOGIN)
        async with http.post("/v1/tokens", json={"name": "bench"}, headers={"Authorization": login}) as response:
            return str((await response.json())["token"])
