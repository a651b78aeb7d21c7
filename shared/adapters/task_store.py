"""Tasks in PostgreSQL: guarded transitions, claims, leases and checkpoints.

Considerations
- Every transition is one guarded UPDATE that names the states it may leave; whoever comes second changes nothing.
  In the same transaction it writes its audit row and its outbox rows, so that nothing happens without being told.
- Claims raise the epoch. Whoever holds an older one is fenced: its batches roll back with their rows.
- A batch commits with `synchronous_commit` off (see the runner): a crash of the server itself may lose the last
  batches, but rows and checkpoint together. Transitions commit synchronously, and with that all before them. A worker
  that lived on must not build on batches that the server forgot: what it commits names the checkpoint that it `saw`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from shared.domain.checkpoint import Checkpoint
from shared.domain.errors import CheckpointLost, Conflict, Fenced, InternalFault, NoProgress, SluiceError, storable
from shared.domain.messages import (
    BROADCAST_EXCHANGE,
    COMMANDS_EXCHANGE,
    EVENTS_EXCHANGE,
    WORK_QUEUES,
    TaskEvent,
    hint,
    rollback_queue,
)
from shared.domain.schedule import RunWindow
from shared.domain.task import (
    EDGES,
    AccountId,
    Command,
    Epoch,
    Event,
    Kind,
    Task,
    TaskId,
    TaskState,
    Trigger,
    answer,
)
from shared.ports.database import Connection, Database
from shared.ports.outbox import Outbox, Post
from shared.ports.tasks import NewTask, Progress, Standing

_BROADCAST = frozenset({Event.PAUSE_REQUESTED, Event.PAUSE_WITHDRAWN, Event.ABORT_REQUESTED, Event.EXPIRED, Event.LOST})
_COLUMNS = ", ".join(f"t.{f.name}" for f in fields(Task))

_CREATE = f"""
INSERT INTO sluice.tasks AS t (account_id, kind, state, params, bytes_total, max_bytes_per_second, idempotency_key,
                               request_hash, not_before, run_window, announced_at)
