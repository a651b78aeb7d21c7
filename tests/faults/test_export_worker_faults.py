"""What an export makes of workers that die, freeze or are aborted as well: the same bytes, and nothing left."""

import asyncio
import random
from contextlib import AsyncExitStack, suppress

import pytest

from shared.domain.errors import LockTimeout
from shared.domain.task import Command, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES
from tests.exports import (
    add_load,
    add_numbers,
    add_rare,
    begin_export,
    content,
    door,
    export,
    leftovers,
    out_of_reach,
    planned,
    reads,
    succeeded,
)
from tests.faults.fleet import ROWS, SLOWLY, Fleet, held


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_workers_killed_again_and_again_write_the_same_bytes(fleet: Fleet, seed: int) -> None:
    chance = random.Random(seed)
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    epoch, size, kills = 0, -1, 0
    while kills < 6:
        # Sometimes right after the claim, else between two parts or inside one.
        anything = chance.random() < 0.3
        task = await scene.when(task_id, held(after_epoch=epoch, more_than=-1 if anything else size))
        if task.state is TaskState.SUCCEEDED:
            break
        await asyncio.sleep(chance.uniform(0, 0.3))
        worker = fleet.holder(task)
        worker.kill()
        worker.start()
        epoch, size, kills = task.epoch, task.bytes_done, kills + 1
    assert kills
    await fleet.finished(task_id)


async def disturb(fleet: Fleet, task_id: TaskId, chance: random.Random) -> None:
    """Kills, pauses and resumes at random moments; in the end it goes on."""
    for _ in range(12):
        await asyncio.sleep(chance.uniform(0, 0.5))
        if chance.random() < 0.4:
            worker = chance.choice(fleet.workers)
            worker.kill()
            worker.start()
        else:
            await fleet.scene.command(task_id, chance.choice([Command.PAUSE, Command.RESUME]))
    await fleet.scene.command(task_id, Command.RESUME)


async def test_kills_pauses_and_resumes_at_random_moments_write_the_same_bytes(fleet: Fleet) -> None:
    task_id = await begin_export(fleet.scene, max_bytes_per_second=SLOWLY)
    await disturb(fleet, task_id, random.Random(4))
    await fleet.finished(task_id)


async def test_a_killed_workers_upload_goes_on(fleet: Fleet) -> None:
    task_id = await fleet.begun()
    key, _, parts = await fleet.orphaned(task_id)
    task = await fleet.scene.store.get(task_id)
    assert task is not None
    assert sum(part.bytes for part in parts) == task.bytes_done
    await fleet.whole()
    task = await fleet.finished(task_id)
    assert task.result is not None
    file_key = await fleet.scene.value("SELECT object_key FROM sluice.files WHERE file_id = $1", task.result["file_id"])
    assert file_key == key


