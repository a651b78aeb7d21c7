"""What an export finds out before it writes: at one moment, in its own settings, and in nobody's way."""

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pyarrow.parquet as pq
import pytest

from export_worker import snapshot
from export_worker.snapshot import Plan
from export_worker.survey import survey
from gateway.datasets import Datasets
from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from shared.domain.errors import InvalidRequest, LockTimeout
from shared.domain.export_params import ExportRequest
from shared.domain.task import Command, Kind, LoadId, Task, TaskId, TaskState
from shared.ports.database import Connection
from shared.ports.objects import MIN_PART_BYTES
from shared.ports.tasks import NewTask
from tests.exports import add_load, content, succeeded
from tests.faults.scene import Scene, open_scene

MOMENT = {"at": "timestamptz", "day": "date"}
A_MOMENT = "VALUES ('2024-01-01 00:00:00+00'::timestamptz, '2024-01-31'::date)"
WAITING = "SELECT count(*) > 0 FROM pg_locks WHERE relation = to_regclass($1) AND NOT granted"


@pytest.fixture
async def alone(environment: dict[str, str]) -> AsyncIterator[Scene]:
    """An account on servers without services."""
    async with open_scene(environment, lock_seconds=1) as scene:
        yield scene


def request(**params: Any) -> ExportRequest:
    return ExportRequest.model_validate({"kind": "export", "dataset": "data", **params})


async def new_task(scene: Scene, params: ExportRequest) -> Task:
    """A task that nobody works on yet."""
    later = datetime.now(UTC) + timedelta(days=1)
    new = NewTask(scene.account_id, Kind.EXPORT, params.model_dump(mode="json"), not_before=later)
    return (await scene.store.create(new, actor="test"))[0]


async def planned(scene: Scene, params: ExportRequest, database: PgDatabase | None = None) -> tuple[Task, Plan]:
    task = await new_task(scene, params)
    async with (database or scene.database).connection() as connection:
        return task, await snapshot.take(connection, task, params, part_bytes=MIN_PART_BYTES)


async def surveyed(scene: Scene, params: ExportRequest, database: PgDatabase | None = None) -> Plan:
    _, plan = await planned(scene, params, database)

    async def forget(_: Plan) -> None:
        pass

    return await survey(database or scene.database, params, plan, forget)


@pytest.fixture
async def elsewhere(alone: Scene, settings: Settings) -> AsyncIterator[PgDatabase]:
    """Connections to a server whose owner has other habits."""
    name = await alone.value("SELECT current_database()")
    async with alone.database.connection() as connection:
        await connection.execute(f"ALTER DATABASE \"{name}\" SET TimeZone = 'Asia/Tokyo'")
        await connection.execute(f"ALTER DATABASE \"{name}\" SET DateStyle = 'SQL, DMY'")
    database = PgDatabase(settings.postgres_dsn, size=2, name="elsewhere")
    await database.open()
    yield database
    await database.close()


async def test_conditions_mean_the_same_on_every_server(alone: Scene, elsewhere: PgDatabase) -> None:
    await add_load(alone, MOMENT, A_MOMENT)
    at = {"column": "at", "op": "=", "value": "2024-01-01 00:00:00"}
    assert (await surveyed(alone, request(format="xlsx", conditions=[at]), elsewhere)).rows_known == 1
    with pytest.raises(InvalidRequest, match="31/01/2024"):
        await planned(alone, request(conditions=[{"column": "day", "op": "=", "value": "31/01/2024"}]), elsewhere)


async def test_what_is_streamed_at_once_reads_the_same_from_every_server(alone: Scene, elsewhere: PgDatabase) -> None:
    await add_load(alone, MOMENT, A_MOMENT)
    datasets = Datasets(elsewhere)
    dataset = await datasets.get(alone.account_id, "data")
    pieces: list[bytes] = []

    async def keep(piece: bytes) -> None:
        pieces.append(piece)

    await datasets.stream(dataset, "csv", keep)
    assert b"".join(pieces) == b"at,day\n2024-01-01 00:00:00+00,2024-01-31\n"
    [row] = await datasets.preview(dataset, load_id=None, limit=1)
    assert row == '{"at":"2024-01-01T00:00:00+00:00","day":"2024-01-31"}'


