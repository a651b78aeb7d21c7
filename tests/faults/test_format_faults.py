"""Imports and exports of every other format, killed, paused and resumed: every row once, and files that are whole."""

import asyncio
import gzip
import io
import uuid
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.domain.task import Command, Kind, Task, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES
from sluice.stack import Stack
from sluice.stack.services import Service
from tests.exports import add_load, begin_export, content, export, leftovers, succeeded
from tests.faults.scene import Scene, open_scene
from tests.servers import own_database, own_vhost

ROWS = 40_000


@dataclass
class Movers:
    scene: Scene
    workers: dict[Kind, Service]

    async def killed(self, task: Task) -> Task:
        """Kill the worker of a task; a new one takes it up and comes further."""
        worker = self.workers[task.kind]
        worker.kill()
        worker.start()
        return await self.scene.when(
            task.task_id, lambda now: now.state is TaskState.SUCCEEDED or now.rows_done > task.rows_done
        )

    async def paused_and_resumed(self, task_id: TaskId) -> None:
        await self.scene.command(task_id, Command.PAUSE)
        await self.scene.until(task_id, TaskState.PAUSED)
        await self.scene.command(task_id, Command.RESUME)


@pytest.fixture(scope="module")
async def processes(shared_stack: Stack, template: str) -> AsyncIterator[Movers]:
    """A control service, and a worker of each kind with small batches and parts."""
    servers = shared_stack.environment()
    async with (
        own_database(servers["SLUICE_POSTGRES_DSN"], template) as dsn,
        own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as amqp_url,
    ):
        environment = {
            **servers,
            "SLUICE_POSTGRES_DSN": dsn,
            "SLUICE_AMQP_URL": amqp_url,
            "SLUICE_S3_PREFIX": f"{uuid.uuid4().hex}/",
            "SLUICE_BATCH_BYTES": str(64 << 10),
            "SLUICE_PART_BYTES": str(MIN_PART_BYTES),
            "SLUICE_RETRY_BACKOFF_SECONDS": "0.05",
        }
        services = Stack.temporary(given=environment)
        try:
            services.start()
            services.spawn("control")
            [importer] = services.spawn("upload-worker")
            [exporter] = services.spawn("export-worker")
            async with open_scene(environment) as scene:
                yield Movers(scene, {Kind.IMPORT: importer, Kind.EXPORT: exporter})
        finally:
            await asyncio.to_thread(services.purge)


@pytest.fixture
async def movers(processes: Movers) -> Movers:
    for worker in processes.workers.values():
        await asyncio.to_thread(worker.wait_ready)
    return Movers(await processes.scene.another_account(), processes.workers)


def numbered(form: str) -> bytes:
    """Rows of `n` and a text, in several row groups where there are such."""
    filling = "x" * 60
    if form == "parquet":
        out = io.BytesIO()
        rows = pa.table({"n": range(ROWS), "s": [f"{n}{filling}" for n in range(ROWS)]})
        pq.write_table(rows, out, row_group_size=ROWS // 3, compression="none", use_dictionary=False)
        return out.getvalue()
    lines = "".join(f'{{"n": {n}, "s": "{n}{filling}"}}\n' for n in range(ROWS)).encode()
    return gzip.compress(lines) if form == "jsonl.gz" else lines


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
async def test_an_import_that_is_killed_and_paused_loads_every_row_once(movers: Movers, form: str) -> None:
    scene = movers.scene
    body = numbered(form)
    task_id = await scene.begin(body, max_bytes_per_second=700_000)
    task = await scene.when(task_id, lambda task: task.rows_done > 0)
    task = await movers.killed(task)
    await movers.paused_and_resumed(task_id)
    task = await scene.until(task_id, TaskState.SUCCEEDED)
    assert task.claims >= 3
    [found] = await scene.fetch(f"SELECT count(*), count(DISTINCT n), sum(n) FROM {scene.table()}")
    assert tuple(found.values()) == (ROWS, ROWS, ROWS * (ROWS - 1) // 2)
    assert task.rows_done == ROWS
    assert task.bytes_done == task.bytes_total


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
async def test_an_import_that_is_aborted_leaves_nothing(movers: Movers, form: str) -> None:
    scene = movers.scene
    task_id = await scene.begin(numbered(form), max_bytes_per_second=500_000)
    await scene.when(task_id, lambda task: task.rows_done > 0)
    await scene.abort(task_id)
    assert await scene.leftovers(task_id) == {}


async def begin_large_export(scene: Scene, form: str) -> TaskId:
    """About 14 MB of texts that hardly compress, at a rate that leaves time for things to happen."""
    await add_load(
        scene,
        {"n": "bigint", "price": "numeric", "s": "text"},
        "SELECT n, n / 100.0, string_agg(md5(n::text || k), '') FROM generate_series(1, 40000) n,"
        " generate_series(1, 22) k GROUP BY n ORDER BY n",
    )
    return await begin_export(scene, format=form, max_bytes_per_second=6_000_000)


@pytest.mark.parametrize("form", ["csv.gz", "parquet", "xlsx"])
async def test_an_export_that_is_killed_and_paused_has_the_same_bytes_as_one_that_is_not(
    movers: Movers, form: str
) -> None:
    scene = movers.scene
    task_id = await begin_large_export(scene, form)
    task = await scene.when(task_id, lambda task: task.rows_done > 0)
    await movers.killed(task)
    await movers.paused_and_resumed(task_id)
    task = await succeeded(scene, task_id)
    assert task.claims >= 3
    body = await content(scene, task)
    assert body == await content(scene, await export(scene, format=form))
    if form == "csv.gz":
        lines = gzip.decompress(body).splitlines()[1:]
        assert [int(line.partition(b",")[0]) for line in lines] == list(range(1, 40_001))
        return
    if form == "parquet":
        rows = pq.read_table(io.BytesIO(body))
        assert rows.column("n").to_pylist() == list(range(1, 40_001))
        assert str(rows.schema.field("price").type).startswith("decimal128(")
        return
    assert zipfile.ZipFile(io.BytesIO(body)).testzip() is None
    book = openpyxl.load_workbook(io.BytesIO(body), read_only=True)
    assert [row[0] for row in book.active.iter_rows(min_row=2, max_col=1, values_only=True)] == list(range(1, 40_001))


@pytest.mark.parametrize("form", ["parquet", "xlsx"])
async def test_an_export_that_is_aborted_leaves_nothing(movers: Movers, form: str) -> None:
    scene = movers.scene
    task_id = await begin_large_export(scene, form)
    await scene.when(task_id, lambda task: task.rows_done > 0)
    await scene.abort(task_id)
    assert await leftovers(scene, task_id) == {}
