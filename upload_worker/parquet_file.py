"""Parquet: row groups are decoded a few rows at a time and written as CSV for COPY, in threads.

Considerations
- A position is a row number. Going on in the middle of a row group decodes that group from its beginning.
- Pages are read through small buffers, so memory is bound by the buffers, one page and one dictionary of each column,
  and not by the row group. A file may still ask for one huge page; Arrow has no limit for that.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from shared.domain.errors import InvalidData
from shared.domain.import_params import ImportParams
from upload_worker.loading import RAW_CHARACTERS, Piece, Reject
from upload_worker.parquet_schema import columns_of, writable
from upload_worker.plan import Dialect, FilePlan, ParquetPlan
from upload_worker.ranged_file import RangedFile
from upload_worker.records import Forward, last_record_end, printable, record_at_line, record_count
from upload_worker.sources import RangeReader

_BUFFERS_BYTES = 32 << 20
_LARGEST_BUFFER_BYTES = 1 << 20
_SMALLEST_BUFFER_BYTES = 16 << 10
# Written as CSV at a time: small beside a batch.
_DECODED_BYTES = 1 << 20
# Decoded at a time: what a footer says of the size of rows is their size while a dictionary or a prefix stands for
# them, and a file of 3 KB can hold gigabytes. So few rows that long ones do no harm; fewer would cost time.
_DECODED_ROWS = 128

_DIALECT = Dialect()
_CSV = pa.csv.WriteOptions(include_header=False, quoting_style="needed")

T = TypeVar("T")


@dataclass(frozen=True)
class ParquetPiece:
    start: int
    end: int
    data: bytes
    lines: int = 0
    rejects: list[Reject] = field(default_factory=list)

    def holds(self, rows: int) -> bool:
        return rows == self.end - self.start

    def records_end(self, start: int, size: int) -> int:
        end = last_record_end(self.data[start : start + size], _DIALECT)
        return start + end if end else 0

    def record_at(self, start: int, end: int, line: int) -> tuple[int, int] | None:
        found = record_at_line(self.data[start:end], _DIALECT, line)
        return (start + found[0], start + found[1]) if found else None

    def source_of(self, start: int, end: int) -> tuple[int, str]:
        row = self.start + self._records.before(start) + 1
        return row, printable(self.data[start:end][:RAW_CHARACTERS].rstrip(b"\r\n"))

    @cached_property
    def _records(self) -> Forward:
        return Forward(self.data, lambda data: record_count(data, _DIALECT))


class ParquetFormat:
    async def look(self, reader: RangeReader, size: int, params: ImportParams) -> ParquetPlan:
        with RangedFile(reader, size) as stored:
            file = await asyncio.to_thread(_opened, stored, 1)
            columns, notes = columns_of(file.schema_arrow, params.columns)
            if not columns:
                raise InvalidData("The Parquet file has no columns.")
            return ParquetPlan(columns=columns, notes=notes, rows=file.metadata.num_rows)

    def restore(self, plan: Mapping[str, Any]) -> ParquetPlan:
        return ParquetPlan.model_validate(plan)

    def open(
        self, reader: RangeReader, size: int, plan: FilePlan, cursor: Mapping[str, Any], batch_bytes: int
    ) -> "ParquetFile":
        return ParquetFile(reader, size, cast(ParquetPlan, plan), batch_bytes)


class ParquetFile:
    start = 0
    first_line = 0
    copy_options: Mapping[str, Any] = {"format": "csv"}

    def __init__(self, reader: RangeReader, size: int, plan: ParquetPlan, batch_bytes: int) -> None:
        self.plan = plan
        self._reader = reader
        self._size = size
        self._batch_bytes = batch_bytes

    @property
    def end(self) -> int:
        return self.plan.rows

    @property
    def rows_total(self) -> int:
        return self.plan.rows

    @property
    def bytes_total(self) -> int:
        return self._size

    def bytes_of(self, piece: Piece) -> int:
        """The share of the stored object, so that all pieces together are the whole of it."""
        return self._size * piece.end // self.end - self._size * piece.start // self.end

    def expected_bytes(self, piece: Piece) -> None:
        return None

    def cursor(self, position: int) -> None:
        return None

    async def pieces(self, start: int, end: int | None, line: int) -> AsyncGenerator[ParquetPiece, None]:
        # Closed when this is left early: a thread that still decodes fails at its next read, and nobody waits for it.
        with RangedFile(self._reader, self._size) as stored:
            file = await asyncio.to_thread(_opened, stored, len(self.plan.columns))
            pieces = _pieces(file, start, self.end if end is None else end, self._batch_bytes)
            while piece := await asyncio.to_thread(_understood, stored, lambda: next(pieces, None)):
                yield piece


def _opened(stored: RangedFile, columns: int) -> pq.ParquetFile:
    buffer_bytes = min(_LARGEST_BUFFER_BYTES, max(_SMALLEST_BUFFER_BYTES, _BUFFERS_BYTES // columns))
    return _understood(
        stored,
        lambda: pq.ParquetFile(stored, buffer_size=buffer_bytes, pre_buffer=False, arrow_extensions_enabled=True),
    )


def _understood(stored: RangedFile, read: Callable[[], T]) -> T:
    """Errors of the store stay what they are; all others mean that the file is broken. Raises InvalidData."""
    try:
        return read()
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        if stored.error is not None:
            raise stored.error from error
        raise InvalidData(
            f"The Parquet file cannot be read: {str(error).splitlines()[0]}. It is cut off or damaged: upload it again."
        ) from error


def _pieces(file: pq.ParquetFile, start: int, end: int, batch_bytes: int) -> Iterator[ParquetPiece]:
    """Pieces of about `batch_bytes` for the rows `[start, end)`."""
    text, size, position = list[bytes](), 0, start
    row = start
    for rows in _gathered(file, start, end):
        text.append(_csv(rows))
        size += len(text[-1])
        row += sum(batch.num_rows for batch in rows)
        if size >= batch_bytes:
            yield ParquetPiece(position, row, b"".join(text))
            text, size, position = [], 0, row
    if row > position:
        yield ParquetPiece(position, row, b"".join(text))


def _gathered(file: pq.ParquetFile, start: int, end: int) -> Iterator[list[pa.RecordBatch]]:
    """The rows `[start, end)` as they can be written, about `_DECODED_BYTES` at a time."""
    names = [str(number) for number in range(len(file.schema_arrow))]
    rows, size = list[pa.RecordBatch](), 0
    for batch in _decoded(file, start, end):
        rows.append(pa.RecordBatch.from_arrays([writable(column) for column in batch.columns], names))
        size += rows[-1].nbytes
        if size >= _DECODED_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _decoded(file: pq.ParquetFile, start: int, end: int) -> Iterator[pa.RecordBatch]:
    """The rows `[start, end)`, a few at a time."""
    group_end = 0
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        group_start, group_end = group_end, group_end + group.num_rows
        if group_end <= start or group_start >= end or not group.num_rows:
            continue
        row_bytes = max(1, group.total_byte_size // group.num_rows)
        batch_rows = max(1, min(_DECODED_ROWS, _DECODED_BYTES // row_bytes))
        position = group_start
        for batch in file.iter_batches(batch_rows, row_groups=[number], use_threads=False):
            first, last = max(start - position, 0), min(end - position, batch.num_rows)
            position += batch.num_rows
            if first < last:
                yield batch.slice(first, last - first)
            if position >= end:
                break
        else:
            if position != group_end:
                raise InvalidData(
                    f"The Parquet file cannot be read: row group {number} has {position - group_start} rows and not "
                    f"{group.num_rows} as its footer says. It is damaged: upload it again."
                )


def _csv(rows: list[pa.RecordBatch]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.csv.write_csv(pa.Table.from_batches(rows), sink, _CSV)
    return cast(bytes, sink.getvalue().to_pybytes())
