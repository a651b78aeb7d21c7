"""Workers that stop in the middle of a batch: they are replaced, rolled back, and change nothing when they wake up."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from shared.domain.task import Command, TaskId, TaskState
from sluice.stack import Stack
from sluice.stack.services import Service
from tests.faults.scene import Scene, open_scene
from tests.tasks import ROW_BYTES, assert_loaded, numbered_csv, start


@pytest.fixture
async def scene(environment: dict[str, str]) -> AsyncIterator[Scene]:
    async with open_scene(environment) as scene:
        yield scene


# Somebody writes to the load's table, and nobody to the tasks: from there to its COMMIT a batch locks the task's row,
# and when its worker is frozen nobody can command the task before the lease is over.
_WRITES = """
WITH held AS (
    SELECT relation FROM pg_locks WHERE granted AND locktype = 'relation' AND mode = 'RowExclusiveLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
SELECT EXISTS (SELECT FROM held WHERE relation = to_regclass('sluice_loads.load_' || $1::bigint))
    AND NOT EXISTS (SELECT FROM held WHERE relation = 'sluice.tasks'::regclass)
"""


async def freeze_in_mid_batch(scene: Scene, task_id: TaskId, worker: Service) -> None:
    """SIGSTOP the worker at a moment in which a transaction of its own writes to the load's table."""
    async with asyncio.timeout(60):
        while True:
            task = await scene.store.get(task_id)
            assert task is not None
            assert task.state in (TaskState.QUEUED, TaskState.RUNNING), f"too late to freeze it: {task.state}"
            if not await scene.value(_WRITES, task_id):
                continue
            await asyncio.to_thread(worker.pause)
            # A COPY that had all its data when the worker froze ends by itself: only one that waits counts.
            await asyncio.sleep(0.1)
            if await scene.value(_WRITES, task_id):
                return
            await asyncio.to_thread(worker.resume)


# Each of a hundred batches is a chance to freeze the worker inside it.
ZOMBIE_ROWS = 25 * 2**20 // ROW_BYTES


async def test_a_frozen_worker_is_replaced_and_when_it_wakes_up_it_changes_nothing(
    services: Stack, scene: Scene
) -> None:
    _, zombie = await start(services, slots=1, lanes=2, batch_bytes=262_144, lease_seconds=1)
    task_id = await scene.begin(numbered_csv(ZOMBIE_ROWS), max_bytes_per_second=4_000_000)
    await freeze_in_mid_batch(scene, task_id, zombie)
    await start(services, control=0, lease_seconds=1)
    task = await scene.until(task_id, TaskState.SUCCEEDED)
    await asyncio.to_thread(zombie.resume)
    await asyncio.to_thread(zombie.wait_ready)
    assert task.claims >= 2
    await assert_loaded(scene, "data", ZOMBIE_ROWS)
    # Whatever it still wanted to say would have to come before what it does next.
    await scene.succeed(numbered_csv(10), "next")
    assert await scene.store.get(task_id) == task
    await assert_loaded(scene, "data", ZOMBIE_ROWS)


async def test_an_abort_drops_the_table_although_a_frozen_worker_holds_a_transaction_on_it(
    services: Stack, scene: Scene
) -> None:
    _, zombie = await start(services, slots=1, lanes=2, batch_bytes=262_144, lease_seconds=60)
    task_id = await scene.begin(numbered_csv(ZOMBIE_ROWS), max_bytes_per_second=4_000_000)
    await freeze_in_mid_batch(scene, task_id, zombie)
    await start(services, control=0)
    assert (await scene.command(task_id, Command.ABORT)).status == 202
    task = await scene.until(task_id, TaskState.ABORTED)
    assert await scene.leftovers(task_id) == {}
    await asyncio.to_thread(zombie.resume)
    await asyncio.to_thread(zombie.wait_ready)
    await scene.succeed(numbered_csv(10), "next")
    assert await scene.store.get(task_id) == task
    assert await scene.leftovers(task_id) == {}
