"""Periodic duties: each runs in one replica at a time, goes on after an error, and says what went wrong."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from shared.domain.errors import SluiceError
from shared.ports.database import Connection, Database

log = structlog.get_logger()

# PostgreSQL ends a session that says nothing for a minute in a transaction; the lock would go to another replica.
KEEP_SECONDS = 10.0


async def every(
    seconds: float,
    duty: Callable[[], Awaitable[None]],
    database: Database,
    *,
    name: str,
    lock: int,
    keep_seconds: float = KEEP_SECONDS,
) -> None:
    """Call `duty` every `seconds` until cancelled, in whichever replica gets the advisory lock `lock` this time."""
    while True:
        try:
            # The transaction holds nothing but the lock, and gives it up even if this process dies or freezes.
            async with database.transaction() as connection:
                if await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", lock):
                    async with asyncio.TaskGroup() as group:
                        keeper = group.create_task(_keep(connection, keep_seconds))
                        await duty()
                        keeper.cancel()
        except* SluiceError as errors:
            for error in errors.exceptions:
                log.warning("a duty will be tried again", duty=name, error=str(error))
        except* Exception as errors:
            # Commands must go on being obeyed, whatever one duty stumbles over.
            log.error("a duty met an unexpected error", duty=name, exc_info=errors)
        await asyncio.sleep(seconds)


async def _keep(connection: Connection, seconds: float) -> None:
    """Hold on to the transaction. Raises DatabaseUnavailable when it is lost, and the lock with it."""
    while True:
        await asyncio.sleep(seconds)
        await connection.fetchval("SELECT true")
