"""Datasets made without an import, exports of them, and PostgreSQL's own COPY as the reference."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

from export_worker import snapshot, survey
from shared.adapters.catalog import Column, FinishedLoad, create_stage, publish_load
from shared.adapters.postgres import quoted
from shared.domain.export_params import ExportRequest
from shared.domain.task import ENDED, Command, Kind, LoadId, Task, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES
from shared.ports.tasks import NewTask
from tests.faults.scene import Scene


async def add_load(
    scene: Scene, columns: Mapping[str, str], rows: str, dataset: str = "data", *, mode: str | None = None
) -> LoadId:
    """Make a load of what the SQL `rows` selects; the first one of a dataset creates it."""
    names = ", ".join(quoted(name) for name in columns)
    made = tuple(Column(name, kind) for name, kind in columns.items())
    async with scene.database.transaction() as connection:
        load_id = LoadId(
            await connection.fetchval(
                "INSERT INTO sluice.tasks (account_id, kind, state, params) VALUES ($1, 'import', 'succeeded', '{}')"
                " RETURNING task_id",
                scene.account_id,
            )
        )
        await create_stage(connection, load_id, made)
        if mode is None:
            there = "SELECT true FROM sluice.datasets WHERE account_id = $1 AND name = $2"
            mode = "append" if await connection.fetchval(there, scene.account_id, dataset) else "create"
        status = await connection.execute(f"INSERT INTO sluice_loads.load_{load_id} ({names}) {rows}")
        count = int(status.split()[2])
        load = FinishedLoad(load_id, scene.account_id, count, 0, count * 100, made, None, None)
        await publish_load(connection, load, dataset, mode=mode, evolve=mode == "append", lock_seconds=5)
    return load_id


async def add_numbers(scene: Scene, rows: int, *, width: int = 200, dataset: str = "data") -> LoadId:
    """A load of `rows` rows of a little more than `width` bytes."""
    return await add_load(
        scene,
        {"n": "bigint", "filling": "text"},
        f"SELECT n, n || repeat('x', {width}) FROM generate_series(1, {rows}) n",
        dataset,
    )


async def add_rare(scene: Scene, rows: int, dataset: str = "data") -> LoadId:
    """The same, but in only one row of ten is `n` positive."""
    return await add_load(
        scene,
        {"n": "bigint", "filling": "text"},
        f"SELECT CASE WHEN n % 10 = 0 THEN n ELSE -n END, 'rare' FROM generate_series(1, {rows}) n",
        dataset,
    )


@asynccontextmanager
async def out_of_reach(scene: Scene, load: LoadId) -> AsyncIterator[None]:
    """Whoever reads the load waits."""
    async with scene.database.transaction() as connection:
        await connection.execute(f"LOCK TABLE sluice_loads.load_{load} IN ACCESS EXCLUSIVE MODE")
        yield


@asynccontextmanager
async def door(scene: Scene, load: LoadId) -> AsyncIterator[asyncio.Event]:
    """A load is out of reach until the event is set."""
    opened = asyncio.Event()

    async def keep() -> None:
        async with out_of_reach(scene, load):
            shut.set_result(None)
            await opened.wait()

    shut = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(keep())
        await shut
        try:
            yield opened
        finally:
            opened.set()


async def reads(scene: Scene, load: LoadId) -> None:
    """Wait until somebody waits for a load that is out of reach."""
    waiting = "SELECT count(*) > 0 FROM pg_locks WHERE relation = $1::text::regclass::oid AND NOT granted"
    await scene.when_value(waiting, True, f"sluice_loads.load_{load}")


async def planned(scene: Scene, dataset: str = "data", *, surveyed: bool = True, **params: Any) -> TaskId:
    """A paused export that knows what it reads and has read nothing, but for its survey."""
    request = ExportRequest.model_validate({"kind": "export", "dataset": dataset, **params})
    later = datetime.now(UTC) + timedelta(days=1)
    new = NewTask(scene.account_id, Kind.EXPORT, request.model_dump(mode="json"), not_before=later)
    task, _ = await scene.store.create(new, actor="test")
    await scene.command(task.task_id, Command.PAUSE)
    async with scene.database.connection() as connection:
        plan = await snapshot.take(connection, task, request, part_bytes=MIN_PART_BYTES)
        await snapshot.pin(connection, task, plan)
        if surveyed and survey.is_needed(request, plan):
            plan = await survey.survey(scene.database, request, plan, lambda _: asyncio.sleep(0))
        await connection.execute(
            "UPDATE sluice.tasks SET plan = $2, not_before = NULL WHERE task_id = $1",
            task.task_id,
            plan.model_dump(mode="json"),
        )
        # The hint of tomorrow.
        await connection.execute(
            "DELETE FROM sluice.outbox WHERE body ->> 'task_id' = $1::bigint::text AND due_at > now() + interval '1 h'",
            task.task_id,
        )
    return task.task_id


async def begin_export(scene: Scene, dataset: str = "data", **params: Any) -> TaskId:
    """Ask for an export, as the gateway would."""
    rate = params.pop("max_bytes_per_second", None)
    request = ExportRequest.model_validate({"kind": "export", "dataset": dataset, **params})
    new = NewTask(scene.account_id, Kind.EXPORT, request.model_dump(mode="json"), max_bytes_per_second=rate)
    task, _ = await scene.store.create(new, actor="test")
    return task.task_id


async def export(scene: Scene, dataset: str = "data", **params: Any) -> Task:
    """Export and wait for success."""
    return await succeeded(scene, await begin_export(scene, dataset, **params))


async def succeeded(scene: Scene, task_id: TaskId) -> Task:
    """Wait for the end, which must be success and leave nothing but the file."""
    task = await scene.until(task_id, *ENDED)
    assert task.state is TaskState.SUCCEEDED, (task.error, await scene.events(task_id))
    assert await leftovers(scene, task_id) == {}
    return task


async def export_fails(scene: Scene, dataset: str = "data", **params: Any) -> str:
    """Export; it must fail. Answers what the user is told."""
    task = await scene.until(await begin_export(scene, dataset, **params), *ENDED)
    assert task.state is TaskState.FAILED, (task.state, task.result)
    assert task.error is not None
    return str(task.error["detail"])


async def content(scene: Scene, task: Task) -> bytes:
    """The bytes of the file that an export made."""
    assert task.result is not None
    rows = await scene.fetch(
        "SELECT object_key, bytes FROM sluice.files WHERE file_id = $1 AND account_id = $2 AND deleted_at IS NULL",
        task.result["file_id"],
        scene.account_id,
    )
    body = b"".join([chunk async for chunk in scene.objects.read(rows[0]["object_key"])])
    assert len(body) == rows[0]["bytes"] == task.result["bytes"] == task.bytes_done == task.bytes_total
    assert task.result["rows"] == task.rows_done == task.rows_total
    return body


async def reference(
    scene: Scene, loads: Sequence[LoadId], columns: Sequence[str], where: str = "true", **options: Any
) -> bytes:
    """What COPY writes of these loads, one after the other, each in the order of its rows."""
    pieces: list[bytes] = []

    async def keep(piece: bytes) -> None:
        pieces.append(piece)

    names = ", ".join(quoted(name) for name in columns)
    options = {"format": "csv", "header": True, **options}
    async with scene.database.transaction() as connection:
        await connection.execute("SET LOCAL TimeZone = 'UTC'")
        for number, load_id in enumerate(loads):
            if number:
                options["header"] = False
            query = f"SELECT {names} FROM sluice_loads.load_{load_id} WHERE {where} ORDER BY ctid"
            await connection.copy_out(query, sink=keep, **options)
    return b"".join(pieces)


async def leftovers(scene: Scene, task_id: TaskId) -> dict[str, int]:
    """What there is of a task besides its row and its file: pins, ledger and part rows, uploads, objects."""
    prefix = f"exports/{task_id}/"
    found = await scene.leftovers(task_id)
    found.pop("uploads", None)  # of all tasks
    if await scene.value("SELECT state FROM sluice.tasks WHERE task_id = $1", task_id) == TaskState.ABORTED:
        found.pop("ledger", None)  # the sweeper's, for what the store may still do
    for table in ("export_parts", "export_remainders"):
        found[table] = await scene.value(f"SELECT count(*) FROM sluice.{table} WHERE task_id = $1", task_id)
    found["exports"] = len([upload async for upload in scene.objects.list_uploads(prefix)])
    files = {row["object_key"] for row in await scene.fetch("SELECT object_key FROM sluice.files")}
    found["objects"] = len([each async for each in scene.objects.list_objects(prefix) if each.key not in files])
    return {what: count for what, count in found.items() if count}
