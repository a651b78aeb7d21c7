"""What an export makes of servers that are restarted under it: the same bytes."""

import asyncio

import pytest

from sluice.stack.server import Server
from tests.faults.fleet import Fleet


@pytest.mark.parametrize(
    ("server", "kill"), [("rabbitmq", True), ("postgres", False), ("postgres", True), ("seaweedfs", False)]
)
async def test_an_export_goes_on_after_a_restart_of_a_server(fleet: Fleet, server: str, kill: bool) -> None:
    task_id = await fleet.begun()
    restarted: Server = getattr(fleet.stack, server)
    if kill:
        await asyncio.to_thread(restarted.kill)
    await asyncio.to_thread(restarted.restart)
    await fleet.finished(task_id)
