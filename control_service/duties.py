"""Periodic duties: each runs in one replica at a time, goes on after an error, and says what went wrong."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from shared.domain.errors import SluiceError
from shared.ports.database import Database

log = structlog.get_logger()


async def every(
    seconds: float, duty: Callable[[], Awaitable[None]], database: Database, *, name: str, lock: int
) -> None:
    """Call `duty` every `seconds` until cancelled, in whichever replica gets the advisory lock `lock` this time."""
    while True:
        try:
            # The transaction holds nothing but the lock, and gives it up even if this process dies.
            async with database.transaction() as connection:
                if await connection.fetchval("SELECT pg_try_advisory_xact_lock($1)", lock):
                    await duty()
        except SluiceError as error:
            log.warning("a duty will be tried again", duty=name, error=error.detail, code=error.code)
        except Exception as error:
            # Commands must go on being obeyed, whatever one duty stumbles over.
            log.error("a duty met an unexpected error", duty=name, exc_info=error)
        await asyncio.sleep(seconds)
