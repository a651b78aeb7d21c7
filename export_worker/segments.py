"""The object that an export writes: segments of multipart uploads, and the one object they become.

Considerations
- A segment is one multipart upload. Sealing completes it, so that a paused task keeps no upload open; the next claim
  begins another. At the end the store itself joins the segments.
- The ledger holds a row for each segment: with an upload id while it is open, without one when it is an object. The
  parts' table says what is in it. Both change only in transactions that the claim's epoch guards.
- A key has a random end and is used once: an upload that a killed worker began and could not write down has a key
  that nothing knows, and is swept.
- A killed worker's upload is taken up if the store still has every committed part. Otherwise (swept, or the store lost
  it) the checkpoint goes back to where the segment began. This is looked at only when a claim begins, where no lane is
  at work; whoever meets it later ends its claim with UploadLost, and the next one looks.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import structlog

from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import CountMismatch, Fenced, StoreRefused, UploadLost, UploadMissing
from shared.domain.export_keys import WHOLE, key_of, prefix, segment_of
from shared.domain.task import Task
from shared.ports.database import Connection
from shared.ports.kinds import Claim
from shared.ports.objects import Body, ObjectStat, ObjectStore, Part
from shared.ports.tasks import Progress

log = structlog.get_logger()
T = TypeVar("T")

# Parts of one upload after which the next claim begins another: S3 allows 10,000, and each claim may add many.
_ENOUGH_PARTS = 4000
# Times that the same segment is done again before the store is blamed.
_MOST_LOSSES = 5


@dataclass(frozen=True, slots=True)
class _Upload:
    segment: int
    key: str
    upload_id: str


@dataclass(slots=True)
class Piece:
    """The positions `start` to `end` as they are in the file. A part is one piece or several."""

    start: int
    end: int
    rows: int = 0
    size: int = 0
    body: list[bytes] = field(default_factory=list)
    details: list[Any] = field(default_factory=list)


class Segments:
    """What one claim knows of its task's objects."""

    def __init__(self, claim: Claim, objects: ObjectStore, content_type: str) -> None:
        self._claim = claim
        self._objects = objects
        self._content_type = content_type
        self._task_id = claim.task.task_id
        self._sealed: dict[int, str] = {}
        self._open: _Upload | None = None
        self._whole: str | None = None

    async def take_up(self) -> None:
        """Find what earlier claims left, and make checkpoint and store agree.

        Raises StoreRefused when the store loses the same upload again and again.
        """
        async with self._claim.hold() as connection:
            rows = await connection.fetch(
                "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", self._task_id
            )
        for row in rows:
            key, upload_id = row["object_key"], row["upload_id"]
            segment = segment_of(key)
            if segment == WHOLE and upload_id is None:
                self._whole = key
            elif segment == WHOLE:
                await self._drop(key, upload_id)
            elif upload_id is None:
                self._sealed[segment] = key
            else:
                self._open = _Upload(segment, key, upload_id)
        if self._open is not None:
            await self._look_after(self._open)

    async def begin(self) -> int:
        """Have an upload open; answers the number of its next part."""
        if self._open is None:
            # Not to be torn apart by a cancel: an upload that is not written down would stay.
            await _to_the_end(self._create())
        assert self._open is not None
        async with self._claim.hold() as connection:
            parts = await self._parts(connection, self._open.segment)
        return len(parts) + 1

    async def put(self, number: int, body: Body) -> Part:
        """Send a part. Raises UploadLost."""
        assert self._open is not None, "begin() first"
        try:
            return await self._objects.put_part(self._open.key, self._open.upload_id, number, body)
        except UploadMissing as error:
            raise UploadLost("the object store no longer knows the upload; its parts will be done again") from error

    async def record(self, connection: Connection, part: Part, pieces: Sequence[Piece]) -> None:
        """Note a part, in the transaction that commits it; its pieces need not be kept any more."""
        assert self._open is not None
        await connection.execute(
            "INSERT INTO sluice.export_parts (task_id, segment, part_number, etag, bytes, rows, start_position,"
            " end_position, detail) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            self._task_id,
            self._open.segment,
            part.number,
            part.etag,
            part.bytes,
            sum(piece.rows for piece in pieces),
            pieces[0].start,
            pieces[-1].end,
            [detail for piece in pieces for detail in piece.details] or None,
        )
        if len(pieces) > 1:
            await connection.execute("DELETE FROM sluice.export_remainders WHERE task_id = $1", self._task_id)

    async def keep(self, connection: Connection, piece: Piece) -> None:
        """Keep a piece of a part that is not full, in the transaction that commits it."""
        await connection.execute(
            "INSERT INTO sluice.export_remainders (task_id, start_position, end_position, rows, data, detail)"
            " VALUES ($1, $2, $3, $4, $5, $6)",
            self._task_id,
            piece.start,
            piece.end,
            piece.rows,
            b"".join(piece.body),
            piece.details or None,
        )

    async def kept(self) -> list[Piece]:
        """What the next part begins with."""
        async with self._claim.hold() as connection:
            rows = await connection.fetch(
                "SELECT start_position, end_position, rows, data, detail FROM sluice.export_remainders"
                " WHERE task_id = $1 ORDER BY start_position",
                self._task_id,
            )
        pieces = []
        for row in rows:
            start, end, count, data, details = row.values()
            pieces.append(Piece(start, end, count, len(data), [data], details or []))
        return pieces

    async def details(self) -> list[Any]:
        """What the format noted of all committed parts, in order."""
        async with self._claim.hold() as connection:
            rows = await connection.fetch(
                "SELECT detail FROM sluice.export_parts WHERE task_id = $1 AND detail IS NOT NULL"
                " ORDER BY segment, part_number",
                self._task_id,
            )
        return [detail for row in rows for detail in row["detail"]]

    async def seal(self) -> None:
        """Make an object of the committed parts, or drop the upload if there are none. Raises UploadLost."""
        if self._open is None:
            return
        upload = self._open
        async with self._claim.hold() as connection:
            parts = await self._parts(connection, upload.segment)
        if not parts:
            await self._drop(upload.key, upload.upload_id)
            self._open = None
            return
        try:
            await self._complete(upload, parts)
        except (UploadMissing, StoreRefused) as error:
            raise UploadLost(
                f"the object store could not complete the upload; its parts will be done again ({error.detail})"
            ) from error
        await self._note_sealed(upload)

    async def join(self) -> tuple[str, ObjectStat]:
        """All segments as one object, and its key. Idempotent. Raises CountMismatch."""
        await self.seal()
        if self._whole is None and len(self._sealed) == 1:
            self._whole = next(iter(self._sealed.values()))
        elif self._whole is None:
            await self._compose()
        assert self._whole is not None
        if left := [key for key in self._sealed.values() if key != self._whole]:
            await self._objects.delete(*left)
            async with self._claim.hold() as connection:
                await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = ANY($1)", left)
        async with self._claim.hold() as connection:
            expected = await connection.fetchval(
                "SELECT coalesce(sum(bytes), 0)::bigint FROM sluice.export_parts WHERE task_id = $1", self._task_id
            )
        if not expected:
            # Whoever wrote its key down may not have lived to write the object.
            await self._objects.put(self._whole, b"", content_type=self._content_type)
        stat = await self._objects.stat(self._whole)
        if stat.bytes != expected:
            raise CountMismatch(f"the file has {stat.bytes} bytes in the object store; {expected} were written")
        return self._whole, stat

    # --- steps

    async def _create(self) -> None:
        segment = max(self._sealed, default=0) + 1
        key = key_of(self._task_id, segment, secrets.token_hex(4))
        upload_id = await self._objects.create_upload(key, content_type=self._content_type)
        await self._enter(key, upload_id)
        self._open = _Upload(segment, key, upload_id)

    async def _compose(self) -> None:
        key = key_of(self._task_id, WHOLE, secrets.token_hex(4))
        sources = [self._sealed[segment] for segment in sorted(self._sealed)]
        if not sources:
            await self._enter(key, None)
        else:

            async def enter(upload_id: str) -> None:
                await self._enter(key, upload_id)

            try:
                await self._objects.compose(key, sources, content_type=self._content_type, on_upload_created=enter)
            except UploadMissing as error:
                raise UploadLost(
                    "the object store no longer knows the upload; the segments are joined again"
                ) from error
            async with self._claim.hold() as connection:
                await _set_whole(connection, key)
        self._whole = key

    async def _enter(self, key: str, upload_id: str | None) -> None:
        try:
            async with self._claim.hold() as connection:
                await connection.execute(
                    "INSERT INTO sluice.object_ledger (object_key, upload_id, task_id, alive_until)"
                    " VALUES ($1, $2, $3, now())",
                    key,
                    upload_id,
                    self._task_id,
                )
        except Fenced:
            if upload_id is not None:
                await self._objects.abort_upload(key, upload_id)
            raise

    async def _look_after(self, upload: _Upload) -> None:
        async with self._claim.hold() as connection:
            parts = await self._parts(connection, upload.segment)
        if not parts:
            await self._drop(upload.key, upload.upload_id)
            self._open = None
            return
        try:
            there = set(await self._objects.list_parts(upload.key, upload.upload_id))
        except UploadMissing:
            try:
                # Completed by a worker that did not live to note it?
                await self._complete(upload, parts)
            except (UploadMissing, StoreRefused):
                await self._go_back(upload)
            else:
                await self._note_sealed(upload)
            return
        if not there.issuperset(parts):
            await self._go_back(upload)
        elif len(parts) >= _ENOUGH_PARTS:
            await self.seal()

    async def _complete(self, upload: _Upload, parts: Sequence[Part]) -> None:
        """Make an object of the upload. Raises UploadMissing and StoreRefused."""
        await self._objects.complete_upload(upload.key, upload.upload_id, parts)
        # A killed worker's completion may be carried out late, when there were more parts already than it named.
        if (stat := await self._objects.stat(upload.key)).bytes != sum(part.bytes for part in parts):
            raise UploadMissing(
                f"the object store made an object of {stat.bytes} bytes of the upload, not of all parts"
            )

    async def _go_back(self, upload: _Upload) -> None:
        """Undo the segment: its ranges are missing again."""
        await self._objects.abort_upload(upload.key, upload.upload_id)
        await self._objects.delete(upload.key)
        async with self._claim.hold() as connection:
            lost = await connection.fetchrow(
                "SELECT min(start_position) AS start, sum(bytes)::bigint AS bytes, sum(rows)::bigint AS rows"
                " FROM (SELECT start_position, bytes, rows FROM sluice.export_parts WHERE task_id = $1 AND segment = $2"
                " UNION ALL"
                " SELECT start_position, length(data), rows FROM sluice.export_remainders WHERE task_id = $1) lost",
                self._task_id,
                upload.segment,
            )
        assert lost is not None
        before = self._claim.checkpoint
        start = lost["start"]
        losses = before.cursor.get("losses", [start, 0])
        times = losses[1] + 1 if losses[0] == start else 1
        # Forgotten when the task is given up, so that a resume gets as many tries.
        cursor = {**before.cursor, "losses": [start, times if times < _MOST_LOSSES else 0]}
        rows = before.lines_before(before.prefix(0)) - lost["rows"]

        async def undo(connection: Connection) -> None:
            await connection.execute(
                "DELETE FROM sluice.export_parts WHERE task_id = $1 AND segment = $2", self._task_id, upload.segment
            )
            await connection.execute("DELETE FROM sluice.export_remainders WHERE task_id = $1", self._task_id)
            await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", upload.key)

        done = Checkpoint().add(Range(0, start, rows))
        await self._claim.go_back(Checkpoint(done.done, cursor), Progress(bytes=lost["bytes"], rows=lost["rows"]), undo)
        self._open = None
        log.warning("the store lost an upload; its part of the file is done again", segment=upload.segment, times=times)
        if times >= _MOST_LOSSES:
            raise StoreRefused(
                f"the object store lost the same upload {times} times: look whether it expires multipart uploads, then "
                "resume"
            )

    async def _drop(self, key: str, upload_id: str) -> None:
        await self._objects.abort_upload(key, upload_id)
        await self._objects.delete(key)
        async with self._claim.hold() as connection:
            await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", key)

    async def _note_sealed(self, upload: _Upload) -> None:
        async with self._claim.hold() as connection:
            await _set_whole(connection, upload.key)
        self._sealed[upload.segment] = upload.key
        self._open = None
        log.info("sealed", segment=upload.segment)

    async def _parts(self, connection: Connection, segment: int) -> list[Part]:
        rows = await connection.fetch(
            "SELECT part_number, etag, bytes FROM sluice.export_parts WHERE task_id = $1 AND segment = $2"
            " ORDER BY part_number",
            self._task_id,
            segment,
        )
        return [Part(row["part_number"], row["etag"], row["bytes"]) for row in rows]


async def discard(objects: ObjectStore, task: Task, ledger: Sequence[tuple[str, str | None]]) -> None:
    """Remove every upload and object of a task; `ledger` names those that the store may not list. Idempotent."""
    for key, upload_id in ledger:
        if upload_id is not None:
            await objects.abort_upload(key, upload_id)
    here = prefix(task.task_id)
    async for upload in objects.list_uploads(here):
        await objects.abort_upload(upload.key, upload.upload_id)
    keys = {key for key, _ in ledger} | {found.key async for found in objects.list_objects(here)}
    if keys:
        await objects.delete(*keys)


async def _set_whole(connection: Connection, key: str) -> None:
    await connection.execute("UPDATE sluice.object_ledger SET upload_id = NULL WHERE object_key = $1", key)


async def _to_the_end(work: Awaitable[T]) -> T:
    """Finish `work` even if cancelled meanwhile; the cancel is raised afterwards."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()
        raise
