"""Reading tasks: lists, rejected records, the audit trail."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from shared.adapters.task_rows import TASK_COLUMNS, rows_to_tasks
from shared.domain.errors import Conflict
from shared.domain.task import AccountId, Kind, Task, TaskId, TaskState
from shared.ports.database import Database


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """What is None does not restrict. Times are `from <= created_at < to`."""

    states: Sequence[TaskState] | None = None
    kind: Kind | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """`line` is where the record begins in the file, from 1."""

    line: int
    column_name: str | None
    reason: str
    raw: str


@dataclass(frozen=True, slots=True)
class AuditEntry:
    event_id: int
    event: str
    from_state: TaskState | None
    to_state: TaskState
    epoch: int
    actor: str
    reason: str | None
    occurred_at: datetime


REJECT_PAGE_BYTES = 4 * 1024 * 1024

# `full`: this one fills the page, and there may be more.
_REJECTS = """
SELECT line, column_name, reason, raw, bytes_to_here >= $4 AS full FROM (
    SELECT *, sum(octet_length(raw)) OVER (ORDER BY line ROWS UNBOUNDED PRECEDING) AS bytes_to_here
    FROM (SELECT * FROM sluice.rejects WHERE task_id = $1 AND ($2::bigint IS NULL OR line > $2)
          ORDER BY line LIMIT $3) page
) counted WHERE bytes_to_here - octet_length(raw) < $4 ORDER BY line
"""


class TaskQueries:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def page(
        self, account_id: AccountId, wanted: TaskFilter, *, before: int | None, limit: int
    ) -> Sequence[Task]:
        """Newest first, those with a number below `before`."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {TASK_COLUMNS} FROM sluice.tasks t
                WHERE account_id = $1 AND ($2::bigint IS NULL OR task_id < $2)
                    AND ($3::text[] IS NULL OR state = ANY($3))
                    AND ($4::text IS NULL OR kind = $4)
                    AND ($5::timestamptz IS NULL OR created_at >= $5)
                    AND ($6::timestamptz IS NULL OR created_at < $6)
                ORDER BY task_id DESC LIMIT $7
                """,  # noqa: S608 - the columns are the fields of Task
                account_id,
                before,
                None if wanted.states is None else list(wanted.states),
                wanted.kind,
                wanted.created_from,
                wanted.created_to,
                limit,
            )
        return rows_to_tasks(rows)

    async def made_before(self, account_id: AccountId, key: str | None, request_hash: bytes) -> Task | None:
        """The task that an earlier request with the same Idempotency-Key made. Raises Conflict for another request."""
        if key is None:
            return None
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                f"SELECT {TASK_COLUMNS}, t.request_hash FROM sluice.tasks t"  # noqa: S608
                " WHERE account_id = $1 AND idempotency_key = $2",
                account_id,
                key,
            )
        if row is None:
            return None
        if row["request_hash"] != request_hash:
            raise Conflict("this Idempotency-Key was used with another request; use a new key", task_id=row["task_id"])
        return rows_to_tasks([row])[0]

    async def rejects(self, task_id: TaskId, *, after: int | None, limit: int) -> tuple[Sequence[Reject], bool]:
        """Those behind the line `after`, in the order of the file, and whether there are more.

        At most `limit`, and one page's worth of bytes.
        """
        async with self._database.connection() as connection:
            rows = await connection.fetch(_REJECTS, task_id, after, limit + 1, REJECT_PAGE_BYTES)
        found = [Reject(row["line"], row["column_name"], row["reason"], row["raw"]) for row in rows[:limit]]
        return found, len(rows) > limit or any(row["full"] for row in rows)

    async def audit(self, task_id: TaskId, *, after: int | None, limit: int) -> Sequence[AuditEntry]:
        """Oldest first, those with a number above `after`."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT event_id, event, from_state, to_state, epoch, actor, reason, occurred_at"
                " FROM sluice.task_events"
                " WHERE task_id = $1 AND ($2::bigint IS NULL OR event_id > $2) ORDER BY event_id LIMIT $3",
                task_id,
                after,
                limit,
            )
        return [_entry(row) for row in rows]


def _entry(row: Mapping[str, Any]) -> AuditEntry:
    came_from = row["from_state"]
    states = {"from_state": came_from and TaskState(came_from), "to_state": TaskState(row["to_state"])}
    return AuditEntry(**{**row, **states})
