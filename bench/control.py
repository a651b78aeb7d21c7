"""How quickly running imports and exports obey: pause, resume, abort, and recovery from `kill -9` of the worker.

Each clock begins when the request is sent to the gateway (or the signal to the worker), and ends when a reader that
polls every millisecond sees the row: `paused`; a batch committed by the next claim; `aborted`, with the table gone.
Imports run at full speed with several batches in flight; throttled ones are measured besides.
"""

import argparse
import asyncio
import random
import time
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from bench.data import lineitem
from bench.report import MB, cores, latency_line, milliseconds, say
from bench.system import Row, System, kill_now, running_system
from shared.adapters.objects import S3ObjectStore
from shared.config import Settings

GOALS = {"pause": 0.3, "abort": 0.2, "recovery": 1.0}
THROTTLED_BYTES_PER_SECOND = 20 * MB
# Between two measurements: anywhere in a batch.
LONGEST_WAIT_SECONDS = 0.15


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=50, help="of each kind (50)")
    parser.add_argument("--large-trials", type=int, default=10, help="aborts of an import that is almost done (10)")
    parser.add_argument("--scale", type=float, default=0.5, help="TPC-H scale factor (0.5: 380 MB)")
    parser.add_argument("--kind", choices=["import", "export"], default="import", help="of task (import)")
    parser.add_argument("--only", choices=["pause", "abort", "recovery"], help="measure nothing else")


async def run(options: argparse.Namespace) -> dict[str, Any]:
    path = lineitem(options.scale)
    exports = options.kind == "export"
    async with running_system(workers=1 if exports else 2, exporters=2 if exports else 0) as system:
        bench = (ExportControlBench if exports else ControlBench)(
            system, await system.upload(path), path.stat().st_size
        )
        await bench.prepare()
        found: dict[str, list[float]] = {}
        if options.only in (None, "pause"):
            found["pause"], found["resume"] = await bench.pauses(options.trials)
            found["pause_throttled"], found["resume_throttled"] = await bench.pauses(
                options.trials, max_bytes_per_second=THROTTLED_BYTES_PER_SECOND
            )
        if options.only in (None, "abort"):
            found["abort_small"] = await bench.aborts(options.trials, 0.0)
            found["abort_large"] = await bench.aborts(options.large_trials, 0.9)
            found["abort"] = found["abort_small"] + found["abort_large"]
        if options.only in (None, "recovery"):
            found["recovery"] = await bench.recoveries(options.trials)
    say(f"\ncontrol of {options.kind}s of {path.name}, {cores()} cores; milliseconds")
    say(f"{'':<38}{'p50':>9}{'p99':>9}{'max':>9}{'n':>6}   goal (p99)")
    for name, seconds in found.items():
        say(latency_line(f"  {name.replace('_', ', ')}", seconds, GOALS.get(name)))
    figures: dict[str, Any] = {"kind": options.kind, "trials": options.trials, "cores": cores()}
    for name, seconds in found.items():
        figures |= milliseconds(name, seconds)
    return figures


