"""What a new kind of task implements, and what the runner gives it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.task import Task
from shared.ports.database import Connection
from shared.ports.tasks import Progress


@dataclass(frozen=True, slots=True)
class Batch:
    """The unit of work between two looks at the controls: positions `start` to `end`, and how many bytes it moves."""

    start: int
    end: int
    payload: Any
    bytes: int


class BatchWork(Protocol):
    """One batch's transaction."""

    @property
    def connection(self) -> Connection: ...

    def done(self, what: Range, progress: Progress, cursor: dict[str, Any] | None = None) -> None:
        """Say what the transaction adds; the runner writes the checkpoint and commits both together.

        `cursor` replaces the checkpoint's cursor; None leaves it.
        """
        ...


class Claim(Protocol):
    """A task that this worker holds, at one epoch."""

    @property
    def task(self) -> Task: ...

    @property
    def checkpoint(self) -> Checkpoint: ...

    def batch(self) -> AbstractAsyncContextManager[BatchWork]:
        """A transaction whose rows and checkpoint commit together, or not at all. Raises Fenced."""
        ...

    def hold(self) -> AbstractAsyncContextManager[Connection]:
        """A transaction in which nobody else can take or move the task; for what is no batch. Raises Fenced."""
        ...

    async def go_back(
        self, checkpoint: Checkpoint, lost: Progress, undo: Callable[[Connection], Awaitable[None]]
    ) -> None:
        """Replace the checkpoint by an earlier one and `undo` what it no longer covers, in the same transaction.

        `lost` is what was counted for it. Not while batches run. It is no progress: the attempts are not forgiven.
        Raises Fenced.
        """
        ...

    async def save_plan(
        self,
        plan: dict[str, Any],
        prepare: Callable[[Connection], Awaitable[None]] | None = None,
        *,
        bytes_total: int | None = None,
        rows_total: int | None = None,
    ) -> None:
        """Store what this first claim found out, once, and `prepare` what it needs in the same transaction.

        Raises Fenced.
        """
        ...


class Job(Protocol):
    """A claimed task at work."""

    def batches(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        """What is not done yet, in order. It ends when there is nothing left."""
        ...

    async def run(self, batch: Batch) -> None:
        """Do one batch and commit it through `Claim.batch`. Several run side by side, one a lane."""
        ...

    async def seal(self) -> None:
        """Called before a pause or the end of a slice: leave nothing open outside PostgreSQL. Idempotent."""
        ...

    async def finish(self) -> None:
        """Called once all batches are committed, before `publish`: what needs no transaction. Idempotent."""
        ...

    async def publish(self, connection: Connection) -> dict[str, Any]:
        """Make the result visible, in the transaction that ends the task. Answers the task's result."""
        ...


class TaskKind(Protocol):
    def open(self, claim: Claim) -> AbstractAsyncContextManager[Job]:
        """Plan at the first claim, take up the plan later on."""
        ...

    async def discard(self, task: Task) -> None:
        """Remove what the task left outside PostgreSQL, and whoever still works on it. Idempotent."""
        ...

    async def undo(self, task: Task, connection: Connection) -> None:
        """Remove what it left in PostgreSQL, in the transaction that makes it `aborted`."""
        ...
