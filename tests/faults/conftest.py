"""Servers that tests of exports kill and restart, and what runs on them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from sluice.stack import Stack
from tests.exports import add_numbers, reference
from tests.faults.fleet import ENVIRONMENT, ROWS, Fleet
from tests.faults.scene import open_scene
from tests.servers import started


@pytest.fixture(scope="session")
def export_servers() -> Iterator[Stack]:
    """PostgreSQL is as safe as in production."""
    with started(Stack.temporary(given={})) as stack:
        yield stack


@pytest.fixture(scope="session")
async def idle_fleet(export_servers: Stack) -> AsyncIterator[Fleet]:
    control, *workers = export_servers.spawn("control", 1, ENVIRONMENT) + export_servers.spawn(
        "export-worker", 2, ENVIRONMENT
    )
    async with open_scene({**export_servers.environment(), **ENVIRONMENT}) as scene:
        load = await add_numbers(scene, ROWS)
        expected = await reference(scene, [load], ["n", "filling"])
        yield Fleet(export_servers, scene, control, workers, load, expected)


@pytest.fixture(scope="module")
async def awake_fleet(idle_fleet: Fleet) -> AsyncIterator[Fleet]:
    """Its services run only for modules that ask for them."""
    yield idle_fleet
    services = (idle_fleet.control, *idle_fleet.workers)
    for service in services:
        service.process.request_stop()
    for service in services:
        await asyncio.to_thread(service.terminate)


@pytest.fixture
async def fleet(awake_fleet: Fleet, shows_logs: Callable[[Stack], None]) -> AsyncIterator[Fleet]:
    """Everything running."""
    await awake_fleet.whole()
    yield awake_fleet
    shows_logs(awake_fleet.stack)
