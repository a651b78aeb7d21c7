"""What an export makes of a store whose disk is full: it says so and waits, and an abort leaves nothing."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from shared.adapters.objects import S3ObjectStore
from shared.domain.task import Command, TaskState
from tests.exports import begin_export, content, leftovers, succeeded
from tests.faults.fleet import ENVIRONMENT, Fleet
from tests.faults.scene import Scene, settings_of
from tests.faults.small_disk import SmallStore, small_store


@asynccontextmanager
async def nearly_full(fleet: Fleet, folder: Path) -> AsyncIterator[tuple[Scene, SmallStore]]:
    """Only one worker, whose store has room for some parts."""
    for service in (fleet.control, *fleet.workers):
        service.kill()
    async with small_store(folder, "40m") as disk:
        environment = {**fleet.stack.environment(), **ENVIRONMENT, **disk.weed.environment()}
        objects = S3ObjectStore(settings_of(environment))
        await objects.ensure_bucket()
        services = fleet.stack.spawn("control", 1, environment) + fleet.stack.spawn("export-worker", 1, environment)
        try:
            yield replace(fleet.scene, objects=objects), disk
        finally:
            for service in services:
                await asyncio.to_thread(service.terminate)
                fleet.stack.services.remove(service)
            await objects.aclose()


async def test_an_export_into_a_full_store_rests_on_a_pause_and_goes_on_when_there_is_room(
    fleet: Fleet, tmp_path: Path
) -> None:
    async with nearly_full(fleet, tmp_path) as (scene, disk):
        task_id = await begin_export(scene)
        await disk.is_full()
        await scene.command(task_id, Command.PAUSE)
        assert (await scene.until(task_id, TaskState.PAUSED)).bytes_done < len(fleet.expected)
        _, reason = (await scene.events(task_id))[-1]
        assert "whether its disk is full" in str(reason)
        # What it holds open until then: a store without room may not even be able to drop an upload.
        await asyncio.to_thread(disk.room)
        await scene.command(task_id, Command.RESUME)
        assert await content(scene, await succeeded(scene, task_id)) == fleet.expected
        assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []


async def test_an_abort_of_an_export_into_a_full_store_leaves_nothing(fleet: Fleet, tmp_path: Path) -> None:
    async with nearly_full(fleet, tmp_path) as (scene, disk):
        task_id = await begin_export(scene)
        await disk.is_full()
        await scene.abort(task_id)
        assert await leftovers(scene, task_id) == {}
