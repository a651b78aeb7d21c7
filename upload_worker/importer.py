"""The kind `import`: a stored file becomes a load of a dataset."""

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import structlog

from shared.adapters.catalog import (
    Column,
    FinishedLoad,
    compare_columns,
    create_stage,
    disconnect_others,
    drop_load_table,
    find_dataset,
    publish_load,
    set_lock_timeout,
)
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.csv_options import ColumnType
from shared.domain.errors import (
    Conflict,
    CountMismatch,
    LockTimeout,
    NotFound,
    ObjectMissing,
    SourceChanged,
    TooManyRejects,
)
from shared.domain.import_params import FileFormat, ImportParams, Mode, OnError, SchemaMode, SourceFile
from shared.domain.task import LoadId, Task
from shared.ports.database import Connection
from shared.ports.kinds import Batch, Claim
from shared.ports.objects import ObjectStore
from shared.ports.tasks import Progress
from shared.worker import Tools
from upload_worker.formats import OpenFile, format_of, guess_format
from upload_worker.loading import Loader, Reject, keep_rejects
from upload_worker.plan import Column as PlannedColumn
from upload_worker.plan import FilePlan
from upload_worker.sources import RangeReader

log = structlog.get_logger()

# An abort waits this long for the batches in flight to notice; then their sessions are disconnected.
_GRACE_SECONDS = 0.1
_LOCK_SECONDS = 5.0


class FileImport:
    """The `TaskKind` of imports."""

    def __init__(self, tools: Tools) -> None:
        self._database = tools.database
        self._objects = tools.objects
        self._batch_bytes = tools.settings.batch_bytes

    @asynccontextmanager
    async def open(self, claim: Claim) -> AsyncIterator["ImportJob"]:
        params = ImportParams.model_validate(claim.task.params)
        reader = _pinned_reader(self._objects, params.source)
        if claim.task.plan is None:
            file = await self._plan(claim, params, reader)
        else:
            format_ = format_of(FileFormat(claim.task.plan["format"]))
            plan = format_.restore(claim.task.plan["file"])
            file = format_.open(reader, params.source.bytes, plan, claim.checkpoint.cursor, self._batch_bytes)
        yield ImportJob(claim, params, file)

    async def discard(self, task: Task) -> None:
        """An import leaves nothing outside PostgreSQL."""

    async def undo(self, task: Task, connection: Connection) -> None:
        load_id = LoadId(task.task_id)
        await set_lock_timeout(connection, _GRACE_SECONDS)
        try:
            async with connection.transaction():
                await drop_load_table(connection, load_id)
        except LockTimeout:
            log.info("disconnecting who still writes", sessions=await disconnect_others(connection, load_id))
            await set_lock_timeout(connection, _LOCK_SECONDS)
            await drop_load_table(connection, load_id)
        await connection.execute("DELETE FROM sluice.rejects WHERE task_id = $1", task.task_id)

    async def _plan(self, claim: Claim, params: ImportParams, reader: RangeReader) -> OpenFile:
        size = params.source.bytes
        name = params.format or await guess_format(reader, size)
        format_ = format_of(name)
        plan = await format_.look(reader, size, params)
        async with self._database.connection() as connection:
            plan = await _fitted(connection, claim.task, params, plan)
        columns = _columns(plan)
        file = format_.open(reader, size, plan, {}, self._batch_bytes)

        async def prepare(connection: Connection) -> None:
            await create_stage(connection, LoadId(claim.task.task_id), columns)

        await claim.save_plan(
            {"format": name, "file": plan.model_dump(mode="json")},
            prepare,
            bytes_total=file.bytes_total,
            rows_total=file.rows_total,
        )
        log.info("planned", format=name, columns=len(columns), notes=len(plan.notes))
        return file