VALUES ($1, $2, 'queued', $3, $4, $5, $6, $7, $8, $9, greatest(now(), $8))
ON CONFLICT (account_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING {_COLUMNS}
"""  # noqa: S608 - the columns are the fields of Task

_EARLIER = f"""
SELECT {_COLUMNS}, t.request_hash FROM sluice.tasks t WHERE account_id = $1 AND idempotency_key = $2
"""  # noqa: S608

_GET = f"""
SELECT {_COLUMNS} FROM sluice.tasks t WHERE task_id = $1 AND ($2::bigint IS NULL OR account_id = $2)
"""  # noqa: S608

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
RETURNING {_COLUMNS}, before.state AS previous
"""  # noqa: S608

# The claim of a task that is waiting and due. `attempts` counts claims since the last committed batch or plan.
_CLAIM = f"""
WITH before AS (
    SELECT task_id, state FROM sluice.tasks
    WHERE task_id = $1 AND state = 'queued' AND (not_before IS NULL OR not_before <= now())
    FOR UPDATE
)
UPDATE sluice.tasks t SET state = 'running', epoch = t.epoch + 1, attempts = t.attempts + 1, claims = t.claims + 1,
    worker = $2, lease_until = now() + make_interval(secs => $3), claimed_at = clock_timestamp(),
    started_at = coalesce(t.started_at, now()), not_before = NULL, updated_at = now()
FROM before WHERE t.task_id = before.task_id
RETURNING {_COLUMNS}, before.state AS previous
"""  # noqa: S608

_IS_LOST = """
SELECT true FROM sluice.tasks
WHERE task_id = $1 AND state IN ('running', 'pausing') AND (epoch <= $2::bigint + 1 OR lease_until < now())
FOR UPDATE
"""

_CLAIM_ROLLBACK = f"""
UPDATE sluice.tasks t SET epoch = t.epoch + 1, attempts = t.attempts + 1, worker = $2,
    lease_until = now() + make_interval(secs => $3), updated_at = now()
WHERE task_id = $1 AND state = 'aborting' AND (lease_until IS NULL OR lease_until < now() OR epoch <= $4::bigint + 1)
RETURNING {_COLUMNS}
"""  # noqa: S608

# Until its end the lease is nobody's, and keeps everybody from the next attempt.
_PUT_OFF = f"""
UPDATE sluice.tasks t SET worker = NULL, lease_until = now() + make_interval(secs => $3),
    announced_at = now() + make_interval(secs => $3), updated_at = now()
WHERE task_id = $1 AND epoch = $2 AND state = 'aborting'
RETURNING {_COLUMNS}
"""  # noqa: S608

# An aborting task without a lease is only looked at: a lease would keep whoever rolls it back waiting.
_HEARTBEAT = """
UPDATE sluice.tasks SET updated_at = now(),
    lease_until = CASE WHEN state <> 'aborting' OR lease_until IS NOT NULL THEN now() + make_interval(secs => $3) END
WHERE task_id = $1 AND epoch = $2 AND state IN ('running', 'pausing', 'aborting')
RETURNING state, max_bytes_per_second
"""

_HOLD = """
SELECT state, max_bytes_per_second, coalesce(checkpoint -> 'done', '[]') AS done FROM sluice.tasks
WHERE task_id = $1 AND epoch = $2 AND state IN ('running', 'pausing') FOR NO KEY UPDATE
"""

_GO_BACK = """
UPDATE sluice.tasks SET checkpoint = $3, bytes_done = bytes_done - $4, rows_done = rows_done - $5, updated_at = now()
WHERE task_id = $1 AND epoch = $2 AND state IN ('running', 'pausing')
RETURNING state, max_bytes_per_second
"""

_SAVE_PLAN = """
UPDATE sluice.tasks SET plan = $3, bytes_total = coalesce($4, bytes_total), rows_total = coalesce($5, rows_total),
    attempts = 0, updated_at = now()
WHERE task_id = $1 AND epoch = $2 AND state IN ('running', 'pausing')
RETURNING true
"""

# From here to its COMMIT a worker locks the row: one that hangs in between must not do so beyond its lease.
_COMMIT_BATCH = """
UPDATE sluice.tasks SET checkpoint = $3, bytes_done = bytes_done + $4, rows_done = rows_done + $5,
    rejects = rejects + $6, bytes_total = coalesce($7, bytes_total), rows_total = coalesce($8, rows_total),
    attempts = 0, lease_until = now() + make_interval(secs => $9), updated_at = now()
WHERE task_id = $1 AND epoch = $2 AND state IN ('running', 'pausing')
    AND ($10::jsonb IS NULL OR coalesce(checkpoint -> 'done', '[]') = $10)
RETURNING state, max_bytes_per_second,
    set_config('idle_in_transaction_session_timeout', ceil($9::float8 * 1000)::bigint || 'ms', true)
"""

_LEASE_ENDED = """
SELECT task_id FROM sluice.tasks WHERE state IN ('running', 'pausing') AND lease_until < now()
ORDER BY task_id LIMIT 100 FOR UPDATE SKIP LOCKED
"""

_EXPIRED = """
SELECT task_id FROM sluice.tasks WHERE state IN ('paused', 'failed') AND expires_at < now()
ORDER BY task_id LIMIT 100 FOR UPDATE SKIP LOCKED
"""

# A task that waits for its start, or for the end of a back-off, is left alone: its window is looked at when it is due.
_WINDOWED = f"""
SELECT {_COLUMNS} FROM sluice.tasks t
WHERE task_id > $1 AND run_window IS NOT NULL
  AND (state = 'running' OR state = 'queued' AND (not_before IS NULL OR not_before <= now())
       OR state = 'paused' AND resume_at <= now())
ORDER BY task_id LIMIT 100 FOR UPDATE SKIP LOCKED
"""  # noqa: S608

_ANNOUNCE = f"""
WITH overdue AS (
    SELECT task_id FROM sluice.tasks
    WHERE announced_at < now() - make_interval(secs => $1)
      AND (state = 'queued' AND kind = ANY($2) AND (not_before IS NULL OR not_before <= now())
           OR state = 'aborting' AND kind = ANY($3) AND (lease_until IS NULL OR lease_until < now()))
    ORDER BY task_id LIMIT 100 FOR UPDATE SKIP LOCKED
)
UPDATE sluice.tasks t SET announced_at = now() FROM overdue WHERE t.task_id = overdue.task_id RETURNING {_COLUMNS}
"""  # noqa: S608

_NOTE_COMMAND = """
WITH forgotten AS (
    DELETE FROM sluice.applied_commands WHERE (task_id, message_id, command) IN (
        SELECT task_id, message_id, command FROM sluice.applied_commands
        WHERE applied_at < now() - interval '1 day' LIMIT 100 FOR UPDATE SKIP LOCKED)
)
INSERT INTO sluice.applied_commands (task_id, message_id, command, state_before) VALUES ($1, $2, $3, $4)
ON CONFLICT DO NOTHING RETURNING true
"""

_NOTED = """
SELECT state_before FROM sluice.applied_commands WHERE task_id = $1 AND message_id = $2 AND command = $3
"""

_LOG_EVENT = """
INSERT INTO sluice.task_events (task_id, event, from_state, to_state, epoch, actor, reason)
VALUES ($1, $2, $3, $4, $5, $6, $7)
"""


# How many times more attempts a task has that ended them with a passing fault; with back-offs of a minute, hours.
OUTAGE_PATIENCE = 20
REASON_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class StorePolicy:
    """Times in seconds; `max_attempts` claims without a committed batch."""

    lease_seconds: float
    max_attempts: int
    paused_expiry_seconds: float
    failed_expiry_seconds: float


def _task(row: Mapping[str, Any]) -> Task:
    values = {f.name: row[f.name] for f in fields(Task)}
    window = values["run_window"]
    return Task(
        **{
            **values,
            "kind": Kind(values["kind"]),
            "state": TaskState(values["state"]),
            "run_window": RunWindow.model_validate(window) if window else None,
        }
    )


class PgTaskStore:
    """The `TaskStore` port on PostgreSQL."""

    def __init__(self, database: Database, outbox: Outbox, policy: StorePolicy) -> None:
        self._database = database
        self._outbox = outbox
        self._policy = policy

    async def create(self, new: NewTask, *, actor: str) -> tuple[Task, bool]:
        now = datetime.now(UTC)
        not_before, reason = new.not_before, None
        start = max(now, new.not_before or now)
        if new.run_window is not None and not new.run_window.is_open(start):
            not_before, reason = new.run_window.next_open(start), f"outside its run window: {new.run_window}"
        async with self._outbox.transaction(self._database) as (connection, post):
            row = await connection.fetchrow(
                _CREATE,
                new.account_id,
                new.kind,
                new.params,
                new.bytes_total,
                new.max_bytes_per_second,
                new.idempotency_key,
                new.request_hash,
                not_before,
                new.run_window.model_dump(by_alias=True) if new.run_window else None,
            )
            if row is not None:
                task = _task(row)
                await self._tell(connection, post, task, None, Event.QUEUED, actor, reason)
                return task, True
            earlier = await connection.fetchrow(_EARLIER, new.account_id, new.idempotency_key)
            if earlier is None:
                raise Conflict("the request with this Idempotency-Key is still being handled; try again")
            if earlier["request_hash"] != new.request_hash:
                raise Conflict(
                    "this Idempotency-Key was used with another request; use a new key",
                    task_id=earlier["task_id"],
                )
            return _task(earlier), False

    async def get(self, task_id: TaskId, account_id: AccountId | None = None) -> Task | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_GET, task_id, account_id)
            return None if row is None else _task(row)

    async def claim(self, task_id: TaskId, worker: str, *, steal_from: Epoch | None = None) -> Task | None:
        async with self._outbox.transaction(self._database) as (connection, post):
            if await connection.fetchval(_IS_LOST, task_id, steal_from):
                reason = "its message came back: the worker is gone" if steal_from is not None else "the lease ended"
                await self._move(connection, post, task_id, Trigger.LOSE, actor=worker, reason=reason, quietly=True)
            row = await connection.fetchrow(_CLAIM, task_id, worker, self._policy.lease_seconds)
            if row is None:
                return None
            task = _task(row)
            await self._tell(connection, post, task, row["previous"], Event.STARTED, worker, None)
            # An outage is nobody's fault: a task that waits for one to end gives up after hours, not after a count.
            passing = task.error is not None and task.error.get("code") != InternalFault.code
            if task.attempts <= self._policy.max_attempts * (OUTAGE_PATIENCE if passing else 1):
                return task
            error = NoProgress(
                f"{task.attempts - 1} claims in turn committed nothing; see last_error and the workers' logs, "
                "then resume or abort it",
                last_error=task.error,
            )
            await self._move(connection, post, task_id, Trigger.FAIL, actor=worker, error=error)
            return None

    async def claim_rollback(self, task_id: TaskId, worker: str, *, steal_from: Epoch | None = None) -> Task | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_CLAIM_ROLLBACK, task_id, worker, self._policy.lease_seconds, steal_from)
            return None if row is None else _task(row)

    async def put_off_rollback(self, task_id: TaskId, epoch: Epoch, *, delay_seconds: float) -> None:
        async with self._outbox.transaction(self._database) as (connection, post):
            row = await connection.fetchrow(_PUT_OFF, task_id, epoch, delay_seconds)
            if row is None:
                return
            task = _task(row)
            wanted = hint(task)
            assert wanted is not None, "an aborting task has a rollback queue, from which this worker had it"
            await post(COMMANDS_EXCHANGE, wanted[0], wanted[1], task.lease_until)

    async def heartbeat(self, task_id: TaskId, epoch: Epoch) -> Standing:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_HEARTBEAT, task_id, epoch, self._policy.lease_seconds)
        return _standing(row, task_id, epoch)

    async def hold(
        self, connection: Connection, task_id: TaskId, epoch: Epoch, *, saw: Checkpoint | None = None
    ) -> Standing:
        row = await connection.fetchrow(_HOLD, task_id, epoch)
        standing = _standing(row, task_id, epoch)
        if saw is not None and row is not None and row["done"] != saw.done_as_json():
            raise CheckpointLost(f"PostgreSQL has another checkpoint of task {task_id} than its worker saw committed")
        return standing

    async def go_back(
        self, connection: Connection, task_id: TaskId, epoch: Epoch, checkpoint: Checkpoint, lost: Progress
    ) -> Standing:
        row = await connection.fetchrow(_GO_BACK, task_id, epoch, checkpoint.as_json(), lost.bytes, lost.rows)
        return _standing(row, task_id, epoch)

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
        async with self._database.transaction() as connection:
            if not await connection.fetchval(_SAVE_PLAN, task_id, epoch, plan, bytes_total, rows_total):
                raise _fenced(task_id, epoch)
            if prepare is not None:
                await prepare(connection)

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
        row = await connection.fetchrow(
            _COMMIT_BATCH,
            task_id,
            epoch,
            checkpoint.as_json(),
            progress.bytes,
            progress.rows,
            progress.rejects,
            progress.bytes_total,
            progress.rows_total,
            self._policy.lease_seconds,
            None if saw is None else saw.done_as_json(),
        )
        if row is None:
            await self.hold(connection, task_id, epoch, saw=saw)
        return _standing(row, task_id, epoch)

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
        async with self._outbox.transaction(self._database) as (connection, post):
            row = await connection.fetchrow(_GET + " FOR UPDATE", task_id, account_id)
            if row is None:
                return None
            before = TaskState(row["state"])
            noted = message_id is None or await connection.fetchval(_NOTE_COMMAND, task_id, message_id, command, before)
            if not noted:
                return TaskState(await connection.fetchval(_NOTED, task_id, message_id, command)), before
            if answer(before, command).state is before:
                if command is Command.PAUSE:
                    # A user who pauses what the schedule paused wants it to stay so.
                    await connection.execute("UPDATE sluice.tasks SET resume_at = NULL WHERE task_id = $1", task_id)
                return before, before
            task = await self._move(connection, post, task_id, Trigger(command), actor=actor, reason=reason)
            assert task is not None, "the row is locked: the guard holds"
            return before, task.state

    async def succeed(
        self,
        task_id: TaskId,
        epoch: Epoch,
        publish: Callable[[Connection], Awaitable[dict[str, Any]]],
        *,
        actor: str,
        saw: Checkpoint | None = None,
    ) -> Task | None:
        async with self._outbox.transaction(self._database) as (connection, post):
            # Take the row first: an abort that comes now waits, and is then refused, because this has succeeded.
            try:
                await self.hold(connection, task_id, epoch, saw=saw)
            except Fenced:
                return None
            result = await publish(connection)
            return await self._move(connection, post, task_id, Trigger.SUCCEED, actor=actor, epoch=epoch, result=result)

    async def rolled_back(
        self, task_id: TaskId, epoch: Epoch, undo: Callable[[Connection], Awaitable[None]], *, actor: str
    ) -> Task | None:
        async with self._outbox.transaction(self._database) as (connection, post):
            task = await self._move(connection, post, task_id, Trigger.ROLL_BACK, actor=actor, epoch=epoch)
            if task is not None:
                await undo(connection)
            return task

    async def lose_expired(self, *, actor: str) -> list[Task]:
        async with self._outbox.transaction(self._database) as (connection, post):
            return [
                await self._moved(
                    connection, post, row["task_id"], Trigger.LOSE, actor, "the lease ended: no heartbeat"
                )
                for row in await connection.fetch(_LEASE_ENDED)
            ]

    async def expire_due(self, *, actor: str) -> list[Task]:
        async with self._outbox.transaction(self._database) as (connection, post):
            return [
                await self._moved(connection, post, row["task_id"], Trigger.EXPIRE, actor, "nobody resumed it in time")
                for row in await connection.fetch(_EXPIRED)
            ]

    async def keep_windows(self, *, actor: str) -> list[Task]:
        now = datetime.now(UTC)
        moved: list[Task] = []
        last = 0
        while page := await self._keep_page(last, now, actor, moved):
            last = page
        return moved

    async def _keep_page(self, after: int, now: datetime, actor: str, moved: list[Task]) -> int:
        """Look at the windows of some tasks with higher numbers; answers the last of them, 0 when there is none."""
        last = 0
        async with self._outbox.transaction(self._database) as (connection, post):
            for task in rows_to_tasks(await connection.fetch(_WINDOWED, after)):
                last = task.task_id
                assert task.run_window is not None, "the query asks for it"
                if task.resume_at is not None and task.state is TaskState.PAUSED:
                    trigger, reason, resume_at = Trigger.RESUME, f"its run window opens: {task.run_window}", None
                elif task.state is not TaskState.PAUSED and not task.run_window.is_open(now):
                    resume_at = task.run_window.next_open(now)
                    trigger, reason = Trigger.PAUSE, f"outside its run window: {task.run_window}"
                else:
                    continue
                moved_task = await self._move(
                    connection, post, task.task_id, trigger, actor=actor, reason=reason, resume_at=resume_at
                )
                assert moved_task is not None, "the row is locked: the guard holds"
                moved.append(moved_task)
        return last

    async def announce_overdue(self, *, older_than_seconds: float, queues: set[str]) -> list[Task]:
        kinds = [kind for kind, queue in WORK_QUEUES.items() if queue in queues]
        rolled_back = [kind for kind, queue in WORK_QUEUES.items() if rollback_queue(queue) in queues]
        async with self._outbox.transaction(self._database) as (connection, post):
            rows = await connection.fetch(_ANNOUNCE, older_than_seconds, kinds, rolled_back)
            tasks = rows_to_tasks(rows)
            for task in tasks:
                wanted = hint(task)
                assert wanted is not None, "only queued and aborting tasks are selected"
                await post(COMMANDS_EXCHANGE, wanted[0], wanted[1], None)
            return tasks

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
        task = _task(row)
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


def _fenced(task_id: TaskId, epoch: Epoch) -> Fenced:
    return Fenced(f"task {task_id} was taken from epoch {epoch}, aborted, or has ended")


def _standing(row: Mapping[str, Any] | None, task_id: TaskId, epoch: Epoch) -> Standing:
    if row is None:
        raise _fenced(task_id, epoch)
    return Standing(TaskState(row["state"]), row["max_bytes_per_second"])


def rows_to_tasks(rows: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Rows of `SELECT` over the columns of `Task`, as tasks."""
    return [_task(row) for row in rows]


TASK_COLUMNS = _COLUMNS
