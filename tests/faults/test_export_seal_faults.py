"""What becomes of an export that is disturbed while it comes to rest: no upload, or nothing at all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shared.domain.task import Command, TaskId, TaskState
from sluice.stack.services import Service
from tests.exports import begin_export, leftovers
from tests.faults.fleet import SLOWLY, Fleet
from tests.tasks import until


async def no_upload(fleet: Fleet, task_id: TaskId) -> None:
    """Wait until a paused export has one segment, and no upload."""
    scene = fleet.scene
    sealed = "SELECT count(*) FROM sluice.object_ledger WHERE task_id = $1 AND upload_id IS NULL"
    await scene.when_value(sealed, 1, task_id)
    assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []


async def test_an_export_whose_worker_dies_on_the_way_to_its_pause_keeps_no_upload(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    task = await scene.store.get(task_id)
    assert task is not None
    worker = fleet.holder(task)
    worker.pause()
    await scene.command(task_id, Command.PAUSE)
    worker.kill()
    worker.start()
    await scene.until(task_id, TaskState.PAUSED)
    await no_upload(fleet, task_id)
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


@asynccontextmanager
async def sealing(fleet: Fleet, waits: str) -> AsyncIterator[tuple[TaskId, Service]]:
    """An export whose worker seals it for a pause; the request, or the answer to it, is on its way until the end."""
    on_its_way, let_through = asyncio.Event(), asyncio.Event()
    sign = {"request": (b"POST ", b"uploadId="), "answer": (b"HTTP/1.1 200 ", b"<CompleteMultipartUploadResult")}[waits]

    async def hold(_: int, chunk: bytes) -> bytes:
        if chunk.startswith(sign[0]) and sign[1] in chunk:
            on_its_way.set()
            await let_through.wait()
        return chunk

    async with fleet.tap() as tap, fleet.behind(tap) as worker:
        task_id = await begin_export(fleet.scene, max_bytes_per_second=SLOWLY)
        await fleet.scene.when(task_id, lambda task: task.bytes_done > 0)
        if waits == "request":
            tap.up = hold
        else:
            tap.down = hold
        await fleet.scene.command(task_id, Command.PAUSE)
        await on_its_way.wait()
        try:
            yield task_id, worker
        finally:
            let_through.set()


@pytest.mark.parametrize("waits", ["request", "answer"])
async def test_a_pause_whose_worker_is_killed_at_its_completion_keeps_no_upload(fleet: Fleet, waits: str) -> None:
    async with sealing(fleet, waits) as (task_id, worker):
        worker.kill()
        await fleet.scene.until(task_id, TaskState.PAUSED)
        await no_upload(fleet, task_id)
    await fleet.whole()
    await fleet.scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


@pytest.mark.parametrize("waits", ["request", "answer"])
async def test_an_abort_that_meets_a_completion_on_its_way_leaves_nothing(fleet: Fleet, waits: str) -> None:
    scene = fleet.scene
    async with sealing(fleet, waits) as (task_id, _):
        [row] = await scene.fetch("SELECT object_key FROM sluice.object_ledger WHERE task_id = $1", task_id)
        await scene.abort(task_id)
    # As a store that was slow with it would have done.
    await scene.objects.put(row["object_key"], b"completed")

    async def swept() -> bool:
        return await leftovers(scene, task_id) == {}

    await until(swept)
