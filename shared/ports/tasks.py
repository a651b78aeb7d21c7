"""What the rest of Sluice needs of the store of tasks: creation, guarded transitions, claims and checkpoints."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from shared.domain.checkpoint import Checkpoint
from shared.domain.errors import SluiceError
from shared.domain.schedule import RunWindow
from shared.domain.task import AccountId, Command, Epoch, Kind, Task, TaskId, TaskState, Trigger
from shared.ports.database import Connection


@dataclass(frozen=True, slots=True)
class NewTask:
    account_id: AccountId
    kind: Kind
    params: dict[str, Any]
    bytes_total: int | None = None
    max_bytes_per_second: int | None = None
    idempotency_key: str | None = None
    request_hash: bytes | None = None
    not_before: datetime | None = None
    run_window: RunWindow | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What one batch adds. `bytes_total` and `rows_total` replace what was known, where they are given."""

    bytes: int
    rows: int
    rejects: int = 0
    bytes_total: int | None = None
    rows_total: int | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What the row says at a look at the controls."""

    state: TaskState
    max_bytes_per_second: int | None


class TaskStore(Protocol):
    async def create(self, new: NewTask, *, actor: str) -> tuple[Task, bool]:
        """The task and True; or the earlier task with the same idempotency key and False.

        Raises Conflict when that key was used with another request.
        """
        ...

    async def get(self, task_id: TaskId, account_id: AccountId | None = None) -> Task | None: ...

    async def claim(self, task_id: TaskId, worker: str, *, steal_from: Epoch | None = None) -> Task | None:
        """Make this worker the task's only writer: epoch + 1 and a lease.

        A task that another worker holds is taken only when its lease has ended, or when its claim is the one that
        followed the epoch `steal_from`: its message has come back, so that worker is gone. None when there is nothing
        to do: ended, paused, held by another, or not yet due. A task whose attempts are used up is failed
        with NoProgress, and None is the answer.
        """
        ...

    async def claim_rollback(self, task_id: TaskId, worker: str, *, steal_from: Epoch | None = None) -> Task | None:
        """The same for a task that is `aborting`."""
        ...

    async def put_off_rollback(self, task_id: TaskId, epoch: Epoch, *, delay_seconds: float) -> None:
        """Give a claimed rollback back, for any worker to take it later. Nothing happens when another has it by now."""
        ...

    async def heartbeat(self, task_id: TaskId, epoch: Epoch) -> Standing:
        """Extend the lease and look at the controls. Raises Fenced."""
        ...

    async def hold(
        self, connection: Connection, task_id: TaskId, epoch: Epoch, *, saw: Checkpoint | None = None
    ) -> Standing:
        """Lock the row for the rest of the transaction. Raises Fenced, and CheckpointLost when it is not as `saw`."""
        ...

    async def go_back(
        self, connection: Connection, task_id: TaskId, epoch: Epoch, checkpoint: Checkpoint, lost: Progress
    ) -> Standing:
        """Write an earlier checkpoint and take `lost` off what is counted. Raises Fenced."""
        ...

    async def save_plan(
        self,
        task_id: TaskId,
        epoch: Epoch,
        plan: dict[str, Any],
        prepare: Callable[[Connection], Awaitable[None]] | None = None,
        *,
        bytes_total: int | None = None,
        rows_total: int | None = None,
    ) -> None:
        """Store what the first claim found out, and `prepare` in the same transaction. Raises Fenced."""
        ...

    async def commit_batch(
        self,
        connection: Connection,
        task_id: TaskId,
        epoch: Epoch,
        checkpoint: Checkpoint,
        progress: Progress,
        *,
        saw: Checkpoint | None = None,
    ) -> Standing:
        """Write the checkpoint inside the batch's transaction. `saw` is the one that it builds on.

        Raises Fenced, or CheckpointLost when PostgreSQL has another one than `saw`: then nothing of the batch may
        commit.
        """
        ...

    async def move(
        self,
        task_id: TaskId,
        trigger: Trigger,
        *,
        actor: str,
        reason: str | None = None,
        epoch: Epoch | None = None,
        error: SluiceError | None = None,
        delay_seconds: float = 0.0,
    ) -> Task | None:
        """One guarded transition, with its audit row and what the bus must hear of it. None: the guard did not hold."""
        ...

    async def command(
        self,
        task_id: TaskId,
        command: Command,
        *,
        account_id: AccountId | None,
        actor: str,
        reason: str | None,
        message_id: UUID | None = None,
    ) -> tuple[TaskState, TaskState] | None:
        """Apply a user's command: the state before and after, the same where nothing moved. None: no such task.

        The same message again moves nothing: the state before it was applied, and the one of now.
        """
        ...

    async def succeed(
        self,
        task_id: TaskId,
        epoch: Epoch,
        publish: Callable[[Connection], Awaitable[dict[str, Any]]],
        *,
        actor: str,
        saw: Checkpoint | None = None,
    ) -> Task | None:
        """Publish the result and end the task in one transaction. None: fenced or aborted, and nothing is published.

        Raises CheckpointLost when the row's checkpoint is not as `saw`.
        """
        ...

    async def rolled_back(
        self, task_id: TaskId, epoch: Epoch, undo: Callable[[Connection], Awaitable[None]], *, actor: str
    ) -> Task | None:
        """Undo and end the task in one transaction. None: another worker has it."""
        ...

    async def lose_expired(self, *, actor: str) -> list[Task]:
        """Take tasks from workers whose lease has ended: back to the queue, or to the pause they were on the way to."""
        ...

    async def expire_due(self, *, actor: str) -> list[Task]:
        """Abort what stayed paused or failed beyond its time."""
        ...

    async def keep_windows(self, *, actor: str) -> list[Task]:
        """Pause what runs outside its window, until that opens, and resume what was paused so."""
        ...

    async def announce_overdue(self, *, older_than_seconds: float, queues: set[str]) -> list[Task]:
        """Tell the bus again of tasks that wait although `queues`, which should hold their hints, are empty."""
        ...
