"""Connections to PostgreSQL that are cut at any moment: callers see our errors or their own; the pool stays whole."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

import pytest

from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from shared.domain.errors import DatabaseUnavailable
from tests.faults.tap import ConnectionCut, Tap

POOL = 3
ROUNDS = 40
_LINES = b"12345678\tabcdefgh\n" * 20_000
_ENDLESS = "SELECT repeat('x', 1000) FROM (SELECT generate_series(1, 100000000)) endless"
_TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'cut' ORDER BY random() LIMIT $1
"""


class OwnError(Exception):
    """What a caller raises itself."""


@pytest.fixture
async def tap(settings: Settings) -> AsyncIterator[Tap]:
    async with Tap(urlsplit(settings.postgres_dsn).port or 0) as tap:
        yield tap


@pytest.fixture
async def database(settings: Settings, tap: Tap) -> AsyncIterator[PgDatabase]:
    """A small pool that reaches PostgreSQL through the tap."""
    parts = urlsplit(settings.postgres_dsn)
    dsn = urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@{tap.address}"))
    database = PgDatabase(dsn, size=POOL, name="cut", connect_seconds=5)
    await database.open()
    yield database
    tap.reset()
    await database.close()


@pytest.fixture
async def admin(settings: Settings) -> AsyncIterator[PgDatabase]:
    """A way to PostgreSQL that nobody cuts."""
    database = PgDatabase(settings.postgres_dsn, size=1, name="admin")
    await database.open()
    async with database.connection() as connection:
        await connection.execute("CREATE TABLE public.cut (a bigint, b text)")
    yield database
    await database.close()


async def _query(database: PgDatabase) -> None:
    async with database.transaction() as connection:
        for _ in range(5):
            await connection.fetchval("SELECT pg_sleep(0.001)")


async def _copy_in(database: PgDatabase) -> None:
    async with database.transaction() as connection:
        await connection.copy_in("public", "cut", _LINES)


async def _copy_in_slowly(database: PgDatabase) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield _LINES[:1800]
            await asyncio.sleep(0.001)  # else all are sent in one go, and no cut comes between two pieces

    async with database.transaction() as connection:
        await connection.copy_in("public", "cut", pieces())


async def _copy_out(database: PgDatabase) -> None:
    left = 200

    async def sink(_: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OwnError

    with suppress(OwnError):
        async with database.transaction() as connection:
            await connection.copy_out(_ENDLESS, sink=sink)


async def _fail_by_itself(database: PgDatabase) -> None:
    failing = False
    try:
        async with database.transaction() as connection:
            await connection.fetchval("SELECT 1")
            await asyncio.sleep(random.uniform(0, 0.01))
            failing = True
            raise OwnError
    except DatabaseUnavailable:
        assert not failing, "a lost connection has hidden the caller's own error"
        raise


async def _only_hold(database: PgDatabase) -> None:
    done = False
    try:
        async with database.connection() as connection:
            await connection.fetchval("SELECT 1")
            await asyncio.sleep(random.uniform(0, 0.01))
            done = True
    except DatabaseUnavailable:
        assert not done, "all was done, and yet it is said to have failed"
        raise


JOBS: list[Callable[[PgDatabase], Awaitable[None]]] = [
    _query,
    _copy_in,
    _copy_in_slowly,
    _copy_out,
    _fail_by_itself,
    _only_hold,
]


@pytest.mark.parametrize("cut", ["by the server", "by the network"])
async def test_a_connection_that_is_cut_at_any_moment_is_told_in_our_words_and_costs_the_pool_nothing(
    cut: str, database: PgDatabase, admin: PgDatabase, tap: Tap
) -> None:
    async def break_off(_: int, chunk: bytes) -> bytes:
        raise ConnectionCut

    async def cut_now() -> None:
        if cut == "by the server":
            async with admin.connection() as connection:
                await connection.fetch(_TERMINATE, random.randint(1, POOL))
        else:
            tap.up = tap.down = break_off
            await asyncio.sleep(
                0.002
            )  # the network is away for so long: shorter than a job, so that some meet it and some do not
            tap.reset()

    seen: set[str] = set()
    for round_ in range(ROUNDS):
        # More than the pool has connections: some wait for one.
        jobs = [JOBS[(round_ + offset) % len(JOBS)] for offset in range(POOL + 2)]
        running = [asyncio.ensure_future(job(database)) for job in jobs]
        await asyncio.sleep(random.uniform(0, 0.02))
        cancelled = {task for task in running if random.random() < 0.1 and task.cancel()}
        await cut_now()
        cancelled |= {task for task in running if random.random() < 0.1 and task.cancel()}
        async with asyncio.timeout(20):
            await asyncio.wait(running)
        for job, task in zip(jobs, running, strict=True):
            assert task.cancelled() == (task in cancelled), f"{job.__name__}: {task}"
            error = None if task.cancelled() else task.exception()
            if job is not _fail_by_itself or not isinstance(error, OwnError):
                assert error is None or isinstance(error, DatabaseUnavailable), f"{job.__name__}: {error!r}"
            seen.add("cancelled" if task.cancelled() else type(error).__name__)
    assert seen == {"NoneType", "cancelled", "OwnError", "DatabaseUnavailable"}

    # What was idle in the pool when it was cut may be noticed only by its next user.
    for _ in range(POOL):
        with suppress(DatabaseUnavailable):
            await database.probe()
    met = asyncio.Barrier(POOL)

    async def together() -> None:
        async with database.transaction() as connection:
            await met.wait()
            assert await connection.fetchval("SELECT 1") == 1

    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for _ in range(POOL):
            group.create_task(together())
