"""What becomes of an export that is disturbed while it comes to rest: no upload, or nothing at all."""

import asyncio

from shared.domain.task import Command, TaskState
from tests.exports import begin_export, leftovers
from tests.faults.fleet import SLOWLY, Fleet


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
    sealed = "SELECT count(*) FROM sluice.object_ledger WHERE task_id = $1 AND upload_id IS NULL"
    await scene.when_value(sealed, 1, task_id)
    assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


async def test_an_abort_that_meets_a_completion_on_its_way_leaves_nothing(fleet: Fleet) -> None:
    scene = fleet.scene
    async with fleet.tap() as tap:
        on_its_way, let_through = asyncio.Event(), asyncio.Event()

        async def hold_completion(_: int, chunk: bytes) -> bytes:
            if chunk.startswith(b"POST ") and b"uploadId=" in chunk:
                on_its_way.set()
                await let_through.wait()
            return chunk

        async with fleet.behind(tap):
            task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
            await scene.when(task_id, lambda task: task.bytes_done > 0)
            tap.up = hold_completion
            await scene.command(task_id, Command.PAUSE)
            await on_its_way.wait()
            [row] = await scene.fetch(
                "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task_id
            )
            await scene.command(task_id, Command.ABORT)
            await fleet.whole()
            await scene.until(task_id, TaskState.ABORTED)
            let_through.set()
    # As a store that was slow with it would have done.
    await scene.objects.put(row["object_key"], b"completed")
    async with asyncio.timeout(30):
        while await leftovers(scene, task_id):  # noqa: ASYNC110 - the sweeper runs every second
            await asyncio.sleep(0.1)
