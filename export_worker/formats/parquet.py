"""Parquet: each range of rows becomes a row group by itself, and the footer is joined from all of them.

Considerations
- Ranges are encoded side by side, and again by another worker after a kill. Where a row group will lie in the file is
  not known then: its pages are written as if they began the file, and the tail moves the offsets.
- Types are kept. What Parquet has no type for: numeric has no fixed digits in PostgreSQL, so it is surveyed before (see
  survey.py); where no decimal holds all values, and for NaN, it is text. Infinite times are an error.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from export_worker.formats.answers import COPY_OPTIONS, each, empty_table, in_turn, tables
from export_worker.formats.format import Copy, Encoded
from export_worker.formats.parquet_footer import MAGIC, joined_footer, take_apart
from shared.adapters.catalog import Column
from shared.adapters.postgres import quoted

Digits = Mapping[str, tuple[int, int]]

_TYPES: Mapping[str, pa.DataType] = {
    "bigint": pa.int64(),
    "double precision": pa.float64(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
}
_JSON = pa.json_(pa.string())
_COMPRESSION = "zstd"
# What becomes a row group at a time, of what the server answered; most answers are half of it.
_BLOCK_BYTES = 16 << 20


class Parquet:
    """The `Format` Parquet; `digits` has precision and scale of the numeric columns that become decimals."""

    content_type = "application/vnd.apache.parquet"

    def __init__(self, columns: Sequence[Column], digits: Digits) -> None:
        self._columns = columns
        self._select = ", ".join(quoted(column.name) for column in columns)
        decimals = {name: pa.decimal128(precision, scale) for name, (precision, scale) in digits.items()}
        self._types = {column.name: _TYPES[column.type] for column in columns if column.type in _TYPES} | decimals

    def head(self) -> Encoded:
        return Encoded(MAGIC)

    def rows(self, source: str) -> Copy:
        return Copy(f"SELECT {self._select} {source}", COPY_OPTIONS)

    async def encode(self, answer: bytes) -> Encoded:
        if not answer:
            return Encoded(b"")
        return await in_turn(self._encoded, answer)

    async def tail(self, details: Sequence[Any]) -> bytes:
        return await asyncio.to_thread(self._tail, details)

    def _encoded(self, answer: bytes) -> Encoded:
        pages = take_apart(self._file(answer))
        groups = [base64.b85encode(group).decode() for group in pages.groups]
        return Encoded(pages.data, {"bytes": len(pages.data), "rows": pages.rows, "groups": groups})

    def _tail(self, details: Sequence[Any]) -> bytes:
        pages = ((d["bytes"], d["rows"], [base64.b85decode(group) for group in d["groups"]]) for d in details)
        return joined_footer(self._file(b""), pages)

    def _file(self, answer: bytes) -> bytes:
        groups = tables(answer, self._columns, self._types, block_bytes=_BLOCK_BYTES)
        first = self._typed(next(groups, empty_table(self._columns, self._types)))
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, first.schema, compression=_COMPRESSION) as writer:
            for rows in chain([first], map(self._typed, groups)):
                writer.write_table(rows, row_group_size=max(1, rows.num_rows))
        return bytes(sink.getvalue())

    def _typed(self, rows: pa.Table) -> pa.Table:
        for number, column in enumerate(self._columns):
            if column.type in _CONVERTED:
                rows = rows.set_column(number, column.name, _CONVERTED[column.type](rows.column(number)))
        return rows


_CONVERTED = {
    "uuid": lambda values: each(values, lambda text: UUID(text).bytes, pa.uuid()),
    "bytea": lambda values: each(values, lambda text: bytes.fromhex(text[2:]), pa.binary()),
    "jsonb": lambda values: values.combine_chunks().cast(_JSON),
}
