"""The object that an export writes: segments of multipart uploads, and the one object they become.

Considerations
- A segment is one multipart upload. Sealing completes it, so that a paused task keeps no upload open; the next claim
  begins another.
- At the end the store itself joins the segments, by an upload of which each part is a copy. Copies are noted like other
  parts, as those of segment 0. That upload stays open from one slice to the next; a pause gives it up.
- The ledger holds a row for each upload: with its id while it is open, without when it is an object. The parts' table
  says what is in it. Both change only in transactions that the claim's epoch guards.
- A key has a random end and is used once: an upload that a killed worker began and could not write down has a key
  that nothing knows; the next claim aborts it, or it is swept.
- A killed worker's upload is taken up if the store still has every committed part. Otherwise (swept, or the store lost
  it) the checkpoint goes back to where the segment began. This is looked at only when a claim begins, where no lane is
  at work; whoever meets it later ends its claim with UploadLost, and the next one looks.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from export_worker import parts
from export_worker.parts import Piece
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import CountMismatch, Fenced, StoreRefused, UploadLost, UploadMissing
from shared.domain.export_keys import WHOLE, key_of, prefix, segment_of
from shared.domain.task import Task, TaskState
from shared.ports.database import Connection
from shared.ports.kinds import Claim
from shared.ports.objects import Body, Join, ObjectStat, ObjectStore, Part
from shared.ports.tasks import Progress

log = structlog.get_logger()
T = TypeVar("T")

# Parts of one upload after which the next claim begins another: S3 allows 10,000, and each claim may add many.
_ENOUGH_PARTS = 4000
# Times that the same segment is done again before the store is blamed.
_MOST_LOSSES = 5
_LOST = "the object store no longer has the upload as it was sent; its parts will be done again"


@dataclass(frozen=True, slots=True)
class _Upload:
    segment: int
    key: str
    upload_id: str


class Segments:
    """What one claim knows of its task's objects."""

    def __init__(self, claim: Claim, objects: ObjectStore, content_type: str) -> None:
        self._claim = claim
        self._objects = objects
        self._content_type = content_type
        self._task_id = claim.task.task_id
        self._sealed: dict[int, str] = {}
        self._open: _Upload | None = None
        self._joining: _Upload | None = None
        self._join: Join | None = None
        self._whole: str | None = None

    async def take_up(self) -> None:
        """Find what earlier claims left, and make checkpoint and store agree.

        Raises StoreRefused when the store loses the same upload again and again.
        """
        async with self._claim.hold() as connection:
            rows = await connection.fetch(
                "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", self._task_id
            )
        if self._claim.task.epoch > 1:
            await self._drop_unknown({row["object_key"] for row in rows})
        for row in rows:
            key, segment = row["object_key"], segment_of(row["object_key"])
            if row["upload_id"] is not None:
                await self._look_after(_Upload(segment, key, row["upload_id"]))
            elif segment == WHOLE:
                self._whole = key
            else:
                self._sealed[segment] = key

    async def begin(self) -> int:
        """Have an upload open; answers the number of its next part."""
        if self._open is None:
            # Not to be torn apart by a cancel: an upload that is not written down would stay.
            await _to_the_end(self._create(max(self._sealed, default=0) + 1))
        assert self._open is not None
        return len(await self._parts(self._open)) + 1

    async def put(self, number: int, body: Body) -> Part:
        """Send a part. Raises UploadLost."""
        assert self._open is not None, "begin() first"
        try:
            return await self._objects.put_part(self._open.key, self._open.upload_id, number, body)
        except UploadMissing as error:
            raise UploadLost(_LOST) from error

    async def record(self, connection: Connection, part: Part, pieces: Sequence[Piece]) -> None:
        """Note a part, in the transaction that commits it."""
        assert self._open is not None
        await parts.record(connection, self._task_id, self._open.segment, part, pieces)

    async def keep(self, connection: Connection, piece: Piece) -> None:
        """Keep a piece of a part that is not full, in the transaction that commits it."""
        await parts.keep(connection, self._task_id, piece)

    async def before(self) -> tuple[list[Piece], list[Any]]:
        """What the next part begins with, and what the format noted of all that is committed, in order."""
        async with self._claim.hold() as connection:
            kept = await parts.kept(connection, self._task_id)
            details = await parts.details(connection, self._task_id)
        return kept, details + [detail for piece in kept for detail in piece.details]

    async def seal(self) -> None:
        """Make an object of the committed parts, or drop the upload if there are none. Raises UploadLost."""
        if self._open is not None:
            await self._seal(self._open)
            self._open = None

    # --- joining

    async def begin_join(self) -> int:
        """Seal, and have an upload open for what the segments become; answers of how many copies, 0 for no upload."""
        await self.seal()
        if self._whole is not None or len(self._sealed) < 2:
            return 0
        self._join = await self._objects.plan_join([self._sealed[segment] for segment in sorted(self._sealed)])
        if self._joining is None:
            await _to_the_end(self._create(WHOLE))
        return self._join.parts

    async def copy(self, number: int) -> Part:
        """Make a part of the join. Raises UploadLost."""
        assert self._join is not None, "begin_join() first"
        assert self._joining is not None
        try:
            return await self._join.make(self._joining.key, self._joining.upload_id, number)
        except UploadMissing as error:
            raise UploadLost(_LOST) from error

    async def record_copy(self, connection: Connection, part: Part, join_start: int) -> None:
        """Note a copy, in the transaction that commits it. The join as a whole is at position `join_start`."""
        await parts.record(connection, self._task_id, WHOLE, part, [Piece(join_start, join_start)])

    async def rest(self) -> None:
        """Before a pause, not before the end of a slice: give up the join's upload, which must not stay open."""
        if self._joining is None:
            return
        async with self._claim.hold() as connection:
            state = await connection.fetchval("SELECT state FROM sluice.tasks WHERE task_id = $1", self._task_id)
        if state == TaskState.PAUSING:
            await self._undo(self._joining)
            self._joining = None

    async def join(self) -> tuple[str, ObjectStat]:
        """All segments as one object, and its key. Idempotent. Raises CountMismatch and UploadLost."""
        await self.seal()
        if self._joining is not None:
            await self._seal(self._joining)
            self._joining = None
        elif self._whole is None and self._sealed:
            [self._whole] = self._sealed.values()
        elif self._whole is None:
            key = self._new_key(WHOLE)
            await self._enter(key, None)
            self._whole = key
        assert self._whole is not None
        if left := [key for key in self._sealed.values() if key != self._whole]:
            await self._objects.delete(*left)
            async with self._claim.hold() as connection:
                await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = ANY($1)", left)
        async with self._claim.hold() as connection:
            expected = await parts.file_bytes(connection, self._task_id)
        if not expected:
            # Whoever wrote its key down may not have lived to write the object.
            await self._objects.put(self._whole, b"", content_type=self._content_type)
        stat = await self._objects.stat(self._whole)
        if stat.bytes != expected:
            raise CountMismatch(f"the file has {stat.bytes} bytes in the object store; {expected} were written")
        return self._whole, stat

    # --- steps

    def _new_key(self, segment: int) -> str:
        return key_of(self._task_id, segment, secrets.token_hex(4))

    async def _create(self, segment: int) -> None:
        key = self._new_key(segment)
        upload_id = await self._objects.create_upload(key, content_type=self._content_type)
        await self._enter(key, upload_id)
        self._go_on_with(_Upload(segment, key, upload_id))

    def _go_on_with(self, upload: _Upload) -> None:
        if upload.segment == WHOLE:
            self._joining = upload
        else:
            self._open = upload

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

    async def _drop_unknown(self, known: Set[str]) -> None:
        """Abort uploads of workers that died before they could write them down."""
        async for upload in self._objects.list_uploads(prefix(self._task_id)):
            if upload.key not in known:
                await self._objects.abort_upload(upload.key, upload.upload_id)

    async def _look_after(self, upload: _Upload) -> None:
        """Go on with an upload of an earlier claim, or find out what became of it."""
        sent = await self._parts(upload)
        if not sent:
            await self._undo(upload)
            return
        try:
            there = await self._objects.list_parts(upload.key, upload.upload_id)
        except UploadMissing:
            try:
                # Completed by a worker that did not live to note it?
                await self._complete(upload, sent)
            except (UploadMissing, StoreRefused):
                await self._lose(upload)
            return
        # Stores list a copy with another ETag than they gave for it.
        same = set(there).issuperset(sent) if upload.segment != WHOLE else _sizes(there).items() >= _sizes(sent).items()
        if not same:
            await self._lose(upload)
        elif len(sent) >= _ENOUGH_PARTS and upload.segment != WHOLE:
            await self._seal(upload)
        else:
            self._go_on_with(upload)

    async def _seal(self, upload: _Upload) -> None:
        sent = await self._parts(upload)
        if not sent:
            await self._undo(upload)
            return
        try:
            await self._complete(upload, sent)
        except (UploadMissing, StoreRefused) as error:
            raise UploadLost(f"{_LOST} ({error.detail})") from error

    async def _complete(self, upload: _Upload, sent: Sequence[Part]) -> None:
        """Make an object of the parts, and note it. Raises UploadMissing and StoreRefused."""
        await self._objects.complete_upload(upload.key, upload.upload_id, sent)
        # A killed worker's completion may be carried out late, when there were more parts already than it named.
        if (stat := await self._objects.stat(upload.key)).bytes != sum(part.bytes for part in sent):
            raise UploadMissing(f"the object store made an object of only {stat.bytes} bytes of it")
        async with self._claim.hold() as connection:
            await connection.execute(
                "UPDATE sluice.object_ledger SET upload_id = NULL WHERE object_key = $1", upload.key
            )
        if upload.segment == WHOLE:
            self._whole = upload.key
        else:
            self._sealed[upload.segment] = upload.key
        log.info("sealed", segment=upload.segment, parts=len(sent))

    async def _lose(self, upload: _Upload) -> None:
        """The store has lost a segment: do it again. Raises StoreRefused when it does so again and again."""
        async with self._claim.hold() as connection:
            start = (await parts.lost_with(connection, self._task_id, upload.segment)).start
        losses = self._claim.checkpoint.cursor.get("losses", [start, 0])
        times = losses[1] + 1 if losses[0] == start else 1
        # Forgotten when the task is given up, so that a resume gets as many tries.
        await self._undo(upload, {"losses": [start, times if times < _MOST_LOSSES else 0]})
        log.warning("the store lost an upload; its part of the file is done again", segment=upload.segment, times=times)
        if times >= _MOST_LOSSES:
            raise StoreRefused(
                f"the object store lost the same upload {times} times: look whether it expires multipart uploads, then "
                "resume"
            )

    async def _undo(self, upload: _Upload, cursor: dict[str, Any] | None = None) -> None:
        """Drop an upload and whatever became of it; its ranges are missing again."""
        await self._objects.abort_upload(upload.key, upload.upload_id)
        await self._objects.delete(upload.key)

        async def forget(connection: Connection) -> None:
            await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", upload.key)
            await parts.forget_segment(connection, self._task_id, upload.segment)

        if not await self._parts(upload):
            async with self._claim.hold() as connection:
                await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", upload.key)
            return
        async with self._claim.hold() as connection:
            lost = await parts.lost_with(connection, self._task_id, upload.segment)
        before = self._claim.checkpoint
        rows = before.lines_before(before.prefix(0)) - lost.rows
        done = Checkpoint().add(Range(0, lost.start, rows)).done
        after = Checkpoint(done, {**before.cursor, **(cursor or {})})
        await self._claim.go_back(after, Progress(bytes=lost.size, rows=lost.rows), forget)

    async def _parts(self, upload: _Upload) -> list[Part]:
        async with self._claim.hold() as connection:
            return await parts.of_segment(connection, self._task_id, upload.segment)


def _sizes(sent: Sequence[Part]) -> dict[int, int]:
    return {part.number: part.bytes for part in sent}


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