class ImportJob:
    """The `Job` of one claimed import."""

    def __init__(self, claim: Claim, params: ImportParams, file: OpenFile) -> None:
        self._claim = claim
        self._params = params
        self._file = file
        self._load_id = LoadId(claim.task.task_id)
        self._loader = Loader(self._load_id, [column.name for column in file.plan.columns], file.copy_options)
        self._rejects = claim.task.rejects

    async def batches(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        cut_lines = 0
        for start, end in checkpoint.missing(self._file.start, self._file.end):
            line = self._file.first_line + checkpoint.lines_before(start) + cut_lines
            pieces = self._file.pieces(start, end, line)
            async with aclosing(pieces):
                async for piece in pieces:
                    cut_lines += piece.lines
                    yield Batch(piece.start, piece.end, piece, self._file.bytes_of(piece))

    async def run(self, batch: Batch) -> None:
        piece = batch.payload
        async with self._claim.batch() as work:
            rejects = 0
            if self._params.on_error is OnError.SKIP:
                rows, rejected = await self._loader.load_good(work.connection, piece, self._count_reject)
                rejects = len(rejected)
                if rejected:
                    await keep_rejects(work.connection, self._claim.task.task_id, rejected)
            else:
                rows = await self._loader.load(work.connection, piece)
            expected = self._file.expected_bytes(piece)
            progress = Progress(bytes=batch.bytes, rows=rows, rejects=rejects, bytes_total=expected)
            cursor = self._file.cursor(self._claim.checkpoint.prefix(self._file.start))
            work.done(Range(batch.start, batch.end, piece.lines), progress, cursor)

    def _count_reject(self, reject: Reject) -> None:
        self._rejects += 1
        if self._rejects > self._params.max_rejects:
            raise TooManyRejects(
                f"more than max_rejects ({self._params.max_rejects}) records cannot be loaded; the last, line "
                f"{reject.line}: {reject.reason}. Look at the task's rejects, correct the file or the import's "
                "options, or allow more",
                line=reject.line,
            )

    async def seal(self) -> None:
        """Nothing is open between batches."""

    async def finish(self) -> None:
        done, start, end = self._claim.checkpoint, self._file.start, self._file.end
        if len(done.done) > 1 or (end is not None and not done.covers(min(start, end), end)):
            raise CountMismatch(f"the batches done do not cover the file: {done.done}")

    async def publish(self, connection: Connection) -> dict[str, Any]:
        await disconnect_others(connection, self._load_id)
        counted = await connection.fetchrow(
            "SELECT rows_done, rejects, bytes_done FROM sluice.tasks WHERE task_id = $1", self._claim.task.task_id
        )
        assert counted is not None, "the row is locked by this transaction"
        load = FinishedLoad(
            load_id=self._load_id,
            account_id=self._claim.task.account_id,
            rows=counted["rows_done"],
            rejects=counted["rejects"],
            bytes=counted["bytes_done"],
            columns=_columns(self._file.plan),
            file_id=self._params.source.file_id,
            file_name=self._params.source.name,
        )
        result = await publish_load(
            connection,
            load,
            self._params.dataset,
            mode=self._params.mode,
            evolve=self._params.schema_mode is SchemaMode.EVOLVE,
            lock_seconds=_LOCK_SECONDS,
        )
        return {**result, "notes": self._file.plan.notes}


def _columns(plan: FilePlan) -> tuple[Column, ...]:
    return tuple(Column(column.name, str(column.type)) for column in plan.columns)


async def _fitted(connection: Connection, task: Task, params: ImportParams, plan: FilePlan) -> FilePlan:
    """Check early what publishing will check again; appended columns take the dataset's types, not guesses.

    Raises Conflict, NotFound or SchemaMismatch.
    """
    dataset = await find_dataset(connection, task.account_id, params.dataset)
    if params.mode is Mode.CREATE and dataset is not None:
        raise Conflict(f"there is a dataset {params.dataset!r} already; import with mode append or replace")
    if params.mode is not Mode.APPEND:
        return plan
    if dataset is None:
        raise NotFound(f"there is no dataset {params.dataset!r} to append to; import with mode create")
    asked = _asked_types(params)
    theirs = {column.name: column.type for column in dataset.columns}
    names = [column.name for column in plan.columns]
    if not plan.names_columns and len(names) == len(theirs) and not (params.columns or params.csv.columns):
        names = list(theirs)
    columns = [
        column.model_copy(
            update={
                "name": name,
                "type": ColumnType(theirs[name]) if name in theirs and name not in asked else column.type,
            }
        )
        for name, column in zip(names, plan.columns, strict=True)
    ]
    if plan.is_sparse:
        columns += [
            PlannedColumn(name=name, type=ColumnType(type_), source_name=name)
            for name, type_ in theirs.items()
            if name not in names
        ]
    plan = plan.model_copy(update={"columns": columns})
    compare_columns(dataset.columns, _columns(plan), evolve=params.schema_mode is SchemaMode.EVOLVE)
    return plan


def _asked_types(params: ImportParams) -> set[str]:
    columns = params.columns or params.csv.columns or {}
    if isinstance(columns, dict):
        return set(columns)
    return {column.name for column in columns if column.name and column.type}


def _pinned_reader(objects: ObjectStore, source: SourceFile) -> RangeReader:
    """Reads the object as it was when the task was accepted. Raises SourceChanged when it no longer is."""

    async def read(start: int, end: int | None) -> AsyncIterator[bytes]:
        end = source.bytes if end is None else min(end, source.bytes)
        if start >= end:
            return
        try:
            async with aclosing(objects.read(source.object_key, etag=source.etag, start=start, end=end)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except (ObjectMissing, SourceChanged) as error:
            raise SourceChanged(
                f"the stored bytes of file {source.name!r} are gone or not the same any more; abort this task, upload "
                "the file again and start a new import"
            ) from error

    return read
