"""The state machine of a task: its states, its edges, and what each command answers. Pure data, kept once."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Any, NewType

from shared.domain.schedule import RunWindow

AccountId = NewType("AccountId", int)
TaskId = NewType("TaskId", int)
FileId = NewType("FileId", int)
DatasetId = NewType("DatasetId", int)
LoadId = NewType("LoadId", int)
Epoch = NewType("Epoch", int)


# The largest number that a bigint column holds, and so any id.
BIGINT_MAX = 2**63 - 1


class Kind(StrEnum):
    UPLOAD = "upload"
    IMPORT = "import"
    EXPORT = "export"
    ARCHIVE = "archive"
    PROCESS = "process"


class TaskState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    ABORTING = "aborting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    ABORTED = "aborted"


ENDED = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.ABORTED})
# States in which nothing moves until somebody asks.
SETTLED = ENDED | {TaskState.PAUSED}
# States in which a worker holds the task and may commit batches.
CLAIMED = frozenset({TaskState.RUNNING, TaskState.PAUSING})


class Command(StrEnum):
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"


class Trigger(StrEnum):
    """Why a task moves. The three commands, and what workers and the control service notice."""

    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    CLAIM = "claim"
    YIELD = "yield"
    LOSE = "lose"
    REACH_PAUSE = "reach_pause"
    SUCCEED = "succeed"
    FAIL = "fail"
    EXPIRE = "expire"
    ROLL_BACK = "roll_back"


class Event(StrEnum):
    """What happened, past tense; the last word of its routing key on the events exchange is `routing_word`."""

    QUEUED = "TaskQueued"
    STARTED = "TaskStarted"
    YIELDED = "TaskYielded"
    LOST = "TaskLost"
    PAUSE_REQUESTED = "TaskPauseRequested"
    PAUSED = "TaskPaused"
    PAUSE_WITHDRAWN = "TaskPauseWithdrawn"
    RESUMED = "TaskResumed"
    SUCCEEDED = "TaskSucceeded"
    FAILED = "TaskFailed"
    ABORT_REQUESTED = "TaskAbortRequested"
    EXPIRED = "TaskExpired"
    ABORTED = "TaskAborted"

    @property
    def routing_word(self) -> str:
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in self.value.removeprefix("Task"))
        return words.lstrip("_")


@dataclass(frozen=True, slots=True)
class Edge:
    source: TaskState
    target: TaskState
    trigger: Trigger
    event: Event


_S = TaskState
_T = Trigger
_E = Event

TRANSITIONS: tuple[Edge, ...] = (
    # queued -> running when a worker claims the task
    Edge(_S.QUEUED, _S.RUNNING, _T.CLAIM, _E.STARTED),
    # running -> queued when its slice is over, its worker shuts down, or a passing fault asks for a later attempt
    Edge(_S.RUNNING, _S.QUEUED, _T.YIELD, _E.YIELDED),
    # running -> queued when the worker's lease is lost
    Edge(_S.RUNNING, _S.QUEUED, _T.LOSE, _E.LOST),
    # pausing -> paused when the worker's lease is lost before it reached a batch boundary
    Edge(_S.PAUSING, _S.PAUSED, _T.LOSE, _E.PAUSED),
    # running -> pausing when the task is paused
    Edge(_S.RUNNING, _S.PAUSING, _T.PAUSE, _E.PAUSE_REQUESTED),
    # queued -> paused when the task is paused before a worker has it
    Edge(_S.QUEUED, _S.PAUSED, _T.PAUSE, _E.PAUSED),
    # pausing -> paused when the worker has reached a batch boundary
    Edge(_S.PAUSING, _S.PAUSED, _T.REACH_PAUSE, _E.PAUSED),
    # pausing -> running when a resume withdraws the pause
    Edge(_S.PAUSING, _S.RUNNING, _T.RESUME, _E.PAUSE_WITHDRAWN),
    # paused -> queued when the task is resumed
    Edge(_S.PAUSED, _S.QUEUED, _T.RESUME, _E.RESUMED),
    # failed -> queued when the task is resumed: it goes on from its checkpoint
    Edge(_S.FAILED, _S.QUEUED, _T.RESUME, _E.RESUMED),
    # running -> succeeded when the last batch is done; the same transaction publishes the result
    Edge(_S.RUNNING, _S.SUCCEEDED, _T.SUCCEED, _E.SUCCEEDED),
    # pausing -> succeeded when the last batch was done before the pause was reached
    Edge(_S.PAUSING, _S.SUCCEEDED, _T.SUCCEED, _E.SUCCEEDED),
    # running -> failed on a permanent error, or when attempts without progress are used up
    Edge(_S.RUNNING, _S.FAILED, _T.FAIL, _E.FAILED),
    # pausing -> failed on a permanent error on the way to the batch boundary
    Edge(_S.PAUSING, _S.FAILED, _T.FAIL, _E.FAILED),
    # queued -> aborting when the task is aborted before a worker has it
    Edge(_S.QUEUED, _S.ABORTING, _T.ABORT, _E.ABORT_REQUESTED),
    # running -> aborting when the task is aborted
    Edge(_S.RUNNING, _S.ABORTING, _T.ABORT, _E.ABORT_REQUESTED),
    # pausing -> aborting when the task is aborted on its way to the pause
    Edge(_S.PAUSING, _S.ABORTING, _T.ABORT, _E.ABORT_REQUESTED),
    # paused -> aborting when the task is aborted
    Edge(_S.PAUSED, _S.ABORTING, _T.ABORT, _E.ABORT_REQUESTED),
    # failed -> aborting when the user clears away what the failed task left
    Edge(_S.FAILED, _S.ABORTING, _T.ABORT, _E.ABORT_REQUESTED),
    # paused -> aborting when it stayed paused until it expired
    Edge(_S.PAUSED, _S.ABORTING, _T.EXPIRE, _E.EXPIRED),
    # failed -> aborting when nobody resumed it until it expired
    Edge(_S.FAILED, _S.ABORTING, _T.EXPIRE, _E.EXPIRED),
    # aborting -> aborted when the rollback is done
    Edge(_S.ABORTING, _S.ABORTED, _T.ROLL_BACK, _E.ABORTED),
)

EDGES: dict[Trigger, dict[TaskState, Edge]] = {
    trigger: {edge.source: edge for edge in TRANSITIONS if edge.trigger is trigger} for trigger in Trigger
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answers: the HTTP status and the state the task is in afterwards."""

    status: HTTPStatus
    state: TaskState

    @property
    def accepted(self) -> bool:
        return self.status is not HTTPStatus.CONFLICT


