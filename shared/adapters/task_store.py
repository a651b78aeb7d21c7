"""Tasks in PostgreSQL: creation, reading, users' commands; workers' claims and upkeep are parts of their own.

Every transition is one guarded UPDATE that names the states it may leave; whoever comes second changes nothing. In the
same transaction it writes its audit row and its outbox rows, so that nothing happens without being told.
"""

from datetime import UTC, datetime
from uuid import UUID

from shared.adapters.task_claims import Claims
from shared.adapters.task_rows import TASK_COLUMNS, task_of
from shared.adapters.task_upkeep import Upkeep
from shared.domain.errors import Conflict
from shared.domain.task import AccountId, Command, Event, Task, TaskId, TaskState, Trigger, answer
from shared.ports.tasks import NewTask

_CREATE = f"""
INSERT INTO sluice.tasks AS t (account_id, kind, state, params, bytes_total, max_bytes_per_second, idempotency_key,
                               request_hash, not_before, run_window, announced_at)
VALUES ($1, $2, 'queued', $3, $4, $5, $6, $7, $8, $9, greatest(now(), $8))
ON CONFLICT (account_id, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
RETURNING {TASK_COLUMNS}
"""  # noqa: S608 - the columns are the fields of Task

_EARLIER = f"""
SELECT {TASK_COLUMNS}, t.request_hash FROM sluice.tasks t WHERE account_id = $1 AND idempotency_key = $2
"""  # noqa: S608

_GET = f"""
SELECT {TASK_COLUMNS} FROM sluice.tasks t WHERE task_id = $1 AND ($2::bigint IS NULL OR account_id = $2)
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


class PgTaskStore(Claims, Upkeep):
    """The `TaskStore` port on PostgreSQL."""

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
                task = task_of(row)
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
            return task_of(earlier), False

    async def get(self, task_id: TaskId, account_id: AccountId | None = None) -> Task | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_GET, task_id, account_id)
            return None if row is None else task_of(row)

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
