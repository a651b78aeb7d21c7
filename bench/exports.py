"""Export of a dataset against `psql \\copy (select *) to` a file; also other formats, pauses, kills and memory.

The clock of an export runs from the accepted request to `succeeded`, when the file can be downloaded from object
storage. The clock of the baseline is that of the `psql` process, which writes to the local disk.
"""

import argparse
import asyncio
import hashlib
import random
import shlex
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg

from bench.data import lineitem
from bench.imports import psql
from bench.report import MB, cores, say, table
from bench.system import Row, System, kill_now, running_system
from sluice.stack import StackError

GOAL_RATIO = 0.9
GOAL_MB = 250
PAUSES = 5
KILLS = 3
DATASET = "lineitem"
TABLE = f"data_bench.{DATASET}"
# Rows that the cursor of the Parquet baseline fetches at a time.
CURSOR_ROWS = 100_000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pairs", type=int, default=3, help="pairs of baseline and export (3)")
    parser.add_argument("--scale", type=float, default=0.5, help="TPC-H scale factor (0.5: 380 MB)")
    parser.add_argument("--formats", action="store_true", help="also CSV.gz and Parquet, one pair each")
    parser.add_argument("--memory", action="store_true", help="also a dataset of four times the rows, for peak memory")


async def run(options: argparse.Namespace) -> dict[str, Any]:
    path = lineitem(options.scale)
    async with running_system(workers=1, exporters=1) as system:
        file_id = await system.upload(path)
        task_id = await system.start_import(file_id, DATASET, csv={"header": True})
        await system.until(task_id, _has_ended)
        system.workers = system.of("export-worker")
        with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
            return await ExportBench(system, Path(folder), file_id).run(options)


