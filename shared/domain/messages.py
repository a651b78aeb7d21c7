"""The contracts of the bus: commands that ask, events that tell, and where each of them goes."""

from datetime import UTC, datetime
from typing import Annotated, Literal, TypeVar
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.domain.errors import InvalidMessage
from shared.domain.task import BIGINT_MAX, AccountId, Command, Epoch, Event, Kind, Task, TaskId, TaskState

COMMANDS_EXCHANGE = "sluice.commands"
BROADCAST_EXCHANGE = "sluice.broadcast"
EVENTS_EXCHANGE = "sluice.events"
DEAD_QUEUE = "sluice.dead"
CONTROL_QUEUE = "sluice.control"
IMPORT_QUEUE = "sluice.import"
EXPORT_QUEUE = "sluice.export"

WORK_QUEUES: dict[Kind, str] = {
    Kind.IMPORT: IMPORT_QUEUE,
    Kind.PROCESS: IMPORT_QUEUE,
    Kind.EXPORT: EXPORT_QUEUE,
    Kind.ARCHIVE: EXPORT_QUEUE,
}


def rollback_queue(queue: str) -> str:
    """The queue for aborting tasks beside a work queue, so that rollbacks never wait behind long work."""
    return f"{queue}.rollback"


class Message(BaseModel):
    """What all messages share. Unknown fields are refused: a typing error must not look like a wish."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    message_id: UUID = Field(default_factory=uuid4)
    sent_at: datetime = Field(default_factory=lambda: datetime.now(UTC))


_EPOCH = (
    "the task's epoch when this was sent: whenever the message comes back, its consumer is gone, and the task may be "
    "taken from one claim more that followed, but from no later one"
)


# What no column could hold must not get as far as PostgreSQL: its refusal would look like a fault of ours.
_Id = Field(ge=1, le=BIGINT_MAX)
_EpochField = Field(ge=0, lt=BIGINT_MAX, description=_EPOCH)
_Text = Annotated[str, Field(pattern=r"^[^\x00]*$")]


class RunTask(Message):
    """Look at this task: it may be waiting for a worker."""

    type: Literal["RunTask"] = "RunTask"
    task_id: Annotated[TaskId, _Id]
    epoch: Annotated[Epoch, _EpochField] | None = None


class RollBackTask(Message):
    """Look at this task: it may be waiting to be rolled back."""

    type: Literal["RollBackTask"] = "RollBackTask"
    task_id: Annotated[TaskId, _Id]
    epoch: Annotated[Epoch, _EpochField] | None = None


class ControlCommand(Message):
    """What the three commands share."""

    task_id: Annotated[TaskId, _Id]
    account_id: Annotated[AccountId, _Id] | None = Field(default=None, description="if given, it must own the task")
    actor: _Text = Field(default="operator", max_length=200, description="who asks, for the audit trail")
    reason: _Text | None = Field(default=None, max_length=1000)


class PauseTask(ControlCommand):
    """Stop at the next batch boundary and hold nothing until resumed."""

    type: Literal["PauseTask"] = "PauseTask"


class ResumeTask(ControlCommand):
    """Go on from the checkpoint."""

    type: Literal["ResumeTask"] = "ResumeTask"


class AbortTask(ControlCommand):
    """Undo everything, as if the task had never run."""

    type: Literal["AbortTask"] = "AbortTask"


CONTROL_COMMANDS: dict[Command, type[ControlCommand]] = {
    Command.PAUSE: PauseTask,
    Command.RESUME: ResumeTask,
    Command.ABORT: AbortTask,
}


class CommandReply(Message):
    """The answer to a control command, from the truth: `status` is an HTTP status, 404 if there is no such task."""

    type: Literal["CommandReply"] = "CommandReply"
    task_id: TaskId
    status: int
    state: TaskState | None
    allowed: list[Command] = []


class TaskEvent(Message):
    """Something happened to a task. Published to the events exchange as `task.<kind>.<event>`, and, when it answers
    a control command, to the broadcast exchange for the workers.
    """

    type: Event
    task_id: TaskId
    account_id: AccountId
    kind: Kind
    state: TaskState
    previous: TaskState | None
    epoch: int
    actor: str
    reason: str | None = None

    @property
    def routing_key(self) -> str:
        return f"task.{self.kind}.{self.type.routing_word}"


WorkMessage = RunTask | RollBackTask

_CONTRACTS: dict[str, type[Message]] = {
    **{m.__name__: m for m in (RunTask, RollBackTask, PauseTask, ResumeTask, AbortTask, CommandReply)},
    **dict.fromkeys(Event, TaskEvent),
}


class _Envelope(BaseModel):
    type: str


M = TypeVar("M", bound=Message)


def decode(body: bytes, *expected: type[M]) -> M:
    """The message in `body`.

    Raises InvalidMessage, with the faults named, when it is not JSON, fits no contract, or is none of `expected`.
    """
    try:
        contract = _CONTRACTS.get(_Envelope.model_validate_json(body).type)
        if contract is None or not issubclass(contract, expected):
            names = ", ".join(m.__name__ for m in expected)
            raise InvalidMessage(f"unknown or misplaced type of message; this queue takes {names}")
        return contract.model_validate_json(body)
    except ValidationError as error:
        # The sender chose the names of unknown fields, and the reason becomes a header of the dead letter: shortened.
        faults = [f"{'.'.join(map(str, e['loc']))[:80] or 'body'}: {e['msg'][:200]}" for e in error.errors()[:5]]
        raise InvalidMessage(f"not a valid message: {'; '.join(faults)}") from error


def hint(task: Task) -> tuple[str, Message] | None:
    """Which queue must hear of `task` in its state, and what: the one place that turns states into hints."""
    queue = WORK_QUEUES.get(task.kind)
    if queue is None:
        return None
    if task.state is TaskState.QUEUED:
        return queue, RunTask(task_id=task.task_id, epoch=task.epoch)
    if task.state is TaskState.ABORTING:
        return rollback_queue(queue), RollBackTask(task_id=task.task_id, epoch=task.epoch)
    return None
