"""Uploads of exports that rest: what a worker left open that died on the way to a pause becomes an object.

Considerations
- No lock is held while the store is asked. A worker that claims the task meanwhile finds its upload gone and looks
  after the segment as if an earlier worker had completed it. Only who finds the same epoch afterwards notes the object.
"""

from collections.abc import Mapping
from typing import Any

import structlog

from shared.domain.errors import SluiceError, StoreRefused, UploadMissing
from shared.domain.export_keys import WHOLE, segment_of
from shared.ports.database import Database
from shared.ports.objects import ObjectStore, Part

log = structlog.get_logger()

_OPEN = """
SELECT o.object_key, o.upload_id, t.task_id, t.epoch FROM sluice.object_ledger o JOIN sluice.tasks t USING (task_id)
WHERE o.upload_id IS NOT NULL AND t.kind = 'export' AND t.state IN ('paused', 'failed')
"""

_PARTS = """
SELECT part_number, etag, bytes FROM sluice.export_parts WHERE task_id = $1 AND segment = $2 ORDER BY part_number
"""


class Sealer:
    """Closes each; what fails is found again by the next call."""

    def __init__(self, database: Database, objects: ObjectStore) -> None:
        self._database = database
        self._objects = objects

    async def __call__(self) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(_OPEN)
        for row in rows:
            try:
                await self._close(row)
            except SluiceError as error:
                log.warning("an upload stays open for now", key=row["object_key"], error=error.detail)

    async def _close(self, row: Mapping[str, Any]) -> None:
        key, upload_id, segment = row["object_key"], row["upload_id"], segment_of(row["object_key"])
        async with self._database.connection() as connection:
            found = await connection.fetch(_PARTS, row["task_id"], segment)
        parts = [Part(*part.values()) for part in found]
        if segment == WHOLE or not parts:
            await self._objects.abort_upload(key, upload_id)
            return
        try:
            await self._objects.complete_upload(key, upload_id, parts)
            whole = (await self._objects.stat(key)).bytes == sum(part.bytes for part in parts)
        except (UploadMissing, StoreRefused):
            whole = False
        if not whole:
            log.warning("the store lost an upload; the next worker does its part again", key=key)
            return
        async with self._database.transaction() as connection:
            if await connection.fetchval(
                "SELECT true FROM sluice.tasks WHERE task_id = $1 AND epoch = $2 FOR NO KEY UPDATE",
                row["task_id"],
                row["epoch"],
            ):
                await connection.execute("UPDATE sluice.object_ledger SET upload_id = NULL WHERE object_key = $1", key)
        log.info("sealed what a lost worker left", key=key)
