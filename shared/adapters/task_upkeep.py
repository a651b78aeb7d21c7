"""Tasks that would wait for ever: leases that ended, expiry, run windows, hints that went astray."""

from datetime import UTC, datetime

from shared.adapters.task_rows import TASK_COLUMNS, rows_to_tasks
from shared.adapters.task_transitions import Transitions
from shared.domain.messages import COMMANDS_EXCHANGE, WORK_QUEUES, hint, rollback_queue
from shared.domain.task import Task, TaskState, Trigger

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
SELECT {TASK_COLUMNS} FROM sluice.tasks t
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
UPDATE sluice.tasks t SET announced_at = now() FROM overdue WHERE t.task_id = overdue.task_id RETURNING {TASK_COLUMNS}
"""  # noqa: S608


class Upkeep(Transitions):
    """The part of the `TaskStore` port that the control service calls every now and then."""

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
                is_open = task.run_window.is_open(now)
                # The server's clock may be ahead of ours: what it calls due would be paused again at once.
                if task.state is TaskState.PAUSED and is_open:
                    trigger, reason, resume_at = Trigger.RESUME, f"its run window opens: {task.run_window}", None
                elif task.state is not TaskState.PAUSED and not is_open:
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
