"""The outbox: nothing that was committed stays unsaid, whoever dies between the commit and the broker."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from shared.adapters.outbox import PgOutbox, relay
from shared.adapters.postgres import PgDatabase
from shared.domain.errors import BusUnavailable, InvalidData
from shared.domain.messages import COMMANDS_EXCHANGE, IMPORT_QUEUE, Message, RunTask
from shared.domain.task import Kind, TaskId, TaskState
from shared.ports.tasks import NewTask
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene
from tests.tasks import assert_loaded, numbered_csv, open_database, silent_store, start


class Recorder:
    """A publisher that takes so many messages and is then away."""

    def __init__(self, takes: int = 10**9) -> None:
        self.takes = takes
        self.sent: list[int] = []
        self.asked = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def publish(self, exchange: str, routing_key: str, message: Message) -> None:
        await self.publish_json(exchange, routing_key, message.model_dump(mode="json"))

    async def publish_json(self, exchange: str, routing_key: str, body: dict[str, object]) -> None:
        self.asked.set()
        await self.hold.wait()
        if len(self.sent) >= self.takes:
            raise BusUnavailable("away")
        assert (exchange, routing_key) == (COMMANDS_EXCHANGE, IMPORT_QUEUE)
        task_id = body["task_id"]
        assert isinstance(task_id, int)
        self.sent.append(task_id)


@pytest.fixture
async def database(database_dsn: str) -> AsyncIterator[PgDatabase]:
    async with open_database(database_dsn) as database:
        yield database


async def post(outbox: PgOutbox, database: PgDatabase, *task_ids: int, due_at: datetime | None = None) -> None:
    async with outbox.transaction(database) as (_, say):
        for task_id in task_ids:
            await say(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(task_id)), due_at)


async def waiting(database: PgDatabase) -> list[int]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT (body ->> 'task_id')::int AS n FROM sluice.outbox ORDER BY outbox_id")
        return [row["n"] for row in rows]


async def test_what_is_posted_is_sent_after_the_commit_and_then_forgotten(database: PgDatabase) -> None:
    publisher = Recorder()
    await post(PgOutbox(publisher), database, 1, 2)
    assert publisher.sent == [1, 2]
    assert await waiting(database) == []


async def test_what_was_rolled_back_is_never_said(database: PgDatabase) -> None:
    publisher = Recorder()

    async def fail() -> None:
        async with PgOutbox(publisher).transaction(database) as (_, say):
            await say(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)), None)
            raise InvalidData("no")

    with pytest.raises(InvalidData):
        await fail()
    assert publisher.sent == []
    assert await waiting(database) == []


async def test_a_broker_that_is_away_does_not_fail_the_caller_and_the_relay_says_the_rest(database: PgDatabase) -> None:
    publisher = Recorder(takes=1)
    await post(PgOutbox(publisher), database, 1, 2, 3)
    assert await waiting(database) == [2, 3]
    publisher.takes = 10
    assert await relay(database, publisher, older_than_seconds=0) == 2
    assert publisher.sent == [1, 2, 3]
    assert await waiting(database) == []


async def test_a_crash_between_commit_and_publish_is_made_good_by_the_relay(database: PgDatabase) -> None:
    await post(PgOutbox(None), database, 1, 2)
    publisher = Recorder()
    assert await relay(database, publisher, older_than_seconds=0) == 2
    assert publisher.sent == [1, 2]


async def test_the_relay_leaves_what_is_young_or_not_due(database: PgDatabase) -> None:
    publisher = Recorder()
    await post(PgOutbox(publisher), database, 1, due_at=datetime.now(UTC) + timedelta(hours=1))
    assert publisher.sent == []
    await post(PgOutbox(None), database, 2)
    assert await relay(database, publisher, older_than_seconds=60) == 0
    assert await relay(database, publisher, older_than_seconds=0) == 1
    assert await waiting(database) == [1]


async def test_a_relay_that_is_interrupted_keeps_what_it_has_not_sent(database: PgDatabase) -> None:
    await post(PgOutbox(None), database, *range(1, 6))
    publisher = Recorder(takes=3)
    with pytest.raises(BusUnavailable):
        await relay(database, publisher, older_than_seconds=0)
    assert await waiting(database) == [4, 5]
    publisher.takes = 100
    await relay(database, publisher, older_than_seconds=0)
    assert publisher.sent == [1, 2, 3, 4, 5]
    assert await waiting(database) == []


async def test_two_relays_do_not_send_the_same_row(database: PgDatabase) -> None:
    await post(PgOutbox(None), database, *range(1, 51))
    one, other = Recorder(), Recorder()
    one.hold.clear()
    first = asyncio.create_task(relay(database, one, older_than_seconds=0, limit=25))
    async with asyncio.timeout(30):
        await one.asked.wait()
        assert await relay(database, other, older_than_seconds=0) == 25
    one.hold.set()
    assert await first == 25
    assert sorted(one.sent + other.sent) == list(range(1, 51))


class Slow(Recorder):
    """A broker that takes its time: longer over all messages than a transaction may be idle."""

    async def publish_json(self, exchange: str, routing_key: str, body: dict[str, object]) -> None:
        await asyncio.sleep(0.3)
        await super().publish_json(exchange, routing_key, body)


async def test_a_slow_broker_does_not_make_the_relay_send_twice(database_dsn: str) -> None:
    async with open_database(database_dsn, idle_in_transaction_seconds=1.5) as database:
        await post(PgOutbox(None), database, *range(1, 8))
        publisher = Slow()
        while await relay(database, publisher, older_than_seconds=0, longest_seconds=0.3):
            pass
        assert publisher.sent == list(range(1, 8))
        assert await waiting(database) == []


# --- with the control service


@pytest.fixture
async def scene(environment: dict[str, str]) -> AsyncIterator[Scene]:
    async with open_scene(environment) as scene:
        yield scene


async def test_a_task_whose_creator_died_before_it_could_say_so_is_run(services: Stack, scene: Scene) -> None:
    await start(services, control=2)
    source = await scene.file(numbered_csv(100))
    params = {"kind": "import", "dataset": "data", "source": source.model_dump()}
    task, _ = await silent_store(scene.database).create(NewTask(scene.account_id, Kind.IMPORT, params), actor="test")
    done = await scene.until(task.task_id, TaskState.SUCCEEDED)
    assert done.claims == 1
    await assert_loaded(scene, "data", 100)
    assert await scene.leftovers(task.task_id) == {"tables": 1, "loads": 1}
