"""What an export makes of uploads that are swept, overwritten or completed without it, and of a broken join."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.domain.task import Command, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES
from sluice.stack.services import Service
from tests.exports import begin_export, content, leftovers, succeeded
from tests.faults.fleet import SLOWLY, Fleet, held
from tests.faults.tap import ConnectionCut


async def test_a_swept_upload_is_done_again_and_only_its_own_segment(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    await scene.command(task_id, Command.PAUSE)
    sealed = (await scene.until(task_id, TaskState.PAUSED)).bytes_done
    await scene.command(task_id, Command.RESUME)
    await scene.when(task_id, lambda task: task.bytes_done > sealed)
    key, upload_id, _ = await fleet.orphaned(task_id)
    await scene.objects.abort_upload(key, upload_id)
    await fleet.whole()
    task = await scene.when(task_id, held(after_epoch=3, more_than=0))
    assert task.bytes_done >= sealed
    await fleet.finished(task_id)
    assert await scene.value("SELECT count(*) FROM sluice.object_ledger WHERE object_key = $1", key) == 0


async def test_an_upload_swept_under_a_running_worker_is_done_again(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    [row] = await scene.fetch("SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task_id)
    await scene.objects.abort_upload(row["object_key"], row["upload_id"])
    task = await fleet.finished(task_id)
    assert task.claims == 2
    assert any("no longer has the upload" in (reason or "") for _, reason in await scene.events(task_id))


async def test_a_segment_that_was_completed_and_not_noted_counts(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    key, upload_id, parts = await fleet.orphaned(task_id)
    await scene.objects.complete_upload(key, upload_id, parts)
    await fleet.whole()
    await scene.when(task_id, held(after_epoch=1, more_than=sum(part.bytes for part in parts)))
    await fleet.finished(task_id)


async def test_a_completion_that_the_store_carries_out_late_costs_only_its_segment(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    key, upload_id, parts = await fleet.orphaned(task_id)
    await fleet.whole()
    await scene.when(task_id, held(after_epoch=1, more_than=sum(part.bytes for part in parts)))
    await scene.objects.complete_upload(key, upload_id, parts)
    await fleet.finished(task_id)


async def test_an_empty_file_is_written_though_the_worker_died_before(fleet: Fleet) -> None:
    async with fleet.tap() as tap:
        worker: Service
        killed = asyncio.Event()

        async def kill(_: int, chunk: bytes) -> bytes:
            if b"/whole-" in chunk:
                worker.kill()
                killed.set()
                raise ConnectionCut
            return chunk

        tap.up = kill
        async with fleet.behind(tap) as worker:
            nothing = [{"column": "n", "op": "<", "value": 0}]
            task_id = await begin_export(fleet.scene, format="jsonl", conditions=nothing)
            await killed.wait()
            await fleet.whole()
            task = await succeeded(fleet.scene, task_id)
    assert await content(fleet.scene, task) == b""


async def test_a_part_overwritten_by_other_bytes_is_noticed(fleet: Fleet) -> None:
    task_id = await fleet.begun()
    key, upload_id, parts = await fleet.orphaned(task_id)
    await fleet.scene.objects.put_part(key, upload_id, parts[-1].number, b"x" * MIN_PART_BYTES)
    await fleet.whole()
    await fleet.finished(task_id)


async def test_a_store_that_loses_every_upload_fails_the_export_in_the_end(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    another = (
        "SELECT count(*) > 0 FROM sluice.export_parts JOIN sluice.object_ledger USING (task_id)"
        " WHERE task_id = $1 AND upload_id <> $2"
    )
    upload_id = ""
    for _ in range(5):
        await scene.when_value(another, True, task_id, upload_id)
        key, upload_id, _ = await fleet.orphaned(task_id)
        await scene.objects.abort_upload(key, upload_id)
        await fleet.whole()
    task = await scene.until(task_id, TaskState.FAILED)
    assert task.error is not None
    assert "lost the same upload 5 times" in task.error["detail"]
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


# --- the join of the segments

COPIES = "SELECT count(*) > 0 FROM sluice.export_parts WHERE task_id = $1 AND segment = 0"


@asynccontextmanager
async def joining(fleet: Fleet, **changed: str) -> AsyncIterator[tuple[TaskId, Service, list[bytes]]]:
    """An export whose segments a worker of its own copies, slowly; one is done. The copies so far."""
    task_id = await fleet.segmented()
    copied: list[bytes] = []
    async with fleet.tap() as tap:

        async def slowly(_: int, chunk: bytes) -> bytes:
            if b"x-amz-copy-source" in chunk.lower():
                copied.extend(re.findall(rb"partNumber=(\d+)", chunk))
                await asyncio.sleep(0.7)  # nobody learns of a copy on its way: the time in which a test disturbs it
            return chunk

        tap.up = slowly
        async with fleet.behind(tap, SLUICE_LANES="1", **changed) as worker:
            await fleet.scene.command(task_id, Command.RESUME)
            await fleet.scene.when_value(COPIES, True, task_id)
            yield task_id, worker, copied


async def test_a_join_goes_on_where_its_slice_and_its_worker_ended(fleet: Fleet) -> None:
    async with joining(fleet, SLUICE_SLICE_SECONDS="1.5") as (task_id, worker, copied):
        worker.kill()
        worker.start()
        await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    # One was on its way when the worker was killed.
    assert 3 <= len(set(copied)) <= len(copied) <= len(set(copied)) + 1
    assert sum(reason == "its slice is over" for _, reason in await fleet.scene.events(task_id)) > 0
    await fleet.finished(task_id)


async def test_a_pause_gives_up_a_join_and_a_resume_begins_another(fleet: Fleet) -> None:
    scene = fleet.scene
    async with joining(fleet) as (task_id, _, _):
        await scene.command(task_id, Command.PAUSE)
        await scene.until(task_id, TaskState.PAUSED)
        assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []
        assert not await scene.value(COPIES, task_id)
        await scene.command(task_id, Command.RESUME)
        await scene.until(task_id, TaskState.SUCCEEDED)
    await fleet.finished(task_id)


async def test_a_join_whose_upload_is_swept_is_done_again(fleet: Fleet) -> None:
    scene = fleet.scene
    async with joining(fleet) as (task_id, _, _):
        [upload] = [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")]
        await scene.objects.abort_upload(upload.key, upload.upload_id)
        await scene.until(task_id, TaskState.SUCCEEDED)
    assert any("no longer has the upload" in (reason or "") for _, reason in await scene.events(task_id))
    await fleet.finished(task_id)


async def test_an_abort_during_the_join_leaves_nothing(fleet: Fleet) -> None:
    async with joining(fleet) as (task_id, _, _):
        await fleet.scene.abort(task_id)
        assert await leftovers(fleet.scene, task_id) == {}
