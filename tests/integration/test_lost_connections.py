"""What a connection that is lost at any moment looks like to its user: PostgreSQL does not answer, nothing else."""

import asyncio
import random

from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from shared.domain.errors import DatabaseUnavailable

_STREAM = "SELECT repeat('x', 1000) FROM (SELECT generate_series(1, 20000)) stream"


async def test_a_connection_that_is_lost_at_any_moment_is_unavailable_and_is_replaced(
    database: PgDatabase, settings: Settings
) -> None:
    victim = PgDatabase(settings.postgres_dsn, size=4, name="victim")
    await victim.open()
    done = asyncio.Event()
    lost = 0

    async def ignore(_: bytes) -> None:
        pass

    async def work(*, copies: bool) -> None:
        nonlocal lost
        while not done.is_set():
            try:
                async with victim.transaction() as connection:
                    await connection.execute("SET LOCAL synchronous_commit = off")
                    if copies:
                        await connection.copy_out(_STREAM, sink=ignore)
                    else:
                        await connection.fetch("SELECT generate_series(1, 1000)")
            except DatabaseUnavailable:
                lost += 1

    async def disconnect() -> None:
        while lost < 400:
            async with database.connection() as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'victim' AND datname = current_database()"
                )
            await asyncio.sleep(random.uniform(0, 0.02))
        done.set()

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(disconnect())
        for number in range(4):
            group.create_task(work(copies=number % 2 == 0))
    await victim.probe()
    await victim.close()
