"""Decides from samples how a CSV object is read; what the user said wins over every guess."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any

from shared.domain.csv_options import ColumnOption, ColumnType, Compression, CsvOptions
from shared.domain.errors import BadRecord, InvalidData
from upload_worker.column_names import column_names
from upload_worker.column_types import NULL_WORDS, best_null, column_type, fits
from upload_worker.cutter import MAX_RECORD_BYTES
from upload_worker.dialects import guess_dialect
from upload_worker.encoding import Encoding, guess_encoding
from upload_worker.plan import Column, CsvPlan, Dialect
from upload_worker.records import fragments, last_record_end, line_count, parse_fields, split_records
from upload_worker.sources import ByteSource, RangeReader, closing, open_source

SAMPLE_BYTES = 512 << 10
FAR_SAMPLE_BYTES = 64 << 10
FAR_SAMPLES = 4
# A header or first record that is longer than the sample: read on, up to what a record may be.
_LONGER_SAMPLES = (8 << 20, MAX_RECORD_BYTES)

Row = list[str]


MAGIC_BYTES = 8
_NOT_CSV = (
    (b"PK\x03\x04", "a ZIP archive or an Excel workbook"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook"),
    (b"PAR1", "a Parquet file"),
    (b"%PDF-", "a PDF document"),
    (b"BZh", "compressed with bzip2"),
    (b"\xfd7zXZ\x00", "compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"7z\xbc\xaf", "a 7z archive"),
)


def guess_compression(magic: bytes) -> Compression:
    """By the first bytes, never by the name. Raises InvalidData for what is certainly no CSV."""
    if magic.startswith(b"\x1f\x8b\x08"):
        return Compression.GZIP
    for beginning, what in _NOT_CSV:
        if magic.startswith(beginning):
            raise InvalidData(f"The file is {what}, not CSV. Upload it as CSV, plain or compressed with gzip.")
    return Compression.NONE


async def sniff(reader: RangeReader, size: int, options: CsvOptions) -> CsvPlan:
    """The plan for an object of `size` stored bytes.

    Raises InvalidData for a file that is no CSV or has no record, for more columns than a table can have,
    and where the options do not fit the file.
    """
    magic = await read_head(reader(0, min(size, MAGIC_BYTES)), MAGIC_BYTES)
    compression = options.compression or guess_compression(magic)
    source = open_source(reader, size, compression)
    for sample_bytes in (SAMPLE_BYTES, *_LONGER_SAMPLES):
        head = await read_head(source.read(0, sample_bytes), sample_bytes)
        whole = len(head) < sample_bytes
        encoding, bom, notes = await asyncio.to_thread(guess_encoding, head, options.encoding, whole)
        if len(head) == bom:
            raise InvalidData("The file is empty: there is no header and no record to import.")
        codec = Encoding(encoding)
        block = codec.decoder().decode(head[bom:], final=whole)
        dialect = await asyncio.to_thread(guess_dialect, _whole_lines(codec.to_utf8(block), whole), options)
        if codec.is_multibyte and not {dialect.quote, dialect.escape} <= {'"', "'"}:
            raise InvalidData(
                f"A {encoding} file can only be read with ordinary quotes that are doubled inside quotes. "
                "Convert it to UTF-8 and upload it again."
            )
        sample = _Sample(block, whole, dialect, codec)
        if whole or len(sample.records) > 1:
            break
    if not sample.records:
        raise _no_record(sample, len(head))
    far = await _far_rows(source, sample, bom) if not whole else []
    return await asyncio.to_thread(_plan, options, compression, bom, sample, far, notes)


class _Sample:
    """The first records of the file, and where each ends in bytes that are not yet transcoded."""

    def __init__(self, block: bytes, whole: bool, dialect: Dialect, codec: Encoding) -> None:
        self.dialect, self.codec = dialect, codec
        self.open_quote = whole and len(fragments(block, dialect)) % 2 == 0
        self.block = block if whole and not self.open_quote else block[: last_record_end(block, dialect)]
        self.records = [
            (start, end) for start, end in split_records(self.block, dialect) if self.block[start:end].strip(b"\r\n")
        ]
        self.rows = [self.row(self.block[start:end]) for start, end in self.records]

    def row(self, record: bytes) -> Row:
        fields = parse_fields(self.codec.to_utf8(record), self.dialect)
        return [field.decode("utf-8", "backslashreplace") for field in fields]


def _no_record(sample: _Sample, head_bytes: int) -> InvalidData:
    if sample.open_quote:
        return BadRecord(
            f"A quote ({sample.dialect.quote}) in the first record, at line 1, is never closed. Correct the "
            "file, or set the right quote and escape characters in the import's csv options.",
            line=1,
        )
    if head_bytes == MAX_RECORD_BYTES:
        return InvalidData(
            f"The first record does not end within {MAX_RECORD_BYTES >> 20} MiB. Probably a quote in it is "
            "never closed, or this is no CSV file.",
            line=1,
        )
    return InvalidData("The file holds nothing but blank lines: there is no header and no record to import.")


async def read_head(stream: AsyncIterator[bytes], length: int) -> bytes:
    data = bytearray()
    async with closing(stream) as chunks:
        async for chunk in chunks:
            data += chunk
            if len(data) >= length:
                break
    return bytes(data[:length])


def _whole_lines(data: bytes, whole: bool) -> bytes:
    return data if whole else data[: max(data.rfind(b"\n"), data.rfind(b"\r")) + 1] or data


async def _far_rows(source: ByteSource, sample: _Sample, bom: int) -> list[Row]:
    """Rows from further back, so that types do not rest on the first records alone.

    A sample may begin inside a quoted field; then its rows have odd widths and it is not used.
    """
    if source.size is None or sample.codec.is_wide:
        return []
    rows: list[Row] = []
    for number in range(1, FAR_SAMPLES + 1):
        start = max(bom + len(sample.block), (source.size - FAR_SAMPLE_BYTES) * number // FAR_SAMPLES)
        block = await read_head(source.read(start, start + FAR_SAMPLE_BYTES), FAR_SAMPLE_BYTES)
        first = re.search(rb"[\r\n]+", block)
        if first is None:
            continue
        far = _Sample(block[first.end() :], False, sample.dialect, sample.codec).rows
        fitting = [row for row in far if len(row) == len(sample.rows[0])]
        if len(fitting) >= 0.9 * len(far):
            rows += fitting
    return rows


def _plan(
    options: CsvOptions,
    compression: Compression,
    bom: int,
    sample: _Sample,
    far_rows: list[Row],
    notes: list[dict[str, Any]],
) -> CsvPlan:
    rows, codec = sample.rows, sample.codec
    header = options.header if options.header is not None else _has_header(rows, far_rows, options)
    body = rows[1:] if header else rows
    width = len(rows[0]) if header else Counter(map(len, rows)).most_common(1)[0][0]
    fitting = [row for row in (*body, *far_rows) if len(row) == width]
    if len(fitting) < len(body) + len(far_rows):
        odd = len(body) + len(far_rows) - len(fitting)
        notes.append({"note": f"{odd} sampled records do not have {width} fields; COPY will refuse them."})
    values = [list(column) for column in zip(*fitting, strict=True)] or [[] for _ in range(width)]
    names = rows[0] if header else [f"column_{number}" for number in range(1, width + 1)]
    null = _null(values, sample.dialect, options)
    head_end = sample.records[0][1] if header else 0
    columns, column_notes = _columns(names, values, null, options, header)
    return CsvPlan(
        compression=compression,
        encoding=codec.name,
        data_start=bom + codec.source_bytes(sample.block[:head_end]),
        header_lines=line_count(sample.block[:head_end]),
        dialect=sample.dialect,
        null=null,
        columns=columns,
        notes=notes + column_notes,
        record_bytes=codec.source_bytes(sample.block) / len(sample.records),
    )


def _null(values: Sequence[Sequence[str]], dialect: Dialect, options: CsvOptions) -> str:
    null = options.null if options.null is not None else best_null(values)
    if dialect.delimiter not in null and dialect.quote not in null:
        return null
    if options.null is None:
        return ""
    raise InvalidData(
        f"The null string {null!r} contains the delimiter {dialect.delimiter!r} or the quote {dialect.quote!r}, "
        "which COPY does not allow. Choose another, or set delimiter and quote if they were guessed wrong."
    )


def _columns(
    names: Sequence[str], values: Sequence[Sequence[str]], null: str, options: CsvOptions, header: bool
) -> tuple[list[Column], list[dict[str, Any]]]:
    given: list[ColumnOption] = []
    by_name: dict[str, ColumnType] = {}
    if isinstance(options.columns, list):
        given = options.columns
        if len(given) != len(names):
            raise InvalidData(
                f"The options name {len(given)} columns, but the file has {len(names)}. "
                "List every column of the file in order, or give types by name.",
                columns=len(names),
            )
    elif options.columns:
        by_name = dict(options.columns)
    wanted = [given[i].name or name if given else name for i, name in enumerate(names)]
    final, notes = column_names(wanted)
    unknown = sorted(by_name.keys() - {*final, *names})
    if unknown:
        raise InvalidData(
            f"The options give types for columns that the file does not have: {', '.join(unknown)}. "
            f"It has: {', '.join(final[:50])}.",
            columns=unknown,
        )
    columns = []
    for i, (name, source_name) in enumerate(zip(final, names, strict=True)):
        chosen = (given[i].type if given else None) or by_name.get(name) or by_name.get(source_name)
        type_ = chosen or column_type(values[i], null)
        if chosen is None and type_ is ColumnType.TEXT:
            notes += _why_text(i + 1, values[i], null)
        columns.append(Column(name=name, type=type_, source_name=source_name if header else None))
    return columns, notes


def _why_text(number: int, values: Sequence[str], null: str) -> list[dict[str, Any]]:
    blanks = {value for value in values if value in NULL_WORDS} - {null}
    would_be = column_type(value for value in values if value not in NULL_WORDS)
    if not blanks or would_be is ColumnType.TEXT:
        return []
    also = ", ".join(repr(blank) for blank in sorted(blanks))
    note = f"Stays text: it holds {would_be} values and also {also}, but the file's one null string is {null!r}."
    return [{"column": number, "note": note}]


def _has_header(rows: Sequence[Row], far_rows: Sequence[Row], options: CsvOptions) -> bool:
    """Names where the records below hold values: of a type that names do not have, or never the same text."""
    first = rows[0]
    if isinstance(options.columns, dict) and set(options.columns) & set(first):
        return True
    body = [row for row in (*rows[1:], *far_rows) if len(row) == len(first)]
    values = list(zip(*body, strict=True)) or [()] * len(first)
    null = options.null if options.null is not None else best_null(values)
    typed = [(name, column_type(column, null)) for name, column in zip(first, values, strict=True)]
    evidence = [fits(name, type_) for name, type_ in typed if type_ is not ColumnType.TEXT and name != null]
    if evidence:
        return evidence.count(False) >= evidence.count(True)
    if any(name and column_type([name]) is not ColumnType.TEXT for name in first):
        return False
    return not any(name and name in column for name, column in zip(first, values, strict=True))
