"""Periodic duties: one replica at a time does each, for as long as it takes."""

import asyncio
from collections.abc import Awaitable, Callable

from control_service.duties import every
from shared.adapters.postgres import PgDatabase
from tests.tasks import open_database, until

LOCK = 0x51_7E57
_HOLDER = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid = $1 AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


class Endless:
    """A duty that ends only when it is stopped."""

    def __init__(self) -> None:
        self.begun, self.stopped = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


def in_a_replica(
    group: asyncio.TaskGroup, database: PgDatabase, duty: Callable[[], Awaitable[None]], *, seconds: float = 0.02
) -> asyncio.Task[None]:
    return group.create_task(every(seconds, duty, database, name="test", lock=LOCK, keep_seconds=0.1))


async def test_a_duty_that_takes_long_is_not_begun_by_another_replica(database_dsn: str, database: PgDatabase) -> None:
    idle_seconds = 1.0
    async with (
        open_database(database_dsn, idle_in_transaction_seconds=idle_seconds) as impatient,
        asyncio.timeout(60),
        asyncio.TaskGroup() as group,
    ):
        one, other = Endless(), Endless()
        replicas = [in_a_replica(group, impatient, one)]
        await one.begun.wait()
        replicas.append(in_a_replica(group, database, other))
        async with database.connection() as connection:
            held_by = await connection.fetchval(_HOLDER, LOCK)
            begun_at = await connection.fetchval("SELECT clock_timestamp()")

            async def long_after() -> bool:
                sql = "SELECT clock_timestamp() > $1::timestamptz + make_interval(secs => $2)"
                return bool(await connection.fetchval(sql, begun_at, 2 * idle_seconds))

            await until(long_after)
            assert await connection.fetchval(_HOLDER, LOCK) == held_by
        assert not one.stopped.is_set()
        assert not other.begun.is_set()
        for replica in replicas:
            replica.cancel()


async def test_a_duty_whose_lock_is_lost_is_stopped_and_begun_again(database: PgDatabase) -> None:
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        duty = Endless()
        replica = in_a_replica(group, database, duty)
        await duty.begun.wait()
        duty.begun.clear()
        async with database.connection() as connection:
            await connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({_HOLDER}) AS holder", LOCK)
        await duty.stopped.wait()
        await duty.begun.wait()
        replica.cancel()


async def test_a_duty_that_fails_does_not_end_the_service(database: PgDatabase) -> None:
    calls = 0
    done = asyncio.Event()

    async def stumble() -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise LookupError("odd")
        done.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        replica = in_a_replica(group, database, stumble)
        await done.wait()
        replica.cancel()
