"""The kind `export`: rows of a dataset become a file."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import structlog

from export_worker import formats, snapshot, survey
from export_worker.formats.format import Encoded, Format
from export_worker.parts import Piece
from export_worker.publishing import check_name, publish_file
from export_worker.reading import Chunk, Reader
from export_worker.segments import Segments, discard
from export_worker.selection import select
from export_worker.snapshot import HEAD, Plan
from shared.adapters.sessions import ClaimSessions
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import CountMismatch
from shared.domain.export_params import ExportRequest
from shared.domain.task import Task
from shared.multipart import part_size
from shared.ports.database import Connection
from shared.ports.kinds import Batch, Claim, Job
from shared.ports.objects import ObjectStat, Part
from shared.ports.tasks import Progress
from shared.worker import Tools

log = structlog.get_logger()

# One answer of the server may be this many parts long before the range is read in halves.
_MOST_PARTS = 4
# The end of a slice begins another upload: only one that lasts for 64 GB needs larger parts for its 10,000.
_EQUAL_PARTS, _GROWTH_STEP = 8000, 400


class Export:
    """The `TaskKind` of exports."""

    def __init__(self, tools: Tools) -> None:
        self._database = tools.database
        self._objects = tools.objects
        self._part_bytes = tools.settings.part_bytes
        self._ahead = tools.settings.lanes
        # Whoever loses a worker shall wait about as long for what it had read as for its lease.
        self._keep_seconds = tools.settings.lease_seconds / 4

    @asynccontextmanager
    async def open(self, claim: Claim) -> AsyncIterator[Job]:
        params = ExportRequest.model_validate(claim.task.params)
        if claim.task.plan is None:
            plan = await self._plan(claim, params)
        else:
            plan = Plan.model_validate(claim.task.plan)
        if survey.is_needed(params, plan):
            yield survey.SurveyedJob(lambda: self._surveyed(claim, params))
        else:
            yield await self._job(claim, params, plan)

    async def _surveyed(self, claim: Claim, params: ExportRequest) -> "ExportJob":
        async def keep(plan: Plan) -> None:
            await claim.save_plan(plan.model_dump(mode="json"), rows_total=plan.rows_known)

        plan = Plan.model_validate(claim.task.plan)
        sessions = ClaimSessions(self._database, claim.task)
        return await self._job(claim, params, await survey.survey(sessions, params, plan, keep))

    async def _job(self, claim: Claim, params: ExportRequest, plan: Plan) -> "ExportJob":
        form = formats.make(params.format, plan.columns, params.csv, plan.digits)
        segments = Segments(claim, self._objects, form.content_type)
        await segments.take_up()
        reader = Reader(
            ClaimSessions(self._database, claim.task),
            plan,
            select(params, plan.types),
            form,
            ahead=self._ahead,
            most_bytes=_MOST_PARTS * plan.part_bytes,
        )
        return ExportJob(claim, params, plan, form, reader, segments, keep_seconds=self._keep_seconds)

    async def discard(self, task: Task) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task.task_id
            )
        await discard(self._objects, task, [(row["object_key"], row["upload_id"]) for row in rows])

    async def undo(self, task: Task, connection: Connection) -> None:
        # The ledger stays for the sweeper: what the store was asked before may still be carried out.
        await _forget(connection, task)

    async def _plan(self, claim: Claim, params: ExportRequest) -> Plan:
        async with self._database.connection() as connection:
            plan = await snapshot.take(connection, claim.task, params, part_bytes=self._part_bytes)
            await check_name(connection, claim.task.account_id, plan.file_name, overwrite=params.overwrite)
        survey.check_rows(params, plan.rows_known)

        async def prepare(connection: Connection) -> None:
            await snapshot.pin(connection, claim.task, plan)

        await claim.save_plan(plan.model_dump(mode="json"), prepare, rows_total=plan.rows_known)
        log.info("planned", loads=len(plan.loads), columns=len(plan.columns))
        return plan


@dataclass(slots=True)
class _Outgoing:
    """One batch: the last of the pieces is new. Together they are part `number`, or (None) not enough for one yet."""

    number: int | None
    pieces: list[Piece]
    part: Part | None = None

    @property
    def new(self) -> Piece:
        return self.pieces[-1]


@dataclass(frozen=True, slots=True)
class _Copy:
    """A batch that makes part `number` of the join."""

    number: int


class ExportJob:
    """The `Job` of one claimed export.

    Parts are sent side by side and committed in order. So what is done is always one range from the start, the next
    part's number follows from it, and a worker that dies costs at most the parts that were on their way. Where a
    scan finds so little that a part takes long to fill, what there is of it is kept in PostgreSQL.
    """

    def __init__(
        self,
        claim: Claim,
        params: ExportRequest,
        plan: Plan,
        form: Format,
        reader: Reader,
        segments: Segments,
        *,
        keep_seconds: float,
    ) -> None:
        self._claim = claim
        self._params = params
        self._plan = plan
        self._format = form
        self._reader = reader
        self._segments = segments
        self._bytes = claim.task.bytes_done
        self._rows = claim.task.rows_done
        self._keep_seconds = keep_seconds
        self._gathered: Piece | None = None
        self._gathered_since = 0.0
        self._sent: dict[int, _Outgoing] = {}
        self._in_order = asyncio.Lock()
        self._all_committed = asyncio.Event()
        self._file: tuple[str, ObjectStat] | None = None

    async def batches(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        end = self._plan.end
        if checkpoint.prefix(0) < end:
            async with aclosing(self._read(checkpoint)) as batches:  # type: ignore[type-var]
                async for batch in batches:
                    yield batch
            # Only then it is known what is to be joined.
            await self._all_committed.wait()
        copies = await self._segments.begin_join()
        # Their positions follow those of the file.
        for start, stop in checkpoint.missing(end, end + copies):
            for position in range(start, stop or start):
                yield Batch(position, position + 1, _Copy(position - end + 1), 0)

    async def _read(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        """The parts of the file, and what is kept of one that takes long to fill."""
        # What was sent by a pump that was stopped before its turn came has not counted.
        self._sent.clear()
        start = checkpoint.prefix(0)
        number = await self._segments.begin()
        kept, details = await self._segments.before()
        piece = self._gather(start)
        async with aclosing(self._chunks(start, checkpoint.lines_before(start), details)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                _add(piece, chunk)
                there = sum(earlier.size for earlier in kept) + piece.size
                ends = chunk.end == self._plan.end
                if there and (
                    ends or there >= part_size(number, self._plan.part_bytes, equal=_EQUAL_PARTS, step=_GROWTH_STEP)
                ):
                    outgoing = _Outgoing(number, [*kept, piece])
                    number += 1
                    kept = []
                elif ends or self._gathered_seconds() > self._keep_seconds:
                    # One of its own: the part that it becomes a piece of may be sent before this is committed.
                    outgoing = _Outgoing(None, [replace(piece)])
                    if piece.size:
                        kept.append(piece)
                else:
                    continue
                self._gathered = None
                yield Batch(piece.start, piece.end, outgoing, piece.size)
                piece = self._gather(chunk.end)

    async def run(self, batch: Batch) -> None:
        outgoing: _Outgoing | _Copy = batch.payload
        if isinstance(outgoing, _Copy):
            await self._copy(outgoing.number, Range(batch.start, batch.end))
            return
        if outgoing.number is not None:
            body = [data for piece in outgoing.pieces for data in piece.body]
            outgoing.part = await self._segments.put(outgoing.number, body)
            # Their turn to be committed may come later; their bytes need not wait for it.
            body.clear()
            for piece in outgoing.pieces:
                piece.body = []
        self._sent[batch.start] = outgoing
        async with self._in_order:
            await self._commit()

    async def seal(self) -> None:
        gathered, self._gathered = self._gathered, None
        # What was read in no time is read again sooner than kept.
        if gathered and gathered.end > gathered.start and self._gathered_seconds() > self._keep_seconds / 5:
            self._sent[gathered.start] = _Outgoing(None, [gathered])
            await self._commit()
        await self._segments.seal()
        await self._segments.rest()

    async def finish(self) -> None:
        if not self._claim.checkpoint.covers(0, self._plan.end):
            raise CountMismatch(f"the parts written do not cover the dataset: {self._claim.checkpoint.done}")
        self._file = await self._segments.join()

    async def publish(self, connection: Connection) -> dict[str, Any]:
        assert self._file is not None, "finish() comes first"
        key, stat = self._file
        task = self._claim.task
        file_id = await publish_file(
            connection,
            task,
            self._plan.file_name,
            key,
            stat,
            content_type=self._format.content_type,
            overwrite=self._params.overwrite,
        )
        await connection.execute("DELETE FROM sluice.object_ledger WHERE task_id = $1", task.task_id)
        await _forget(connection, task)
        return {
            "file_id": file_id,
            "file_name": self._plan.file_name,
            "format": self._params.format,
            "bytes": stat.bytes,
            "rows": self._rows,
            "dataset": self._plan.dataset,
            "loads": [load.load_id for load in self._plan.loads],
        }

    async def _chunks(self, position: int, rows_before: int, details: list[Any]) -> AsyncIterator[Chunk]:
        """The file from `position` on; `details` are those of what is before, and grow."""
        async with aclosing(self._content(position, rows_before)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                if chunk.encoded.detail is not None:
                    details.append(chunk.encoded.detail)
                yield chunk
        tail = await self._format.tail(details)
        yield Chunk(self._plan.data_end, self._plan.end, 0, Encoded(tail))

    async def _content(self, position: int, rows_before: int) -> AsyncIterator[Chunk]:
        if position < HEAD:
            chunk = await self._reader.head()
            yield chunk
            position = chunk.end
        if position < self._plan.data_end:
            left = None if self._params.limit is None else max(0, self._params.limit - rows_before)
            async with aclosing(self._reader.chunks(position, left)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    yield chunk

    async def _commit(self) -> None:
        """Commit the parts that are next in order; a later part waits for the lane that has the one before."""
        position = self._claim.checkpoint.prefix(0)
        ready: list[_Outgoing] = []
        while position in self._sent:
            ready.append(self._sent.pop(position))
            position = ready[-1].new.end
        if not ready:
            return
        rows = sum(outgoing.new.rows for outgoing in ready)
        size = sum(outgoing.new.size for outgoing in ready)
        done = Range(ready[0].new.start, position, rows)
        async with self._claim.batch() as work:
            for outgoing in ready:
                if outgoing.part is not None:
                    await self._segments.record(work.connection, outgoing.part, outgoing.pieces)
                elif outgoing.new.size:
                    await self._segments.keep(work.connection, outgoing.new)
            work.done(done, self._progress(done, size))
        self._bytes += size
        self._rows += rows
        if position == self._plan.end:
            self._all_committed.set()

    async def _copy(self, number: int, where: Range) -> None:
        part = await self._segments.copy(number)
        async with self._claim.batch() as work:
            await self._segments.record_copy(work.connection, part, self._plan.end)
            work.done(where, Progress(0, 0))

    def _gather(self, position: int) -> Piece:
        self._gathered, self._gathered_since = Piece(position, position), monotonic()
        return self._gathered

    def _gathered_seconds(self) -> float:
        return monotonic() - self._gathered_since

    def _progress(self, done: Range, size: int) -> Progress:
        """The totals as the part that was written lets one guess them; at the end they are exact."""
        share = done.end / self._plan.end
        rows_total = self._plan.rows_known
        if rows_total is None or done.end == self._plan.end:
            rows_total = round((self._rows + done.lines) / share)
        if self._params.limit:
            share = max(share, (self._rows + done.lines) / self._params.limit)
            rows_total = min(rows_total, self._params.limit)
        return Progress(
            bytes=size, rows=done.lines, bytes_total=round((self._bytes + size) / share), rows_total=rows_total
        )


def _add(piece: Piece, chunk: Chunk) -> None:
    piece.end = chunk.end
    piece.rows += chunk.rows
    piece.size += len(chunk.encoded.data)
    piece.body.append(chunk.encoded.data)
    if chunk.encoded.detail is not None:
        piece.details.append(chunk.encoded.detail)


async def _forget(connection: Connection, task: Task) -> None:
    """What the task noted for itself."""
    await connection.execute("DELETE FROM sluice.export_parts WHERE task_id = $1", task.task_id)
    await connection.execute("DELETE FROM sluice.export_remainders WHERE task_id = $1", task.task_id)
    await connection.execute("DELETE FROM sluice.load_pins WHERE task_id = $1", task.task_id)
