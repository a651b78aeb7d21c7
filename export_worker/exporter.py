"""The kind `export`: rows of a dataset become a file."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog

from export_worker import formats, snapshot
from export_worker.formats.format import Encoded, Format
from export_worker.publishing import check_name, publish_file
from export_worker.reading import Chunk, Reader
from export_worker.segments import Segments, WrittenPart, discard
from export_worker.selection import select
from export_worker.snapshot import HEAD, Plan
from export_worker.survey import survey
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import CountMismatch
from shared.domain.export_params import ExportRequest
from shared.domain.task import Task
from shared.multipart import part_size
from shared.ports.database import Connection
from shared.ports.kinds import Batch, Claim
from shared.ports.objects import ObjectStat, Part
from shared.ports.tasks import Progress
from shared.worker import Tools

log = structlog.get_logger()

# One answer of the server may be this many parts long before the range is read in halves.
_MOST_PARTS = 4


class Export:
    """The `TaskKind` of exports."""

    def __init__(self, tools: Tools) -> None:
        self._database = tools.database
        self._objects = tools.objects
        self._part_bytes = tools.settings.part_bytes
        self._ahead = tools.settings.lanes

    @asynccontextmanager
    async def open(self, claim: Claim) -> AsyncIterator["ExportJob"]:
        params = ExportRequest.model_validate(claim.task.params)
        if claim.task.plan is None:
            plan = await self._plan(claim, params)
        else:
            plan = Plan.model_validate(claim.task.plan)
        form = formats.make(params.format, plan.columns, params.csv, plan.digits)
        segments = Segments(claim, self._objects, form.content_type)
        await segments.take_up()
        reader = Reader(
            self._database,
            plan,
            select(params, plan.types),
            form,
            ahead=self._ahead,
            most_bytes=_MOST_PARTS * plan.part_bytes,
        )
        yield ExportJob(claim, params, plan, form, reader, segments)

    async def discard(self, task: Task) -> None:
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task.task_id
            )
        await discard(self._objects, task, [(row["object_key"], row["upload_id"]) for row in rows])

    async def undo(self, task: Task, connection: Connection) -> None:
        await _forget(connection, task)

    async def _plan(self, claim: Claim, params: ExportRequest) -> Plan:
        async with self._database.connection() as connection:
            plan = await snapshot.take(connection, claim.task, params, part_bytes=self._part_bytes)
            await check_name(connection, claim.task.account_id, plan.file_name, overwrite=params.overwrite)
        plan = await survey(self._database, params, plan)

        async def prepare(connection: Connection) -> None:
            await snapshot.pin(connection, claim.task, plan)

        await claim.save_plan(plan.model_dump(mode="json"), prepare, rows_total=plan.rows_known)
        log.info("planned", loads=len(plan.loads), columns=len(plan.columns))
        return plan


@dataclass(slots=True)
class _Outgoing:
    """A part on its way: filled chunk by chunk, then sent."""

    number: int
    start: int
    end: int
    rows: int = 0
    size: int = 0
    body: list[bytes] = field(default_factory=list)
    details: list[Any] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        self.end = chunk.end
        self.rows += chunk.rows
        self.size += len(chunk.encoded.data)
        self.body.append(chunk.encoded.data)
        if chunk.encoded.detail is not None:
            self.details.append(chunk.encoded.detail)

    def written(self, part: Part | None) -> WrittenPart:
        return WrittenPart(self.start, self.end, self.rows, self.details, part)


class ExportJob:
    """The `Job` of one claimed export.

    Parts are sent side by side and committed in order. So what is done is always one range from the start, the next
    part's number follows from it, and a worker that dies costs at most the parts that were on their way.
    """

    def __init__(
        self,
        claim: Claim,
        params: ExportRequest,
        plan: Plan,
        form: Format,
        reader: Reader,
        segments: Segments,
    ) -> None:
        self._claim = claim
        self._params = params
        self._plan = plan
        self._format = form
        self._reader = reader
        self._segments = segments
        self._bytes = claim.task.bytes_done
        self._rows = claim.task.rows_done
        self._sent: dict[int, tuple[_Outgoing, Part | None]] = {}
        self._in_order = asyncio.Lock()
        self._file: tuple[str, ObjectStat] | None = None

    async def batches(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        # What was sent by a pump that was stopped before its turn came has not counted.
        self._sent.clear()
        start = checkpoint.prefix(0)
        if start == self._plan.end:
            return
        number = await self._segments.begin()
        part = _Outgoing(number, start, start)
        async with aclosing(self._chunks(start, checkpoint.lines_before(start))) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                part.add(chunk)
                if part.size >= part_size(number, self._plan.part_bytes) or chunk.end == self._plan.end:
                    yield Batch(part.start, part.end, part, part.size)
                    number += 1
                    part = _Outgoing(number, chunk.end, chunk.end)

    async def run(self, batch: Batch) -> None:
        outgoing: _Outgoing = batch.payload
        part = None
        if outgoing.size:
            part = await self._segments.put(outgoing.number, outgoing.body)
            outgoing.body.clear()
        self._sent[outgoing.start] = outgoing, part
        async with self._in_order:
            await self._commit()

    async def seal(self) -> None:
        await self._segments.seal()

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

    async def _chunks(self, position: int, rows_before: int) -> AsyncIterator[Chunk]:
        """The file from `position` on."""
        details = await self._segments.details()
        if position < HEAD:
            chunk = await self._reader.head()
            if chunk.encoded.detail is not None:
                details.append(chunk.encoded.detail)
            yield chunk
            position = chunk.end
        if position < self._plan.data_end:
            left = None if self._params.limit is None else max(0, self._params.limit - rows_before)
            async with aclosing(self._reader.chunks(position, left)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    if chunk.encoded.detail is not None:
                        details.append(chunk.encoded.detail)
                    yield chunk
        tail = await self._format.tail(details)
        yield Chunk(self._plan.data_end, self._plan.end, 0, Encoded(tail))

    async def _commit(self) -> None:
        """Commit the parts that are next in order; a later part waits for the lane that has the one before."""
        position = self._claim.checkpoint.prefix(0)
        ready: list[tuple[_Outgoing, Part | None]] = []
        while position in self._sent:
            ready.append(self._sent.pop(position))
            position = ready[-1][0].end
        if not ready:
            return
        rows = sum(outgoing.rows for outgoing, _ in ready)
        size = sum(outgoing.size for outgoing, _ in ready)
        done = Range(ready[0][0].start, position, rows)
        async with self._claim.batch() as work:
            for outgoing, part in ready:
                if part is not None:
                    await self._segments.record(work.connection, outgoing.number, outgoing.written(part))
            work.done(done, self._progress(done, size))
        self._bytes += size
        self._rows += rows

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


async def _forget(connection: Connection, task: Task) -> None:
    """What the task noted for itself: from here on its objects have another owner, or are gone."""
    await connection.execute("DELETE FROM sluice.object_ledger WHERE task_id = $1", task.task_id)
    await connection.execute("DELETE FROM sluice.export_parts WHERE task_id = $1", task.task_id)
    await connection.execute("DELETE FROM sluice.load_pins WHERE task_id = $1", task.task_id)