@pytest.mark.parametrize("swept", [False, True])
async def test_a_scan_that_finds_little_is_not_begun_again_after_each_kill(fleet: Fleet, swept: bool) -> None:
    scene = fleet.scene
    dataset = f"rare_{int(swept)}"
    await add_numbers(scene, ROWS, dataset=dataset)
    loads = [await add_rare(scene, 100, dataset) for _ in range(3)]
    condition = {"column": "n", "op": ">", "value": 0}
    undisturbed = await content(scene, await export(scene, dataset, conditions=[condition], file_name=dataset))
    task_id = await planned(scene, dataset, conditions=[condition])
    async with AsyncExitStack() as behind:
        doors = [await behind.enter_async_context(door(scene, load)) for load in loads]
        await scene.command(task_id, Command.RESUME)
        # Behind the last door is the end: with that one shut there is always something left to do.
        for number in range(2):
            # Every full part is committed, and the worker waits for more.
            await scene.when(task_id, lambda task: len(undisturbed) - task.bytes_done < MIN_PART_BYTES)
            await reads(scene, loads[number])
            # Longer than it keeps to itself what it has read: a quarter of its lease.
            await asyncio.sleep(scene.settings.lease_seconds / 4 + 0.2)
            doors[number].set()
            await scene.when(task_id, lambda task, rows=ROWS + 10 * number: task.rows_done > rows)  # type: ignore[misc]
            key, upload_id, _ = await fleet.orphaned(task_id)
            # What the dead had asked for still waits.
            await scene.fetch("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
            if swept and number == 1:
                await scene.objects.abort_upload(key, upload_id)
            await fleet.whole()
    assert await content(scene, await succeeded(scene, task_id)) == undisturbed


async def test_a_frozen_worker_changes_nothing_when_it_wakes_up(fleet: Fleet) -> None:
    task_id = await fleet.begun()
    task = await fleet.scene.store.get(task_id)
    assert task is not None
    worker = fleet.holder(task)
    worker.pause()
    try:
        await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    finally:
        worker.resume()
    await fleet.whole()
    assert (await fleet.finished(task_id)).claims == 2


async def test_a_reader_that_is_frozen_keeps_nobody_from_the_dataset_once_its_lease_has_ended(fleet: Fleet) -> None:
    scene = fleet.scene
    load = await add_numbers(scene, 60_000, dataset="read")
    task_id = await planned(scene, "read")
    async with out_of_reach(scene, load):
        await scene.command(task_id, Command.RESUME)
        await reads(scene, load)
        task = await scene.store.get(task_id)
        assert task is not None
        holder = fleet.holder(task)
        await asyncio.to_thread(holder.pause)
    # Now the server answers, and nobody takes it.
    half_sent = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
    await scene.when_value(half_sent, True)
    async with asyncio.timeout(60):
        while await scene.value("SELECT count(*) FROM sluice.loads WHERE load_id = $1 AND detached_at IS NULL", load):
            with suppress(LockTimeout):
                await scene.catalog.revert(scene.account_id, "read", load)
    await asyncio.to_thread(holder.resume)
    await succeeded(scene, task_id)
    await fleet.whole()


@pytest.mark.parametrize("seed", range(4))
async def test_an_abort_at_any_moment_leaves_nothing_though_the_worker_is_killed_as_well(
    fleet: Fleet, seed: int
) -> None:
    chance = random.Random(seed)
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    await scene.when(task_id, lambda task: task.worker is not None)
    await asyncio.sleep(chance.uniform(0, 1))
    task = await scene.store.get(task_id)
    if seed % 2 and task is not None and task.worker is not None:
        worker = fleet.holder(task)
        worker.kill()
        worker.start()
    await scene.abort(task_id)
    await fleet.whole()
    assert await leftovers(scene, task_id) == {}


async def test_an_export_of_chosen_rows_that_is_killed_paused_and_resumed_at_random_writes_the_same_bytes(
    fleet: Fleet,
) -> None:
    scene = fleet.scene
    await add_load(
        scene,
        {"n": "bigint", "at": "timestamptz", "filling": "text", "other": "text"},
        f"SELECT n, '2024-01-01'::timestamptz + n * interval '1 s', n || repeat('x', 200), 'not asked for'"
        f" FROM generate_series(1, {ROWS}) n",
        "timed",
    )
    asked = {
        "columns": ["filling", "n"],
        "time_column": "at",
        "from_date": "2024-01-01T01:00:00",
        "conditions": [{"column": "n", "op": "!=", "value": 100_000}, {"column": "filling", "op": ">", "value": "11"}],
        "limit": ROWS - 50_000,
    }
    undisturbed = await export(scene, "timed", **asked, file_name="undisturbed")
    assert undisturbed.rows_done == ROWS - 50_000
    task_id = await begin_export(scene, "timed", max_bytes_per_second=SLOWLY, **asked)
    await disturb(fleet, task_id, random.Random(6))
    assert await content(scene, await succeeded(scene, task_id)) == await content(scene, undisturbed)


async def test_an_export_goes_from_worker_to_worker_slice_by_slice_and_has_the_same_bytes(fleet: Fleet) -> None:
    async with fleet.instead(2, SLUICE_SLICE_SECONDS="0.5"):
        task_id = await begin_export(fleet.scene, max_bytes_per_second=SLOWLY)
        task = await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    actors = await fleet.scene.fetch(
        "SELECT actor, count(*) FROM sluice.task_events WHERE task_id = $1 AND reason = 'its slice is over'"
        " GROUP BY actor",
        task_id,
    )
    assert len(actors) == 2
    assert sum(row["count"] for row in actors) == task.claims - 1
    await fleet.finished(task_id)