class Meanwhile:
    """A connection on which something else happens before each query that contains `words`."""

    def __init__(self, connection: Connection, words: str, happens: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._connection, self._words, self._happens = connection, words, happens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetch(self, sql: str, *args: object) -> Sequence[Mapping[str, Any]]:
        if self._words in sql:
            await self._happens()
        return await self._connection.fetch(sql, *args)


async def test_columns_and_loads_of_a_plan_are_of_the_same_moment(alone: Scene) -> None:
    load = await add_load(alone, {"old": "bigint"}, "VALUES (1)")
    task = await new_task(alone, request())

    async def replaced() -> None:
        await add_load(alone, {"other": "date"}, "VALUES ('2024-01-01'::date)", mode="replace")

    async with alone.database.connection() as connection:
        meanwhile = cast(Connection, Meanwhile(connection, "pg_relation_size", replaced))
        plan = await snapshot.take(meanwhile, task, request(), part_bytes=MIN_PART_BYTES)
    assert ([column.name for column in plan.columns], [part.load_id for part in plan.loads]) == (["old"], [load])
    async with alone.database.transaction() as connection:
        with pytest.raises(LockTimeout):
            await snapshot.pin(connection, task, plan)


@pytest.mark.parametrize(
    ("value", "digits"),
    [("1e5000", None), ("1e37", (38, 0)), ("1e38", None), ("-0.05", (18, 2)), ("0", (18, 0)), ("NULL", (18, 0))],
)
async def test_numbers_of_any_length_are_surveyed(alone: Scene, value: str, digits: tuple[int, int] | None) -> None:
    await add_load(alone, {"n": "numeric"}, f"VALUES ({value}::numeric)")
    assert (await surveyed(alone, request(format="parquet"))).digits.get("n") == digits


async def two_loads(scene: Scene) -> tuple[LoadId, LoadId]:
    first, second = [await add_load(scene, {"n": "numeric"}, f"VALUES ({n}::numeric)") for n in (1, 2)]
    return first, second


async def test_a_survey_holds_up_no_change_of_a_load_that_it_is_not_looking_at(alone: Scene) -> None:
    first, second = await two_loads(alone)
    params = request(format="parquet")
    task, plan = await planned(alone, params)
    kept: list[Plan] = []

    async def keep(plan: Plan) -> None:
        kept.append(plan)

    async with alone.database.transaction() as connection:
        await snapshot.pin(connection, task, plan)
    async with alone.database.transaction() as connection:
        await connection.execute(f"LOCK TABLE sluice_loads.load_{second}")
        surveying = asyncio.create_task(survey(alone.database, params, plan, keep))
        await alone.when_value(WAITING, True, f"sluice_loads.load_{second}")
        await alone.catalog.revert(alone.account_id, "data", first)
    assert (await surveying).digits == {"n": (18, 0)}


async def test_an_export_pauses_in_the_middle_of_its_survey_and_has_its_loads_pinned(exporting: Scene) -> None:
    scene = exporting
    params = request(format="parquet")
    _, second = await two_loads(scene)
    task, plan = await planned(scene, params)
    await as_planned(scene, task.task_id, plan)
    async with scene.database.transaction() as connection:
        await connection.execute(f"LOCK TABLE sluice_loads.load_{second}")
        await scene.command(task.task_id, Command.RESUME)
        await scene.when_value(WAITING, True, f"sluice_loads.load_{second}")
        await scene.command(task.task_id, Command.PAUSE)
        await scene.until(task.task_id, TaskState.PAUSED)
    await scene.command(task.task_id, Command.RESUME)
    body = await content(scene, await succeeded(scene, task.task_id))
    assert pq.read_table(io.BytesIO(body)).column("n").to_pylist() == [1, 2]


async def as_planned(scene: Scene, task_id: TaskId, plan: Plan) -> None:
    """As if a worker had taken the snapshot and died; the task is paused."""
    await scene.command(task_id, Command.PAUSE)
    async with scene.database.transaction() as connection:
        await connection.execute(
            "UPDATE sluice.tasks SET plan = $2, not_before = now() WHERE task_id = $1",
            task_id,
            plan.model_dump(mode="json"),
        )
        await connection.execute("DELETE FROM sluice.outbox WHERE body ->> 'task_id' = $1::bigint::text", task_id)
        task = await scene.store.get(task_id)
        assert task is not None
        await snapshot.pin(connection, task, plan)
