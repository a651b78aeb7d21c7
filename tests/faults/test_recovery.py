"""Workers that are killed one after the other: the next one goes on at once, and nothing is lost or doubled."""

import asyncio

from shared.domain.task import Task, TaskState
from sluice.stack import Stack
from tests.faults.scene import open_scene
from tests.tasks import assert_loaded, numbered_csv

ROWS = 150_000
KILLS = 3


async def test_a_task_whose_workers_die_one_after_the_other_never_waits_for_a_lease_to_end(
    services: Stack, environment: dict[str, str]
) -> None:
    endless_lease = {"SLUICE_LEASE_SECONDS": "600", "SLUICE_BATCH_BYTES": "65536"}
    workers = services.spawn("upload-worker", KILLS + 1, endless_lease)
    for service in [*services.spawn("control"), *workers]:
        await asyncio.to_thread(service.wait_ready)
    async with open_scene(environment) as scene:
        task_id = await scene.begin(numbered_csv(ROWS), max_bytes_per_second=2_000_000)
        for epoch in range(1, KILLS + 1):

            def has_committed(task: Task, epoch: int = epoch) -> bool:
                return task.epoch == epoch and task.state is TaskState.RUNNING and task.attempts == 0

            task = await scene.when(task_id, has_committed)
            next(worker for worker in workers if (task.worker or "").endswith(f":{worker.pid}")).kill()
        await scene.until(task_id, TaskState.SUCCEEDED)
        await assert_loaded(scene, "data", ROWS)
        events = await scene.events(task_id)
    lost = [reason for event, reason in events if event == "TaskLost"]
    assert lost == ["its message came back: the worker is gone"] * KILLS