def answer(state: TaskState, command: Command) -> Answer:
    """What `command` answers to a task in `state`.

    A move that is complete answers 200, one that others must still carry out 202, a wish that is already fulfilled
    the same without a move, and one that cannot be fulfilled any more 409.
    """
    edge = EDGES[Trigger(command)].get(state)
    if edge is not None:
        done_at_once = edge.target in (TaskState.PAUSED, TaskState.RUNNING)
        return Answer(HTTPStatus.OK if done_at_once else HTTPStatus.ACCEPTED, edge.target)
    match command, state:
        case Command.PAUSE, TaskState.PAUSED:
            return Answer(HTTPStatus.OK, state)
        case Command.PAUSE, TaskState.PAUSING:
            return Answer(HTTPStatus.ACCEPTED, state)
        case Command.RESUME, TaskState.QUEUED | TaskState.RUNNING:
            return Answer(HTTPStatus.OK, state)
        case Command.ABORT, TaskState.ABORTING:
            return Answer(HTTPStatus.ACCEPTED, state)
        case Command.ABORT, TaskState.ABORTED:
            return Answer(HTTPStatus.OK, state)
    return Answer(HTTPStatus.CONFLICT, state)


def allowed_commands(state: TaskState) -> list[Command]:
    """The commands that would change something or are already fulfilled: those not answered with 409."""
    return [command for command in Command if answer(state, command).accepted]


@dataclass(frozen=True, slots=True)
class Task:
    """One row of `sluice.tasks`. Times are aware; `bytes_*` are bytes, `rows_*` rows."""

    task_id: TaskId
    account_id: AccountId
    kind: Kind
    state: TaskState
    epoch: Epoch
    params: dict[str, Any]
    plan: dict[str, Any] | None
    checkpoint: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    attempts: int
    claims: int
    bytes_done: int
    bytes_total: int | None
    rows_done: int
    rows_total: int | None
    rejects: int
    max_bytes_per_second: int | None
    worker: str | None
    lease_until: datetime | None
    claimed_at: datetime | None
    running_seconds: float
    not_before: datetime | None
    run_window: RunWindow | None
    resume_at: datetime | None
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    expires_at: datetime | None
