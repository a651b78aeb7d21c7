"""Leftovers without an owner: stage tables, multipart uploads, objects, files that were deleted, unpinned loads."""

import re
from datetime import UTC, datetime, timedelta

import structlog

from shared.adapters.catalog import LOADS_SCHEMA, PgCatalog, drop_load_table
from shared.domain.errors import SluiceError
from shared.domain.task import LoadId
from shared.ports.database import Database
from shared.ports.objects import ObjectStore

log = structlog.get_logger()

_ORPHAN_TABLES = """
SELECT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname = $1 AND c.relkind = 'r' AND c.relname ~ '^load_[0-9]+$'
  AND NOT EXISTS (SELECT FROM sluice.loads l WHERE 'load_' || l.load_id = c.relname)
  AND NOT EXISTS (SELECT FROM sluice.tasks t WHERE 'load_' || t.task_id = c.relname
                  AND t.state NOT IN ('succeeded', 'aborted'))
"""

# An object in the ledger has an owner while its writer says so, or while the task that writes it may go on.
_ORPHAN_IN_LEDGER = """
SELECT object_key, upload_id FROM sluice.object_ledger o
WHERE CASE WHEN task_id IS NULL THEN alive_until < now() - make_interval(secs => $1)
           ELSE NOT EXISTS (SELECT FROM sluice.tasks t WHERE t.task_id = o.task_id
                            AND t.state <> 'succeeded') END
LIMIT 1 FOR UPDATE SKIP LOCKED
"""

# What a worker had asked of the store when its task was aborted may be carried out after the rollback.
_OF_ABORTED = """
SELECT o.object_key, o.upload_id, t.ended_at < now() - make_interval(secs => $1) AS is_over
FROM sluice.object_ledger o JOIN sluice.tasks t USING (task_id) WHERE t.state = 'aborted'
ORDER BY t.ended_at LIMIT 1000
"""
_LATE_SECONDS = 120.0  # how long a request to the store may take

_UNKNOWN_KEYS = """
SELECT key FROM unnest($1::text[]) AS key
WHERE NOT EXISTS (SELECT FROM sluice.files f WHERE f.object_key = key)
  AND NOT EXISTS (SELECT FROM sluice.object_ledger o WHERE o.object_key = key)
"""

# A task that reads a file keeps its bytes, though the file was deleted or replaced, until the task has ended.
_DELETED_FILES = """
SELECT file_id, object_key FROM sluice.files f
WHERE deleted_at IS NOT NULL
  AND NOT EXISTS (SELECT FROM sluice.tasks t WHERE t.params -> 'source' ->> 'object_key' = f.object_key
                  AND t.state NOT IN ('succeeded', 'aborted'))
LIMIT 1000
"""

_PAGE = 1000


class Sweeper:
    """One sweep removes what it finds; what fails is found again by the next."""

    def __init__(
        self, database: Database, objects: ObjectStore, catalog: PgCatalog, *, orphan_age_seconds: float
    ) -> None:
        self._database = database
        self._objects = objects
        self._catalog = catalog
        self._orphan_age = timedelta(seconds=orphan_age_seconds)

    async def __call__(self) -> None:
        for step in (
            self._catalog.purge,
            self._orphan_tables,
            self._deleted_files,
            self._ledger,
            self._of_aborted_tasks,
            self._unknown_uploads,
            self._unknown_objects,
        ):
            try:
                await step()
            except SluiceError as error:
                log.warning("a step of the sweep will be tried again", step=step.__name__, error=error.detail)

    async def _orphan_tables(self) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(_ORPHAN_TABLES, LOADS_SCHEMA)
            for row in rows:
                number = re.fullmatch(r"load_(\d+)", row["relname"])
                assert number is not None, "the query asks for this form"
                await drop_load_table(connection, LoadId(int(number[1])))
                log.warning("dropped a table without an owner", table=row["relname"])

    async def _deleted_files(self) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(_DELETED_FILES)
        if not rows:
            return
        await self._objects.delete(*(row["object_key"] for row in rows))
        async with self._database.connection() as connection:
            await connection.execute(
                "DELETE FROM sluice.files WHERE file_id = ANY($1)", [row["file_id"] for row in rows]
            )

    async def _ledger(self) -> None:
        while True:
            # The row stays locked until its object is gone: a writer that was only frozen finds no row to publish.
            async with self._database.transaction() as connection:
                row = await connection.fetchrow(_ORPHAN_IN_LEDGER, self._orphan_age.total_seconds())
                if row is None:
                    return
                if row["upload_id"] is not None:
                    await self._objects.abort_upload(row["object_key"], row["upload_id"])
                await self._objects.delete(row["object_key"])
                await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", row["object_key"])
            log.warning("removed an object that its writer left", key=row["object_key"])

    async def _of_aborted_tasks(self) -> None:
        """Remove it again and again, until nothing can come any more."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_OF_ABORTED, _LATE_SECONDS)
        if not rows:
            return
        for row in rows:
            if row["upload_id"] is not None:
                await self._objects.abort_upload(row["object_key"], row["upload_id"])
        await self._objects.delete(*(row["object_key"] for row in rows))
        over = [row["object_key"] for row in rows if row["is_over"]]
        async with self._database.connection() as connection:
            await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = ANY($1)", over)

    async def _unknown_uploads(self) -> None:
        oldest = datetime.now(UTC) - self._orphan_age
        old = [u async for u in self._objects.list_uploads("") if u.started_at < oldest]
        unknown = await self._unknown([upload.key for upload in old])
        for upload in old:
            if upload.key in unknown:
                await self._objects.abort_upload(upload.key, upload.upload_id)
                log.warning("ended an upload without an owner", key=upload.key)

    async def _unknown_objects(self) -> None:
        oldest = datetime.now(UTC) - self._orphan_age
        page: list[str] = []
        async for found in self._objects.list_objects(""):
            if found.last_modified < oldest:
                page.append(found.key)
            if len(page) == _PAGE:
                await self._delete_unknown(page)
                page = []
        await self._delete_unknown(page)

    async def _delete_unknown(self, keys: list[str]) -> None:
        for key in await self._unknown(keys):
            await self._objects.delete(key)
            log.warning("removed an object without an owner", key=key)

    async def _unknown(self, keys: list[str]) -> set[str]:
        if not keys:
            return set()
        async with self._database.connection() as connection:
            return {row["key"] for row in await connection.fetch(_UNKNOWN_KEYS, keys)}
