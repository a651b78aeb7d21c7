"""Waiting for a task to move: woken by its events, with a look each second in case one was lost."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress

from shared.domain.messages import TaskEvent
from shared.domain.task import AccountId, Task, TaskId
from shared.ports.tasks import TaskStore

LOOK_SECONDS = 1.0


class TaskWatch:
    def __init__(self, tasks: TaskStore) -> None:
        self._tasks = tasks
        self._waiting: defaultdict[int, set[asyncio.Event]] = defaultdict(set)
        self._closing = False

    async def on_event(self, event: TaskEvent) -> None:
        for waiting in self._waiting.get(event.task_id, ()):
            waiting.set()

    def close(self) -> None:
        """Let everybody go who waits: the process ends."""
        self._closing = True
        for group in self._waiting.values():
            for waiting in group:
                waiting.set()

    async def wait(
        self,
        task_id: TaskId,
        account_id: AccountId,
        *,
        seconds: float,
        done: Callable[[Task], bool],
        given_up: Callable[[], bool],
    ) -> Task | None:
        """The task as soon as it is `done`, or as it is after `seconds`, or when nobody waits any more."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        moved = asyncio.Event()
        self._waiting[task_id].add(moved)
        try:
            while True:
                moved.clear()  # before the look: what happens after it is not missed
                task = await self._tasks.get(task_id, account_id)
                left = deadline - loop.time()
                if task is None or done(task) or left <= 0 or self._closing or given_up():
                    return task
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, LOOK_SECONDS)):
                        await moved.wait()
        finally:
            self._waiting[task_id].discard(moved)
            if not self._waiting[task_id]:
                del self._waiting[task_id]
