"""Start times and run windows, on PostgreSQL."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from shared.adapters.outbox import PgOutbox
from shared.adapters.postgres import PgDatabase
from shared.adapters.task_store import PgTaskStore
from shared.config import Settings
from shared.domain.schedule import RunWindow
from shared.domain.task import AccountId, Command, Kind, Task, TaskState, Trigger
from shared.ports.tasks import NewTask
from shared.worker import store_policy


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[PgDatabase]:
    database = PgDatabase(settings.postgres_dsn, size=4, name="test")
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def account(database: PgDatabase) -> AccountId:
    async with database.connection() as connection:
        return AccountId(
            await connection.fetchval(
                "INSERT INTO sluice.accounts (username, password_hash) VALUES ('ann', 'x') RETURNING account_id"
            )
        )


@pytest.fixture
def store(settings: Settings, database: PgDatabase) -> PgTaskStore:
    return PgTaskStore(database, PgOutbox(None), store_policy(settings))


def window(*, opens_in: timedelta, lasts: timedelta = timedelta(hours=2)) -> RunWindow:
    opens = datetime.now(UTC) + opens_in
    return RunWindow.model_validate({"from": f"{opens:%H:%M}", "to": f"{opens + lasts:%H:%M}"})


async def audit(database: PgDatabase, task: Task) -> list[tuple[str, str, str | None]]:
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT event, actor, reason FROM sluice.task_events WHERE task_id = $1 ORDER BY event_id", task.task_id
        )
    return [(row["event"], row["actor"], row["reason"]) for row in rows]


async def set_window(database: PgDatabase, task: Task, to: RunWindow) -> None:
    """As if the task had been made with it at a time when it was open."""
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE sluice.tasks SET run_window = $2 WHERE task_id = $1", task.task_id, to.model_dump(by_alias=True)
        )


async def make_due(database: PgDatabase, task: Task) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE sluice.tasks SET resume_at = now() - interval '1 second' WHERE task_id = $1", task.task_id
        )


async def test_a_task_that_may_not_start_yet_waits_with_its_hint(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    start = datetime.now(UTC) + timedelta(hours=1)
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}, not_before=start), actor="ann")
    assert await store.claim(task.task_id, "w") is None
    async with database.connection() as connection:
        due = await connection.fetchval("SELECT due_at FROM sluice.outbox WHERE routing_key = 'sluice.import'")
    assert abs(due - start) < timedelta(seconds=5)
    assert await store.announce_overdue(older_than_seconds=0, queues={"sluice.import"}) == []


async def test_pausing_and_resuming_a_task_does_not_let_it_start_early(store: PgTaskStore, account: AccountId) -> None:
    start = datetime.now(UTC) + timedelta(hours=1)
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}, not_before=start), actor="ann")
    for command in (Command.PAUSE, Command.RESUME):
        await store.command(task.task_id, command, account_id=account, actor="ann", reason=None)
    assert await store.claim(task.task_id, "w") is None


async def test_a_running_task_is_paused_when_its_window_closes_and_goes_on_when_it_opens(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    closed = window(opens_in=timedelta(hours=3))
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}), actor="ann")
    running = await store.claim(task.task_id, "w")
    assert running is not None
    await set_window(database, task, closed)
    [pausing] = await store.keep_windows(actor="schedule")
    assert pausing.state is TaskState.PAUSING
    paused = await store.move(task.task_id, Trigger.REACH_PAUSE, actor="w", epoch=running.epoch)
    assert paused is not None
    assert paused.resume_at == closed.next_open(datetime.now(UTC))
    assert paused.expires_at is not None
    assert paused.expires_at > paused.resume_at
    assert await store.keep_windows(actor="schedule") == []
    await make_due(database, task)
    # As if the server's clock were ahead: it is due there, and its window is not open here.
    assert await store.keep_windows(actor="schedule") == []
    opened = window(opens_in=timedelta(hours=-1))
    await set_window(database, task, opened)
    [resumed] = await store.keep_windows(actor="schedule")
    assert (resumed.state, resumed.resume_at) == (TaskState.QUEUED, None)
    told = await audit(database, task)
    assert [event for event, actor, _ in told if actor == "schedule"] == ["TaskPauseRequested", "TaskResumed"]
    assert [reason for _, actor, reason in told if actor == "schedule"] == [
        f"outside its run window: {closed}",
        f"its run window opens: {opened}",
    ]


async def test_an_open_window_leaves_its_task_alone(store: PgTaskStore, account: AccountId) -> None:
    opened = window(opens_in=timedelta(hours=-1))
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}, run_window=opened), actor="ann")
    assert await store.keep_windows(actor="schedule") == []
    assert await store.claim(task.task_id, "w") is not None
    assert await store.keep_windows(actor="schedule") == []


async def test_a_user_who_pauses_what_the_schedule_paused_keeps_it_paused(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}), actor="ann")
    await set_window(database, task, window(opens_in=timedelta(hours=3)))
    [paused] = await store.keep_windows(actor="schedule")
    assert paused.state is TaskState.PAUSED
    await make_due(database, task)
    await store.command(task.task_id, Command.PAUSE, account_id=account, actor="ann", reason=None)
    assert await store.keep_windows(actor="schedule") == []
    found = await store.get(task.task_id)
    assert found is not None
    assert found.state is TaskState.PAUSED


async def test_a_task_that_comes_outside_its_window_waits_for_it_and_says_so(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    closed = window(opens_in=timedelta(hours=3))
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}, run_window=closed), actor="ann")
    assert task.not_before == closed.next_open(datetime.now(UTC))
    assert await store.claim(task.task_id, "w") is None
    assert await audit(database, task) == [("TaskQueued", "ann", f"outside its run window: {closed}")]


async def test_a_task_is_not_claimed_outside_its_window(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}), actor="ann")
    await set_window(database, task, window(opens_in=timedelta(hours=3)))
    assert await store.claim(task.task_id, "w") is None
    [paused] = await store.keep_windows(actor="schedule")
    assert paused.resume_at is not None
    await store.command(task.task_id, Command.RESUME, account_id=account, actor="ann", reason=None)
    assert await store.claim(task.task_id, "w") is None
    [again] = await store.keep_windows(actor="schedule")
    assert again.resume_at == paused.resume_at
    await set_window(database, task, window(opens_in=timedelta(hours=-1)))
    await store.command(task.task_id, Command.RESUME, account_id=account, actor="ann", reason=None)
    assert await store.claim(task.task_id, "w") is not None


async def test_a_worker_that_is_lost_outside_the_window_leaves_its_task_to_the_schedule(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    task, _ = await store.create(NewTask(account, Kind.IMPORT, {}), actor="ann")
    running = await store.claim(task.task_id, "w")
    assert running is not None
    await set_window(database, task, window(opens_in=timedelta(hours=3)))
    assert await store.claim(task.task_id, "other", steal_from=running.epoch) is None
    [paused] = await store.keep_windows(actor="schedule")
    assert paused.state is TaskState.PAUSED