class ExportBench:
    def __init__(self, system: System, folder: Path, source: int) -> None:
        self._system = system
        self._folder = folder
        self._source = source
        self._numbers = count(1)
        self._digest: str | None = None

    async def run(self, options: argparse.Namespace) -> dict[str, Any]:
        rows = int(await self._system.database.fetchval(f"SELECT count(*) FROM {TABLE}"))
        await self._copy()  # warm-up, both
        await self._export("csv")
        copies, exports, paused = await self._pairs(options.pairs)
        seconds = statistics.median(seconds for seconds, _ in exports)
        size = exports[0][1]
        ratio = statistics.median(copy / one for copy, (one, _) in zip(copies, exports, strict=True))
        slower = statistics.median(slow / one for slow, (one, _) in zip(paused, exports, strict=True))
        result: dict[str, Any] = {
            "ratio_copy_out": round(ratio, 3),
            "copy_seconds": round(statistics.median(copies), 3),
            "export_seconds": round(seconds, 3),
            "mb_per_s": round(size / MB / seconds, 1),
            "worker_rss_mb": round(self._system.peak_worker_bytes() / MB, 1),
            "pauses": PAUSES,
            "pauses_time_ratio": round(slower, 3),
            **await self._with_kills(),
            "rows": rows,
            "bytes": size,
            "pairs": options.pairs,
            "cores": cores(),
        }
        if options.formats:
            result |= await self._formats()
            result["worker_rss_formats_mb"] = round(self._system.peak_worker_bytes() / MB, 1)
        if options.memory:
            result["worker_rss_large_mb"] = await self._large()
        say(f"\nexport of {rows:,} rows, {size / MB:.0f} MB of CSV, {cores()} cores")
        table(
            {
                "psql \\copy to (median)": f"{result['copy_seconds']:.2f} s",
                "export (median)": f"{seconds:.2f} s, {result['mb_per_s']} MB/s",
                "times as fast as \\copy": f"{ratio:.2f}   (goal: {GOAL_RATIO} at least)",
                f"time with {PAUSES} pauses": f"x {slower:.2f}",
                f"with {KILLS} kill -9 of the worker": f"{result['mb_stored_twice']} MB stored twice, "
                f"{result['kills_seconds']} s",
                "peak memory of a worker": f"{result['worker_rss_mb']} MB   (goal: {GOAL_MB} at most)",
                **{
                    name: value
                    for name, value in result.items()
                    if name.startswith(("ratio_gzip", "ratio_parquet", "worker_rss_formats"))
                },
                **({"with four times the rows": f"{result['worker_rss_large_mb']} MB"} if options.memory else {}),
            }
        )
        return result

    # --- one measurement each

    async def _pairs(self, pairs: int) -> tuple[list[float], list[tuple[float, int]], list[float]]:
        copies: list[float] = []
        exports: list[tuple[float, int]] = []
        paused: list[float] = []

        async def baseline() -> None:
            copies.append(await self._copy())

        async def plain() -> None:
            exports.append(await self._export("csv"))

        async def with_pauses() -> None:
            paused.append(await self._with_pauses())

        order = [baseline, plain, with_pauses]
        for number in range(1, pairs + 1):
            for measure in order:
                await self._system.settle()
                await measure()
            order.reverse()
            copy, (one, _) = copies[-1], exports[-1]
            say(
                f"pair {number}: \\copy {copy:.2f} s, export {one:.2f} s, ratio {copy / one:.2f}; "
                f"with {PAUSES} pauses {paused[-1]:.2f} s of running"
            )
        return copies, exports, paused

    async def _copy(self, pipe: str = "") -> float:
        target = self._folder / "baseline"
        sink = f"program '{pipe} > {target}'" if pipe else f"'{target}'"
        columns = await self._columns()
        copy = f"\\copy (select {columns} from {TABLE}) to {sink} (format csv, header)"
        begun = time.perf_counter()
        process = await asyncio.create_subprocess_exec(psql(), self._system.dsn, "-X", "-q", "-c", copy)
        status = await process.wait()
        seconds = time.perf_counter() - begun
        if status:
            raise StackError(f"psql failed with status {status}: {shlex.quote(copy)}")
        target.unlink()
        return seconds

    async def _export(self, form: str, dataset: str = DATASET) -> tuple[float, int]:
        """Seconds by our clock, and the bytes of the file."""
        task_id = await self._start(form, dataset)
        begun = time.perf_counter()
        # Seldom, because the observer works on the same cores.
        await self._system.until(task_id, _has_ended, poll_seconds=0.02)
        seconds = time.perf_counter() - begun
        return seconds, await self._remove(task_id, compare=form == "csv" and dataset == DATASET)

    async def _with_pauses(self) -> float:
        """Seconds in which a worker held the task."""
        task_id = await self._start("csv")
        for number in range(1, PAUSES + 1):
            # The last one early enough to stop it: parts that are on their way are still finished.
            await self._reaches(task_id, number / (PAUSES + 2))
            await self._system.command(task_id, "pause")
            row = await self._system.until(task_id, lambda row: row.state == "paused")
            if row.state != "paused":
                raise RuntimeError("the export ended before it could be paused; take a larger --scale")
            await self._system.command(task_id, "resume")
        row = await self._system.until(task_id, _has_ended)
        await self._remove(task_id)
        return row.running_seconds

    async def _with_kills(self) -> dict[str, Any]:
        system = self._system
        system.workers += (others := system.stack.spawn("export-worker", KILLS))
        for worker in others:
            await asyncio.to_thread(worker.wait_ready)
        before = self._stored_bytes()
        begun = time.perf_counter()
        task_id = await self._start("csv")
        for number in range(1, KILLS + 1):
            row = await self._reaches(task_id, number / (KILLS + 1))
            await asyncio.sleep(random.uniform(0.0, 0.1))
            kill_now(system.worker_of(row))
        await system.until(task_id, _has_ended)
        seconds = time.perf_counter() - begun
        stored = self._stored_bytes() - before
        size = await self._remove(task_id)
        # An external store does not tell how much it has written.
        twice = round((stored - size) / MB, 1) if stored else None
        return {"kills": KILLS, "kills_seconds": round(seconds, 2), "mb_stored_twice": twice}

    def _stored_bytes(self) -> int:
        """What the embedded store has ever written: its volumes only grow, until they are vacuumed by the hour."""
        return sum(volume.stat().st_size for volume in self._system.stack.home.path.glob("seaweedfs/**/*.dat"))

    async def _formats(self) -> dict[str, Any]:
        gzip_baseline, (gzip_seconds, gzip_bytes) = await self._copy("gzip -6"), await self._export("csv.gz")
        say(f"csv.gz: \\copy | gzip -6 {gzip_baseline:.2f} s, export {gzip_seconds:.2f} s")
        cursor, (parquet_seconds, parquet_bytes) = await self._cursor_to_parquet(), await self._export("parquet")
        say(f"parquet: pyarrow over a cursor {cursor:.2f} s, export {parquet_seconds:.2f} s")
        return {
            "ratio_gzip": round(gzip_baseline / gzip_seconds, 2),
            "gzip_bytes": gzip_bytes,
            "ratio_parquet": round(cursor / parquet_seconds, 2),
            "parquet_bytes": parquet_bytes,
        }

    async def _cursor_to_parquet(self) -> float:
        """What a careful script does: a server-side cursor, pyarrow, one file."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        target = self._folder / "baseline.parquet"
        connection = await asyncpg.connect(self._system.dsn)
        begun = time.perf_counter()
        try:
            async with connection.transaction():
                cursor = await connection.cursor(f"SELECT {await self._columns()} FROM {TABLE}")
                writer = None
                while records := await cursor.fetch(CURSOR_ROWS):
                    names = list(records[0].keys())
                    batch = pa.table({name: [record[name] for record in records] for name in names})
                    if writer is None:
                        schema = pa.schema([(f.name, _widest(f.type)) for f in batch.schema])
                        writer = pq.ParquetWriter(target, schema)
                    writer.write_table(batch.cast(schema))
                if writer is not None:
                    writer.close()
        finally:
            await connection.close()
        target.unlink()
        return time.perf_counter() - begun

    async def _large(self) -> float:
        """Peak memory of a new worker that exports a dataset of four loads."""
        for _ in range(3):
            task_id = await self._system.start_import(self._source, DATASET, mode="append", csv={"header": True})
            await self._system.until(task_id, _has_ended)
        self._system.workers = self._system.stack.spawn("export-worker")
        for worker in self._system.of("export-worker"):
            if worker not in self._system.workers and worker.process.is_running():
                await asyncio.to_thread(worker.terminate)
        await asyncio.to_thread(self._system.workers[0].wait_ready)
        self._digest = None
        await self._export("csv")
        return round(self._system.peak_worker_bytes() / MB, 1)

    # --- what they share

    async def _start(self, form: str, dataset: str = DATASET) -> int:
        return await self._system.start_export(dataset, form, f"bench-{next(self._numbers)}.{form}")

    async def _remove(self, task_id: int, *, compare: bool = True) -> int:
        """Delete the file; answers its bytes. Raises RuntimeError when they are not those of the first one."""
        result = (await self._system.call("GET", f"/v1/tasks/{task_id}"))["result"]
        path = f"/v1/files/{result['file_id']}"
        if compare:
            digest = hashlib.sha256()
            async with self._system.http.get(f"{path}/content") as response:
                response.raise_for_status()
                async for piece in response.content.iter_any():
                    digest.update(piece)
            if self._digest not in (None, digest.hexdigest()):
                raise RuntimeError(f"task {task_id} has written other bytes than the first export")
            self._digest = digest.hexdigest()
        await self._system.call("DELETE", path)
        return int(result["bytes"])

    async def _reaches(self, task_id: int, share: float) -> Row:
        total = (await self._system.call("GET", f"/v1/tasks/{task_id}"))["progress"]["rows_total"] or 0
        row = await self._system.until(task_id, lambda row: row.has_committed and row.rows_done >= share * total)
        if row.state == "succeeded":
            raise RuntimeError("the export ended before it could be disturbed; take a larger --scale")
        return row

    async def _columns(self) -> str:
        columns = (await self._system.call("GET", f"/v1/datasets/{DATASET}"))["columns"]
        return ", ".join(f'"{column["name"]}"' for column in columns)


def _has_ended(row: Row) -> bool:
    return row.state == "succeeded"


def _widest(inferred: Any) -> Any:
    """A decimal type that holds what later batches may bring."""
    import pyarrow as pa

    return pa.decimal128(38, inferred.scale) if pa.types.is_decimal(inferred) else inferred
