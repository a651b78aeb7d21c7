"""One batch into the load's table: COPY of the raw bytes, and bad records found and set aside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shared.adapters.catalog import LOADS_SCHEMA, load_table
from shared.domain.errors import BadRecord, CountMismatch
from shared.domain.task import LoadId, TaskId
from shared.ports.database import Connection
from upload_worker.cutter import Batch
from upload_worker.plan import CsvPlan
from upload_worker.records import last_record_end, printable, record_at_line

# What is sent again after a bad record was found: small enough that many bad ones do not make it quadratic.
_SMALLEST_WINDOW = 64 << 10
# A reject keeps this much of its record.
RAW_CHARACTERS = 64 << 10


@dataclass(frozen=True, slots=True)
class Reject:
    line: int
    column: str | None
    reason: str
    raw: str


class Loader:
    """Loads batches of one file into one load's table."""

    def __init__(self, load_id: LoadId, plan: CsvPlan) -> None:
        self._table = load_table(load_id)
        self._plan = plan
        self._columns = [column.name for column in plan.columns]
        self._options: dict[str, Any] = {
            "format": "csv",
            "delimiter": plan.dialect.delimiter,
            "quote": plan.dialect.quote,
            "escape": plan.dialect.escape,
            "null": plan.null,
            "force_null": plan.force_null or None,
        }

    async def load(self, connection: Connection, batch: Batch) -> int:
        """Load all records of the batch; answers the rows. Raises BadRecord with the line in the file."""
        if batch.open_quote:
            raise BadRecord(_UNCLOSED.format(line=batch.line), line=batch.line)
        if not batch.data:
            return 0
        try:
            rows = await self._copy(connection, batch.data)
        except BadRecord as error:
            raise _placed(error, batch) from error
        self._check(batch, rows)
        return rows

    async def load_good(self, connection: Connection, batch: Batch) -> tuple[int, list[Reject]]:
        """Load the records that can be loaded; answers the rows and the rejects."""
        if batch.open_quote:
            reason = _UNCLOSED.format(line=batch.line)
            return 0, [Reject(batch.line, None, reason, printable(batch.data[:RAW_CHARACTERS].rstrip(b"\r\n")))]
        data, dialect = batch.data, batch.dialect
        rows, rejects = 0, list[Reject]()
        position, window = 0, len(data)
        while position < len(data):
            piece = data[position:]
            if window < len(piece):
                piece = piece[: last_record_end(piece[:window], dialect) or len(piece)]
            try:
                async with connection.transaction():
                    rows += await self._copy(connection, piece)
            except BadRecord as error:
                found = record_at_line(piece, dialect, error.extra["line"])
                if found is None:
                    raise
                start, end = found
                if start:
                    rows += await self._copy(connection, piece[:start])
                line = batch.line_of(position + start)
                raw = printable(piece[start : min(end, start + RAW_CHARACTERS)].rstrip(b"\r\n"))
                rejects.append(Reject(line, error.extra["column"], error.detail, raw))
                position += end
                window = max(_SMALLEST_WINDOW, window // 4)
            else:
                position += len(piece)
                window *= 4
        self._check(batch, rows + len(rejects))
        return rows, rejects

    async def _copy(self, connection: Connection, data: bytes) -> int:
        return await connection.copy_in(LOADS_SCHEMA, self._table, data, columns=self._columns, **self._options)

    @staticmethod
    def _check(batch: Batch, count: int) -> None:
        if not batch.holds(count):
            raise CountMismatch(
                f"of bytes {batch.start} to {batch.end} of the file {batch.records} records were cut, but PostgreSQL "
                f"counted {count}; the csv options (quote, escape) probably do not fit the file"
            )


async def keep_rejects(connection: Connection, task_id: TaskId, rejects: Sequence[Reject]) -> None:
    await connection.copy_records(
        "sluice",
        "rejects",
        ["task_id", "line", "column_name", "reason", "raw"],
        [(task_id, reject.line, reject.column, reject.reason, reject.raw) for reject in rejects],
    )


_UNCLOSED = (
    "the record that begins on line {line} has a quote that is never closed; correct it there, or set csv.quote "
    "and csv.escape to what the file uses"
)


def _placed(error: BadRecord, batch: Batch) -> BadRecord:
    """The error with the line of the file on which its record begins."""
    found = record_at_line(batch.data, batch.dialect, error.extra["line"])
    line, column = batch.line_of(found[0]) if found else batch.line, error.extra["column"]
    where = f"line {line}" + (f", column {column}" if column else "")
    return BadRecord(
        f"{where}: {error.detail}. Correct the file, name another type in csv.columns, or import with on_error skip",
        line=line,
        column=column,
        sqlstate=error.extra.get("sqlstate"),
    )