class ControlBench:
    def __init__(self, system: System, file_id: int, file_bytes: int) -> None:
        self._system = system
        self._file_id = file_id
        self._file_bytes = file_bytes
        self._numbers = count()

    async def prepare(self) -> None:
        """What there must be before the first task."""

    async def start(self, number: int, **params: Any) -> int:
        return await self._system.start_import(self._file_id, f"lineitem_{number}", **params)

    async def remove(self, number: int, task_id: int) -> None:
        """What a task that has succeeded has made."""
        await self._system.drop(f"lineitem_{number}")

    async def left(self, task_id: int) -> object:
        """What an aborted task has left, if anything."""
        return await self._system.database.fetchval("SELECT to_regclass($1)", f"sluice_loads.load_{task_id}")

    async def pauses(self, trials: int, **params: Any) -> tuple[list[float], list[float]]:
        """Seconds to pause and to resume. A pause that came after the last batch does not count."""
        pauses: list[float] = []
        resumes: list[float] = []
        async for task_id, row in self._tasks(**params):
            while row.state == "running" and len(pauses) < trials:
                await self._anywhere()
                begun = time.perf_counter()
                if not await self._commanded(task_id, "pause"):
                    break
                row = await self._system.until(task_id, lambda row: row.state == "paused")
                if row.state != "paused":
                    break
                pauses.append(time.perf_counter() - begun)
                begun = time.perf_counter()
                await self._system.command(task_id, "resume")
                row = await self._next_commit(task_id, row)
                if row.state == "running":
                    resumes.append(time.perf_counter() - begun)
            if len(pauses) >= trials:
                break
        return pauses, resumes

    async def aborts(self, trials: int, share: float) -> list[float]:
        """Seconds to abort imports that have loaded a first batch or `share` of the file."""
        seconds: list[float] = []
        async for task_id, _ in self._tasks():
            await self._system.until(task_id, lambda row: row.bytes_done >= share * self._file_bytes)
            await self._anywhere()
            begun = time.perf_counter()
            if await self._commanded(task_id, "abort"):
                await self._system.until(task_id, lambda row: row.state == "aborted")
                seconds.append(time.perf_counter() - begun)
                if left := await self.left(task_id):
                    raise RuntimeError(f"{left} is left after the abort")
            if len(seconds) >= trials:
                break
        return seconds

    async def recoveries(self, trials: int) -> list[float]:
        """Seconds from kill -9 of the worker to the first batch that the other one has committed."""
        seconds: list[float] = []
        async for task_id, row in self._tasks():
            while row.has_committed and len(seconds) < trials:
                await self._anywhere()
                row = await self._system.row(task_id)
                if row.worker is None:
                    break
                victim = self._system.worker_of(row)
                begun = time.perf_counter()
                kill_now(victim)
                row = await self._next_commit(task_id, row)
                if row.state == "running":
                    seconds.append(time.perf_counter() - begun)
                await self._system.revive(victim)
                row = await self._system.row(task_id)
            if len(seconds) >= trials:
                break
        return seconds

    async def _tasks(self, **params: Any) -> AsyncIterator[tuple[int, Row]]:
        """One task after the other, each given when its first batch is committed, and removed afterwards."""
        while True:
            number = next(self._numbers)
            task_id = await self.start(number, **params)
            yield task_id, await self._system.until(task_id, lambda row: row.has_committed)
            if (await self._system.row(task_id)).state != "aborted" and not await self._commanded(task_id, "abort"):
                await self._system.until(task_id, lambda row: row.state == "succeeded")
                await self.remove(number, task_id)
            await self._system.until(task_id, lambda row: row.state in ("succeeded", "aborted"))

    async def _commanded(self, task_id: int, command: str) -> bool:
        """Whether the command was accepted; not if the import has just succeeded."""
        try:
            await self._system.command(task_id, command)
        except RuntimeError:
            if (await self._system.row(task_id)).state != "succeeded":
                raise
            return False
        return True

    async def _next_commit(self, task_id: int, before: Row) -> Row:
        return await self._system.until(task_id, lambda row: row.epoch > before.epoch and row.has_committed)

    async def _anywhere(self) -> None:
        await asyncio.sleep(random.uniform(0.0, LONGEST_WAIT_SECONDS))


class ExportControlBench(ControlBench):
    """The same for exports of a dataset that is loaded once."""

    async def prepare(self) -> None:
        task_id = await self._system.start_import(self._file_id, "lineitem")
        await self._system.until(task_id, lambda row: row.state == "succeeded")
        self._system.workers = self._system.of("export-worker")
        given = self._system.stack.environment().items()
        self._objects = S3ObjectStore(
            Settings(**{name.removeprefix("SLUICE_").lower(): value for name, value in given})  # type: ignore[arg-type]
        )

    async def start(self, number: int, **params: Any) -> int:
        return await self._system.start_export("lineitem", "csv", f"lineitem-{number}.csv", **params)

    async def remove(self, number: int, task_id: int) -> None:
        task = await self._system.call("GET", f"/v1/tasks/{task_id}")
        await self._system.call("DELETE", f"/v1/files/{task['result']['file_id']}")

    async def left(self, task_id: int) -> object:
        prefix = f"exports/{task_id}/"
        return [found.key async for found in self._objects.list_objects(prefix)] + [
            upload.key async for upload in self._objects.list_uploads(prefix)
        ]
