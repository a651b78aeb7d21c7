"""Export workers that tests kill, freeze and cut off, and an export that they run meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from shared.domain.task import Command, LoadId, Task, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES, Part
from sluice.stack import Stack
from sluice.stack.services import Service
from tests.exports import begin_export, content, succeeded
from tests.faults.scene import Scene
from tests.faults.tap import Tap
from tests.tasks import QUICK

# About 60 MB: ten parts.
ROWS = 280_000
SLOWLY = 3 * MIN_PART_BYTES
ENVIRONMENT = {
    **QUICK,
    "SLUICE_PART_BYTES": str(MIN_PART_BYTES),
    "SLUICE_LANES": "3",
    "SLUICE_SWEEP_INTERVAL_SECONDS": "1",
}


@dataclass
class Workers:
    """A control service and workers of one kind on servers of their own, and an account whose tasks they run."""

    stack: Stack
    scene: Scene
    control: Service
    workers: list[Service]

    def holder(self, task: Task) -> Service:
        """The process that has the task."""
        assert task.worker is not None, "only a task that is being worked on has a worker"
        pid = int(task.worker.rpartition(":")[2])
        [holder] = [worker for worker in self.workers if worker.pid == pid]
        return holder

    async def whole(self) -> None:
        """Start again what was killed, and wait until everything is ready."""
        for server in self.stack.servers:
            if not server.process.is_running():
                await asyncio.to_thread(server.restart)
        for service in (self.control, *self.workers):
            if not service.process.is_running():
                service.start()
        for service in (self.control, *self.workers):
            await asyncio.to_thread(service.wait_ready)


@dataclass
class Fleet(Workers):
    """Export workers, and what the dataset holds that they export."""

    load: LoadId
    expected: bytes

    async def begun(self, **params: Any) -> TaskId:
        """An export of which a part is committed, and much is not."""
        task_id = await begin_export(self.scene, max_bytes_per_second=SLOWLY, **params)
        await self.scene.when(task_id, lambda task: task.bytes_done > 0)
        return task_id

    async def segmented(self) -> TaskId:
        """A paused export of three segments, with some left to do."""
        task_id = await self.begun()
        for _ in range(2):
            await self.scene.command(task_id, Command.PAUSE)
            before = (await self.scene.until(task_id, TaskState.PAUSED)).bytes_done
            await self.scene.command(task_id, Command.RESUME)
            await self.scene.when(task_id, lambda task, before=before: task.bytes_done > before)  # type: ignore[misc]
        await self.scene.command(task_id, Command.PAUSE)
        await self.scene.until(task_id, TaskState.PAUSED)
        return task_id

    async def orphaned(self, task_id: TaskId) -> tuple[str, str, list[Part]]:
        """Kill all workers; answers the upload that they leave: key, id and committed parts."""
        for worker in self.workers:
            worker.kill()
        ledger = await self.scene.fetch(
            "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1 AND upload_id IS NOT NULL",
            task_id,
        )
        parts = await self.scene.fetch(
            "SELECT part_number, etag, bytes FROM sluice.export_parts WHERE task_id = $1 ORDER BY part_number", task_id
        )
        assert parts, await self.scene.events(task_id)
        return ledger[0]["object_key"], ledger[0]["upload_id"], [Part(*row.values()) for row in parts]

    async def finished(self, task_id: TaskId) -> Task:
        """Wait for success and compare every byte."""
        task = await succeeded(self.scene, task_id)
        assert await content(self.scene, task) == self.expected
        await self.whole()
        return task

    def tap(self) -> Tap:
        """A relay in front of the store."""
        return Tap(urlsplit(self.stack.environment()["SLUICE_S3_ENDPOINT"]).port or 0)

    @asynccontextmanager
    async def behind(self, tap: Tap, **changed: str) -> AsyncIterator[Service]:
        """Only one worker, that reaches the store through `tap`."""
        async with self.instead(1, SLUICE_S3_ENDPOINT=f"http://{tap.address}", **changed) as [worker]:
            yield worker

    @asynccontextmanager
    async def instead(self, count: int, **changed: str) -> AsyncIterator[list[Service]]:
        """Only so many workers, with some settings changed."""
        for worker in self.workers:
            worker.kill()
        workers = self.stack.spawn("export-worker", count, {**ENVIRONMENT, **changed})
        try:
            yield workers
        finally:
            for worker in workers:
                await asyncio.to_thread(worker.terminate)
                self.stack.services.remove(worker)


def held(*, after_epoch: int, more_than: int = -1) -> Callable[[Task], bool]:
    """Whether a worker has it that took it after that epoch, and has committed more than so many bytes; or it ended."""

    def holds(task: Task) -> bool:
        claimed = task.worker is not None and task.epoch > after_epoch
        return task.state is TaskState.SUCCEEDED or (claimed and task.bytes_done > more_than)

    return holds
