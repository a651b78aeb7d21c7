"""Leftovers without an owner: stage tables, multipart uploads, objects, files that were deleted, unpinned loads.

Considerations
- What is swept each time is what rows say. The whole bucket is listed only as often as something in it may have become
  old enough: that finds what no row knows, and costs a request for each thousand objects.
- What cannot be removed, an object that the store will not delete or a table that is read, does not keep the others.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import structlog

from shared.adapters.catalog import LOADS_SCHEMA, PgCatalog, drop_load_table, set_lock_timeout
from shared.domain.errors import DatabaseUnavailable, SluiceError, StoreUnavailable
from shared.domain.task import LoadId
from shared.ports.database import Database
from shared.ports.objects import ObjectStore, UploadInfo

log = structlog.get_logger()
T = TypeVar("T")

_ORPHAN_TABLES = """
WITH there AS MATERIALIZED (
    SELECT substr(c.relname::text, 6)::bigint AS load_id FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = $1 AND c.relkind = 'r' AND c.relname ~ '^load_[1-9][0-9]{0,17}$'
)
SELECT load_id FROM there
WHERE NOT EXISTS (SELECT FROM sluice.loads l WHERE l.load_id = there.load_id)
  AND NOT EXISTS (SELECT FROM sluice.tasks t WHERE t.task_id = there.load_id
                  AND t.state NOT IN ('succeeded', 'aborted'))
"""

# An object in the ledger has an owner while its writer says so, or while the task that writes it may go on.
_ORPHANS = """
FROM sluice.object_ledger o
WHERE CASE WHEN task_id IS NULL THEN alive_until < now() - make_interval(secs => $1)
           ELSE NOT EXISTS (SELECT FROM sluice.tasks t WHERE t.task_id = o.task_id
                            AND t.state <> 'succeeded') END
"""
_ORPHANS_IN_LEDGER = f"SELECT object_key {_ORPHANS}"
_STILL_AN_ORPHAN = f"SELECT upload_id {_ORPHANS} AND object_key = $2 FOR UPDATE SKIP LOCKED"

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

_LISTED = "SELECT EXISTS (SELECT FROM sluice.listings WHERE listed_at > now() - make_interval(secs => $1))"
_LIST_DONE = "INSERT INTO sluice.listings VALUES (true, now()) ON CONFLICT (one) DO UPDATE SET listed_at = now()"

_PAGE = 1000
_LOCK_SECONDS = 5.0


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
            self._unlisted,
        ):
            try:
                await step()
            except SluiceError as error:
                log.warning("a step of the sweep will be tried again", step=step.__name__, error=error.detail)

    async def _orphan_tables(self) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(_ORPHAN_TABLES, LOADS_SCHEMA)
        await self._each([row["load_id"] for row in rows], self._drop)

    async def _drop(self, load_id: LoadId) -> None:
        async with self._database.transaction() as connection:
            await set_lock_timeout(connection, _LOCK_SECONDS)
            await drop_load_table(connection, load_id)
        log.warning("dropped a table without an owner", load_id=load_id)

    async def _deleted_files(self) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(_DELETED_FILES)
        try:
            await self._delete_files(rows)
        except SluiceError:
            await self._each([[row] for row in rows], self._delete_files)

    async def _delete_files(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        await self._objects.delete(*(row["object_key"] for row in rows))
        async with self._database.connection() as connection:
            await connection.execute(
                "DELETE FROM sluice.files WHERE file_id = ANY($1)", [row["file_id"] for row in rows]
            )

    async def _ledger(self) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(_ORPHANS_IN_LEDGER, self._orphan_age.total_seconds())
        await self._each([row["object_key"] for row in rows], self._remove)

    async def _remove(self, key: str) -> None:
        # The row stays locked until its object is gone: a writer that was only frozen finds no row to publish.
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(_STILL_AN_ORPHAN, self._orphan_age.total_seconds(), key)
            if row is None:
                return
            if row["upload_id"] is not None:
                await self._objects.abort_upload(key, row["upload_id"])
            await self._objects.delete(key)
            await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", key)
        log.warning("removed an object that its writer left", key=key)

    async def _of_aborted_tasks(self) -> None:
        """Remove it again and again, until nothing can come any more."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_OF_ABORTED, _LATE_SECONDS)
        try:
            await self._remove_again(rows)
        except SluiceError:
            await self._each([[row] for row in rows], self._remove_again)

    async def _remove_again(self, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        for row in rows:
            if row["upload_id"] is not None:
                await self._objects.abort_upload(row["object_key"], row["upload_id"])
        await self._objects.delete(*(row["object_key"] for row in rows))
        over = [row["object_key"] for row in rows if row["is_over"]]
        async with self._database.connection() as connection:
            await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = ANY($1)", over)

    async def _unlisted(self) -> None:
        """What no row knows, as often as it may have become old enough."""
        async with self._database.connection() as connection:
            if await connection.fetchval(_LISTED, self._orphan_age.total_seconds()):
                return
        await self._each((self._unknown_uploads, self._unknown_objects), lambda step: step())
        async with self._database.connection() as connection:
            await connection.execute(_LIST_DONE)

    async def _unknown_uploads(self) -> None:
        oldest = datetime.now(UTC) - self._orphan_age
        old = [u async for u in self._objects.list_uploads("") if u.started_at < oldest]
        unknown = await self._unknown([upload.key for upload in old])
        await self._each([upload for upload in old if upload.key in unknown], self._abort)

    async def _abort(self, upload: UploadInfo) -> None:
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
        await self._each(await self._unknown(keys), self._delete_object)

    async def _delete_object(self, key: str) -> None:
        await self._objects.delete(key)
        log.warning("removed an object without an owner", key=key)

    async def _unknown(self, keys: list[str]) -> set[str]:
        if not keys:
            return set()
        async with self._database.connection() as connection:
            return {row["key"] for row in await connection.fetch(_UNKNOWN_KEYS, keys)}

    async def _each(self, items: Iterable[T], act: Callable[[T], Awaitable[None]]) -> None:
        """Act on all; what went wrong with some of them is raised at the end, but at once where a server is away."""
        trouble: SluiceError | None = None
        for item in items:
            try:
                await act(item)
            except DatabaseUnavailable:
                raise
            except SluiceError as error:
                trouble = error
                if isinstance(error, StoreUnavailable):
                    await self._objects.probe()
        if trouble is not None:
            raise trouble
