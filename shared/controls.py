"""What this process knows of pauses and aborts: quick hints from the broadcast, confirmed by the task's row."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from shared.domain.messages import TaskEvent
from shared.domain.task import Epoch, Event, TaskId, TaskState


class Wanted(Enum):
    GO_ON = "go on"
    PAUSE = "pause at the next batch boundary"
    STOP = "let go at once"


_BY_STATE = {TaskState.RUNNING: Wanted.GO_ON, TaskState.PAUSING: Wanted.PAUSE}
_BY_EVENT = {
    Event.PAUSE_REQUESTED: Wanted.PAUSE,
    Event.PAUSE_WITHDRAWN: Wanted.GO_ON,
    Event.ABORT_REQUESTED: Wanted.STOP,
    Event.EXPIRED: Wanted.STOP,
    Event.LOST: Wanted.STOP,
}


class Signal:
    """What is wanted of one running task, as far as this process has heard."""

    def __init__(self, epoch: Epoch) -> None:
        self.epoch = epoch
        self.wanted = Wanted.GO_ON
        self._interrupted = asyncio.Event()

    def row_says(self, state: TaskState) -> None:
        """The truth: whatever was heard before gives way to it."""
        self._set(_BY_STATE.get(state, Wanted.STOP))

    def heard(self, event: TaskEvent) -> None:
        if event.epoch >= self.epoch and event.type in _BY_EVENT:
            self._set(_BY_EVENT[event.type])

    def _set(self, wanted: Wanted) -> None:
        self.wanted = wanted
        if wanted is Wanted.GO_ON:
            self._interrupted.clear()
        else:
            self._interrupted.set()

    async def interrupted(self, timeout_seconds: float | None = None) -> bool:
        """Wait until something else than going on is wanted; False after the time."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._interrupted.wait()
        except TimeoutError:
            return False
        return True


class Controls:
    """The signals of all tasks that this process runs."""

    def __init__(self) -> None:
        self._signals: dict[TaskId, Signal] = {}

    @contextmanager
    def watch(self, task_id: TaskId, epoch: Epoch) -> Iterator[Signal]:
        signal = self._signals[task_id] = Signal(epoch)
        try:
            yield signal
        finally:
            if self._signals.get(task_id) is signal:
                del self._signals[task_id]

    def heard(self, event: TaskEvent) -> None:
        """A control event from the broadcast: a hint, which the row must confirm before anything is given up."""
        signal = self._signals.get(event.task_id)
        if signal is not None:
            signal.heard(event)
