"""Sessions that say of which claim they are, so that those of a claim that has ended can be disconnected.

Considerations
- A worker that hangs (stopped, or behind a cut network) with an answer half sent keeps its lock on a load's table: the
  server waits for it to read on, and no timeout of the server's looks at that. Whoever detaches or drops the load
  would wait for it.
- What a live worker still has open when its claim ends is on the way out; to be disconnected changes nothing for it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shared.domain.task import Task
from shared.ports.database import Connection, Database

_END_FENCED = """
SELECT count(pg_terminate_backend(a.pid)) FROM pg_stat_activity a
CROSS JOIN regexp_match(a.application_name, '^sluice task ([0-9]{1,18}) epoch ([0-9]{1,18})$') AS claim
WHERE a.usename = current_user AND a.datname = current_database() AND claim IS NOT NULL
  AND NOT EXISTS (SELECT FROM sluice.tasks t WHERE t.task_id = claim[1]::bigint AND t.epoch = claim[2]::bigint
                  AND (t.state IN ('running', 'pausing')
                       OR t.state = 'aborting' AND t.updated_at > now() - make_interval(secs => $1)))
"""
# A worker that is well lets go of an aborted task in much less.
_LETS_GO_SECONDS = 5.0


class ClaimSessions:
    """The `Database` port for what one claim reads at length."""

    def __init__(self, database: Database, task: Task) -> None:
        self._database = database
        self._name = f"sluice task {task.task_id} epoch {task.epoch}"

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        async with self._database.connection() as connection:
            # Until it goes back to the pool, which resets it.
            await connection.execute("SELECT set_config('application_name', $1, false)", self._name)
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Connection]:
        async with self.connection() as connection, connection.transaction():
            yield connection


async def end_fenced_sessions(database: Database) -> int:
    """Disconnect the sessions of claims that have ended; answers how many."""
    async with database.connection() as connection:
        return int(await connection.fetchval(_END_FENCED, _LETS_GO_SECONDS))
