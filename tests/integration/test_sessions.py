"""Sessions of claims that have ended are disconnected, also while the server waits for a reader that hangs."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared.adapters.catalog import Column, create_stage, drop_load_table, set_lock_timeout
from shared.adapters.postgres import PgDatabase
from shared.adapters.sessions import ClaimSessions, end_fenced_sessions
from shared.domain.errors import LockTimeout
from shared.domain.task import LoadId, Task, TaskState
from tests.tasks import new_account, silent_store, task_in, until

LOAD = LoadId(4711)


@pytest.fixture
async def task(database: PgDatabase) -> Task:
    """A task that a worker has claimed, and beside it a table to read."""
    async with database.transaction() as connection:
        await create_stage(connection, LOAD, [Column("t", "text")])
        await connection.execute(
            f"INSERT INTO sluice_loads.load_{LOAD} (t) SELECT repeat('x', 1000) FROM generate_series(1, 30000)"
        )
    return await task_in(silent_store(database), await new_account(database), TaskState.RUNNING)


@pytest.fixture
async def reading(database: PgDatabase, task: Task) -> AsyncIterator["asyncio.Task[None]"]:
    """A session of the claim that stops reading in the middle of an answer."""
    hangs = asyncio.Event()

    async def hang(_: bytes) -> None:
        hangs.set()
        await asyncio.Event().wait()

    async def read() -> None:
        async with ClaimSessions(database, task).transaction() as connection:
            await connection.copy_out(f"SELECT * FROM sluice_loads.load_{LOAD}", sink=hang)

    reading = asyncio.create_task(read())
    await hangs.wait()
    async with database.connection() as connection:
        # Until then the server could still finish without its reader.
        blocked = (
            "SELECT count(*) = 1 FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event = 'ClientWrite'"
        )
        await until(lambda: connection.fetchval(blocked))
    yield reading
    reading.cancel()
    await asyncio.wait([reading])


async def drop(database: PgDatabase, *, seconds: float) -> None:
    async with database.transaction() as connection:
        await set_lock_timeout(connection, seconds)
        await drop_load_table(connection, LOAD)


@pytest.mark.parametrize(
    "ended",
    [
        "state = 'queued'",
        "state = 'paused'",
        "state = 'aborted'",
        "epoch = epoch + 1",
        "state = 'aborting', updated_at = now() - interval '10 s'",
    ],
)
async def test_a_reader_that_hangs_holds_no_lock_once_its_claim_has_ended(
    ended: str, database: PgDatabase, task: Task, reading: "asyncio.Task[None]"
) -> None:
    async with database.connection() as connection:
        await connection.execute(f"UPDATE sluice.tasks SET {ended} WHERE task_id = $1", task.task_id)
    assert await end_fenced_sessions(database) == 1
    await drop(database, seconds=20)


async def test_the_sessions_of_a_live_claim_are_left_alone(
    database: PgDatabase, task: Task, reading: "asyncio.Task[None]"
) -> None:
    assert await end_fenced_sessions(database) == 0
    with pytest.raises(LockTimeout):
        await drop(database, seconds=0.1)


async def test_a_session_forgets_its_claim_when_it_is_given_back(database: PgDatabase, task: Task) -> None:
    async with ClaimSessions(database, task).connection() as connection:
        name = await connection.fetchval("SHOW application_name")
        assert name == f"sluice task {task.task_id} epoch {task.epoch}"
    async with database.connection() as connection:
        assert await connection.fetchval("SHOW application_name") == "test"
