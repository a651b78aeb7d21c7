"""COPY TO through our connection, when it is not read to its end."""

import asyncio
import random

import pytest

from shared.adapters.postgres import PgDatabase

_ENDLESS = "SELECT repeat('x', 1000) FROM (SELECT generate_series(1, 100000000)) endless"


async def test_a_copy_cancelled_at_any_moment_ends_as_cancelled_and_spoils_no_connection(database: PgDatabase) -> None:
    for _ in range(200):
        pieces = asyncio.Semaphore(0)

        async def count(_: bytes, pieces: asyncio.Semaphore = pieces) -> None:
            pieces.release()

        async def read() -> None:
            async with database.transaction() as connection:
                await connection.copy_out(_ENDLESS, sink=count)

        reading = asyncio.create_task(read())
        for _ in range(random.randrange(20)):
            await pieces.acquire()
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        async with database.transaction() as connection:
            assert await connection.fetchval("SELECT 1") == 1


async def test_what_the_sink_raises_comes_out_and_the_next_connection_is_another(database: PgDatabase) -> None:
    async def refuse(_: bytes) -> None:
        raise ValueError("enough")

    async with database.connection() as connection:
        with pytest.raises(ValueError, match="enough"):
            await connection.copy_out(_ENDLESS, sink=refuse)
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT 1") == 1
