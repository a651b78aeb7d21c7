"""Guarded transitions of tasks: one UPDATE, its audit row, and what the bus must hear of it, in one transaction."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared.adapters.task_rows import TASK_COLUMNS, task_of
from shared.domain.errors import SluiceError, storable
from shared.domain.messages import BROADCAST_EXCHANGE, COMMANDS_EXCHANGE, EVENTS_EXCHANGE, TaskEvent, hint
from shared.domain.task import EDGES, Epoch, Event, Task, TaskId, TaskState, Trigger
from shared.ports.database import Connection, Database
from shared.ports.outbox import Outbox, Post

_BROADCAST = frozenset({Event.PAUSE_REQUESTED, Event.PAUSE_WITHDRAWN, Event.ABORT_REQUESTED, Event.EXPIRED, Event.LOST})

# $2: {"state": "next state"} for the states that may be left. The other columns follow from the next state alone.
_MOVE = f"""
WITH before AS (
    SELECT task_id, state, claimed_at FROM sluice.tasks
    WHERE task_id = $1 AND $2::jsonb ? state AND ($3::bigint IS NULL OR epoch = $3)
    FOR UPDATE
)
UPDATE sluice.tasks t SET
    state       = $2::jsonb ->> before.state,
    error       = CASE $2::jsonb ->> before.state
                      WHEN 'failed' THEN $4::jsonb WHEN 'queued' THEN $4::jsonb ELSE t.error END,
    result      = coalesce($5::jsonb, t.result),
    bytes_total = CASE $2::jsonb ->> before.state WHEN 'succeeded' THEN t.bytes_done ELSE t.bytes_total END,
    rows_total  = CASE $2::jsonb ->> before.state WHEN 'succeeded' THEN t.rows_done ELSE t.rows_total END,
    attempts    = CASE WHEN $9 OR $2::jsonb ->> before.state = 'aborting' THEN 0 ELSE t.attempts END,
    worker      = CASE WHEN $2::jsonb ->> before.state IN ('running', 'pausing') THEN t.worker END,
    lease_until = CASE WHEN $2::jsonb ->> before.state IN ('running', 'pausing') THEN t.lease_until END,
    claimed_at  = CASE WHEN $2::jsonb ->> before.state IN ('running', 'pausing') THEN t.claimed_at END,
    running_seconds = t.running_seconds
        + CASE WHEN $2::jsonb ->> before.state NOT IN ('running', 'pausing') AND before.claimed_at IS NOT NULL
               THEN extract(epoch FROM clock_timestamp() - before.claimed_at) ELSE 0 END,
    not_before  = CASE $2::jsonb ->> before.state
                      WHEN 'queued' THEN greatest(t.not_before, now() + make_interval(secs => $6))
                      ELSE t.not_before END,
    announced_at = CASE $2::jsonb ->> before.state
                      WHEN 'queued' THEN greatest(t.not_before, now() + make_interval(secs => $6))
                      WHEN 'aborting' THEN now() ELSE t.announced_at END,
    -- Who pauses says until when; reaching the pause keeps it; anything else ends it.
    resume_at   = CASE WHEN $2::jsonb ->> before.state IN ('pausing', 'paused')
                      THEN CASE WHEN $10 THEN $11 ELSE t.resume_at END END,
    expires_at  = CASE $2::jsonb ->> before.state
                      WHEN 'paused' THEN greatest(now(), CASE WHEN $10 THEN $11 ELSE t.resume_at END)
                                         + make_interval(secs => $7)
                      WHEN 'failed' THEN now() + make_interval(secs => $8) END,
    ended_at    = CASE WHEN $2::jsonb ->> before.state IN ('succeeded', 'failed', 'aborted') THEN now() END,
    updated_at  = now()
FROM before WHERE t.task_id = before.task_id
RETURNING {TASK_COLUMNS}, before.state AS previous
"""  # noqa: S608

_LOG_EVENT = """
INSERT INTO sluice.task_events (task_id, event, from_state, to_state, epoch, actor, reason)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""

REASON_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """Times in seconds; `max_attempts` claims without a committed batch."""

    lease_seconds: float
    max_attempts: int
    paused_expiry_seconds: float
    failed_expiry_seconds: float


class Transitions:
    """What every part of the store moves tasks with."""

    def __init__(self, database: Database, outbox: Outbox, policy: StorePolicy) -> None:
        self._database = database
        self._outbox = outbox
        self._policy = policy

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
        async with self._outbox.transaction(self._database) as (connection, post):
            return await self._move(
                connection,
                post,
                task_id,
                trigger,
                actor=actor,
                reason=reason,
                epoch=epoch,
                error=error,
                delay_seconds=delay_seconds,
            )

    async def _moved(
        self, connection: Connection, post: Post, task_id: TaskId, trigger: Trigger, actor: str, reason: str
    ) -> Task:
        task = await self._move(connection, post, task_id, trigger, actor=actor, reason=reason)
        assert task is not None, "the row is locked: the guard holds"
        return task

    async def _move(
        self,
        connection: Connection,
        post: Post,
        task_id: TaskId,
        trigger: Trigger,
        *,
        actor: str,
        reason: str | None = None,
        epoch: Epoch | None = None,
        error: SluiceError | None = None,
        result: dict[str, Any] | None = None,
        delay_seconds: float = 0.0,
        resume_at: datetime | None = None,
        quietly: bool = False,
    ) -> Task | None:
        edges = EDGES[trigger]
        row = await connection.fetchrow(
            _MOVE,
            task_id,
            {source: edge.target for source, edge in edges.items()},
            epoch,
            error.as_json() if error else None,
            result,
            delay_seconds,
            self._policy.paused_expiry_seconds,
            self._policy.failed_expiry_seconds,
            trigger is Trigger.RESUME,
            trigger is Trigger.PAUSE,
            resume_at,
        )
        if row is None:
            return None
        task = task_of(row)
        event = edges[TaskState(row["previous"])].event
        reason = reason or (error.detail if error else None)
        await self._tell(connection, post, task, row["previous"], event, actor, reason, quietly=quietly)
        return task

    async def _tell(
        self,
        connection: Connection,
        post: Post,
        task: Task,
        previous: str | None,
        event: Event,
        actor: str,
        reason: str | None,
        *,
        quietly: bool = False,
    ) -> None:
        """The audit row, and what the bus must hear. `quietly`: no hint, because the teller goes on with the task."""
        reason = None if reason is None else storable(reason, REASON_CHARACTERS)
        await connection.execute(_LOG_EVENT, task.task_id, event, previous, task.state, task.epoch, actor, reason)
        told = TaskEvent(
            type=event,
            task_id=task.task_id,
            account_id=task.account_id,
            kind=task.kind,
            state=task.state,
            previous=TaskState(previous) if previous else None,
            epoch=task.epoch,
            actor=actor,
            reason=reason,
        )
        wanted = None if quietly else hint(task)
        if wanted is not None:
            # A start time or a back-off holds up work, never a rollback.
            due_at = task.not_before if task.state is TaskState.QUEUED else None
            await post(COMMANDS_EXCHANGE, wanted[0], wanted[1], due_at)
        if event in _BROADCAST:
            await post(BROADCAST_EXCHANGE, "", told, None)
        await post(EVENTS_EXCHANGE, told.routing_key, told, None)
