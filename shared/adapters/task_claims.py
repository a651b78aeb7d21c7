"""Tasks in the hands of workers: claims, leases, checkpoints, and how a claim ends well.

Considerations
- Claims raise the epoch. Whoever holds an older one is fenced: its batches roll back with their rows.
- A batch commits with `synchronous_commit` off (see `shared.claim`): a crash of the server itself may lose the last
  batches, but rows and checkpoint together. Transitions commit synchronously, and with that all before them. A worker
  that lived on must not build on batches that the server forgot: what it commits names the checkpoint that it `saw`.
"""

from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from shared.adapters.task_rows import TASK_COLUMNS, task_of
from shared.adapters.task_transitions import Transitions
from shared.domain.checkpoint import Checkpoint
from shared.domain.errors import CheckpointLost, Fenced, InternalFault, NoProgress
from shared.domain.messages import COMMANDS_EXCHANGE, hint
from shared.domain.schedule import RunWindow
from shared.domain.task import Epoch, Event, Task, TaskId, TaskState, Trigger
from shared.ports.database import Connection
from shared.ports.tasks import Progress, Standing

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
RETURNING {TASK_COLUMNS}, before.state AS previous
"""  # noqa: S608

_IS_LOST = """
SELECT true FROM sluice.tasks
WHERE task_id = $1 AND state IN ('running', 'pausing') AND (epoch <= $2::bigint + 1 OR lease_until < now())
FOR UPDATE
"""

_WINDOW = "SELECT run_window FROM sluice.tasks WHERE task_id = $1"

_CLAIM_ROLLBACK = f"""
UPDATE sluice.tasks t SET epoch = t.epoch + 1, attempts = t.attempts + 1, worker = $2,
    lease_until = now() + make_interval(secs => $3), updated_at = now()
WHERE task_id = $1 AND state = 'aborting' AND (lease_until IS NULL OR lease_until < now() OR epoch <= $4::bigint + 1)
RETURNING {TASK_COLUMNS}
"""  # noqa: S608

# Until its end the lease is nobody's, and keeps everybody from the next attempt.
_PUT_OFF = f"""
UPDATE sluice.tasks t SET worker = NULL, lease_until = now() + make_interval(secs => $3),
    announced_at = now() + make_interval(secs => $3), updated_at = now()
WHERE task_id = $1 AND epoch = $2 AND state = 'aborting'
RETURNING {TASK_COLUMNS}
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

# How many times more attempts a task has that ended them with a passing fault; with back-offs of a minute, hours.
OUTAGE_PATIENCE = 20


class Claims(Transitions):
    """The part of the `TaskStore` port that workers use."""

    async def claim(self, task_id: TaskId, worker: str, *, steal_from: Epoch | None = None) -> Task | None:
        async with self._outbox.transaction(self._database) as (connection, post):
            if await connection.fetchval(_IS_LOST, task_id, steal_from):
                reason = "its message came back: the worker is gone" if steal_from is not None else "the lease ended"
                await self._move(connection, post, task_id, Trigger.LOSE, actor=worker, reason=reason, quietly=True)
            window = await connection.fetchval(_WINDOW, task_id)
            if window is not None and not RunWindow.model_validate(window).is_open(datetime.now(UTC)):
                return None  # resumed by hand, or late: the control service pauses it until the window opens
            row = await connection.fetchrow(_CLAIM, task_id, worker, self._policy.lease_seconds)
            if row is None:
                return None
            task = task_of(row)
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
            return None if row is None else task_of(row)

    async def put_off_rollback(self, task_id: TaskId, epoch: Epoch, *, delay_seconds: float) -> None:
        async with self._outbox.transaction(self._database) as (connection, post):
            row = await connection.fetchrow(_PUT_OFF, task_id, epoch, delay_seconds)
            if row is None:
                return
            task = task_of(row)
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


def _fenced(task_id: TaskId, epoch: Epoch) -> Fenced:
    return Fenced(f"task {task_id} was taken from epoch {epoch}, aborted, or has ended")


def _standing(row: Mapping[str, Any] | None, task_id: TaskId, epoch: Epoch) -> Standing:
    if row is None:
        raise _fenced(task_id, epoch)
    return Standing(TaskState(row["state"]), row["max_bytes_per_second"])
