"""CSV objects in memory for the tests: a ranged reader, plans, and PostgreSQL's record rule spelled out."""

import random
from collections.abc import AsyncIterator, Iterator

from shared.domain.csv_options import ColumnType, Compression
from upload_worker.plan import Column, CsvPlan, Dialect
from upload_worker.sources import PlainSource, RangeReader


def reader(content: bytes, chunk_bytes: int = 1 << 16) -> RangeReader:
    async def read(start: int, end: int | None) -> AsyncIterator[bytes]:
        stop = len(content) if end is None else min(end, len(content))
        for at in range(start, stop, chunk_bytes):
            yield content[at : min(at + chunk_bytes, stop)]

    return read


def source(content: bytes, chunk_bytes: int = 1 << 16) -> PlainSource:
    return PlainSource(reader(content, chunk_bytes), len(content))


def plan(columns: int = 2, encoding: str = "utf-8", dialect: Dialect | None = None) -> CsvPlan:
    return CsvPlan(
        compression=Compression.NONE,
        encoding=encoding,
        data_start=0,
        header_lines=0,
        dialect=dialect or Dialect(),
        null="",
        columns=[Column(name=f"c{number}", type=ColumnType.TEXT) for number in range(columns)],
    )


def records_by_postgres(data: bytes, dialect: Dialect) -> Iterator[bytes]:
    """CopyReadLineText for CSV, byte by byte, for data with one kind of newline."""
    quote = dialect.quote_byte[0]
    escape = None if dialect.escape == dialect.quote else dialect.escape_byte[0]
    in_quotes = last_was_escape = False
    start = at = 0
    while at < len(data):
        byte = data[at]
        at += 1
        if in_quotes and byte == escape:
            last_was_escape = not last_was_escape
        if byte == quote and not last_was_escape:
            in_quotes = not in_quotes
        if byte != escape:
            last_was_escape = False
        if in_quotes or byte not in b"\r\n":
            continue
        if byte == ord("\r") and data[at : at + 1] == b"\n":
            at += 1
        yield data[start:at]
        start = at
    if start < len(data):
        yield data[start:]


def sales(rows: int, seed: int = 1) -> bytes:
    """A table with quoted fields, newlines in them and no two rows alike."""
    chosen = random.Random(seed)
    return b"".join(
        b'%d,"note ""%d""\nsecond line",%d.%02d\n' % (n, chosen.randrange(10**9), chosen.randrange(10**6), n % 100)
        for n in range(rows)
    )
