"""Cuts the bytes of a CSV object into batches of whole records, without parsing them."""

from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from functools import cached_property

from shared.domain.errors import InvalidData
from upload_worker.encoding import Encoding
from upload_worker.plan import CsvPlan, Dialect
from upload_worker.records import (
    Forward,
    byte_count,
    fragments,
    last_record_end,
    line_count,
    ready_for_copy,
    record_count,
    split_records,
)
from upload_worker.sources import ByteSource, closing

MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class CsvBatch:
    """Whole records, ready for one COPY. Both ends are record boundaries: reading can start at either.

    `data` is empty when the range holds nothing but blank lines.
    """

    start: int
    end: int
    line: int
    """The number, in the file, of the first line of this range."""
    lines: int
    """How many physical lines of the file end in this range."""
    data: bytes
    raw: bytes
    """As in the file but in UTF-8; the same object as `data` unless that had to be rewritten for COPY."""
    dialect: Dialect
    skips_blank_lines: bool = True
    open_quote: bool = False
    """The range is one record whose quoted field the file never closes; COPY refuses it."""

    @cached_property
    def records(self) -> int:
        return record_count(self.data, self.dialect)

    def holds(self, rows: int) -> bool:
        """Whether that many records were cut; counts them only when there are fewer rows than lines."""
        return (self.raw is self.data and rows == self.lines) or rows == self.records

    def line_of(self, offset: int) -> int:
        """The number, in the file, of the line on which the record at `offset` of `data` begins."""
        if self.raw is not self.data:
            offset = self._raw_starts[self._records.before(offset)]
        return self.line + self._raw_lines.before(offset)

    @cached_property
    def _records(self) -> Forward:
        return Forward(self.data, lambda data: record_count(data, self.dialect))

    @cached_property
    def _raw_lines(self) -> Forward:
        return Forward(self.raw, line_count)

    @cached_property
    def _raw_starts(self) -> list[int]:
        return [
            start
            for start, end in split_records(self.raw, self.dialect)
            if not self.skips_blank_lines or self.raw[start:end].strip(b"\r\n")
        ]


class RecordCutter:
    """Collects chunks and hands out blocks of whole records.

    Counts the quotes of each chunk as it comes and searches no chunk twice, so that the work does not grow
    with the length of a record.
    """

    def __init__(self, dialect: Dialect, batch_bytes: int) -> None:
        self._dialect = dialect
        self._batch_bytes = batch_bytes
        self._chunks: list[bytes] = []
        self._searched = 0
        self._opens_in_quotes: list[bool] = []
        self._in_quotes = False
        self._size = 0
        self._held = b""

    @property
    def pending_bytes(self) -> int:
        """Bytes fed and not handed out."""
        return self._size + len(self._held)

    @property
    def in_quotes(self) -> bool:
        return self._in_quotes

    def feed(self, chunk: bytes) -> bytes | None:
        """Add bytes; a block of whole records comes back when a batch is full."""
        if self._held:
            chunk = self._held + chunk
            self._held = b""
        if self._splits_a_pair(chunk):
            self._held, chunk = chunk[-1:], chunk[:-1]
        if chunk:
            self._add(chunk)
        return self._take() if self._size >= self._batch_bytes else None

    def finish(self) -> tuple[bytes, bytes]:
        """At the end of the file: the last whole records, and then the record that a quote leaves open."""
        if self._held:
            self._add(self._held)
            self._held = b""
        whole = b""
        if self._in_quotes:
            whole = self._take() or b""
        rest = b"".join(self._chunks)
        self._chunks, self._size = [], 0
        return (whole, rest) if self._in_quotes else (rest, b"")

    def _splits_a_pair(self, chunk: bytes) -> bool:
        """Whether CR and LF, or an escape and what it escapes, would fall apart after this chunk."""
        if chunk.endswith(b"\r"):
            return True
        escape = self._dialect.escape_byte
        if self._dialect.escape == self._dialect.quote or not chunk.endswith(escape):
            return False
        return (len(chunk) - len(chunk.rstrip(escape))) % 2 == 1

    def _add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._opens_in_quotes.append(self._in_quotes)
        self._size += len(chunk)
        if self._dialect.escape == self._dialect.quote or self._dialect.escape_byte not in chunk:
            quotes = byte_count(chunk, self._dialect.quote_byte)
        else:
            quotes = len(fragments(chunk, self._dialect, self._in_quotes)) - 1 - self._in_quotes
        self._in_quotes ^= quotes % 2 == 1

    def _take(self) -> bytes | None:
        for index in range(len(self._chunks) - 1, self._searched - 1, -1):
            chunk = self._chunks[index]
            ends_in_quotes = self._opens_in_quotes[index + 1] if index + 1 < len(self._chunks) else self._in_quotes
            end = last_record_end(chunk, self._dialect, self._opens_in_quotes[index], ends_in_quotes=ends_in_quotes)
            if end:
                block = b"".join([*self._chunks[:index], memoryview(chunk)[:end]])
                tail, after = chunk[end:], index + 1
                self._chunks = [tail, *self._chunks[after:]] if tail else self._chunks[after:]
                opens = self._opens_in_quotes[after:]
                self._opens_in_quotes = [False, *opens] if tail else opens
                self._size -= len(block)
                self._searched = len(self._chunks)
                return block
        self._searched = len(self._chunks)
        return None


async def cut(
    source: ByteSource,
    plan: CsvPlan,
    start: int,
    end: int | None = None,
    *,
    line: int = 1,
    batch_bytes: int,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> AsyncGenerator[CsvBatch, None]:
    """Batches of `[start, end)`, which must be record boundaries; without `end`, to the end of the object.

    `line` is the number of the line at `start`. Leave early through `contextlib.aclosing`.

    Raises InvalidData for a record longer than `max_record_bytes`.
    """
    cutter = RecordCutter(plan.dialect, batch_bytes)
    encoding = Encoding(plan.encoding)
    decoder = encoding.decoder()
    position, fed = start, start

    def batch(block: bytes, end: int, open_quote: bool = False) -> CsvBatch:
        nonlocal position, line
        raw = encoding.to_utf8(block)
        data = ready_for_copy(raw, plan.dialect, skip_blank_lines=plan.skips_blank_lines)
        lines = line_count(raw)
        made = CsvBatch(position, end, line, lines, data, raw, plan.dialect, plan.skips_blank_lines, open_quote)
        position, line = end, line + lines
        return made

    async with closing(source.read(start, end)) as chunks:
        async for chunk in chunks:
            for piece in _pieces(chunk, cutter, batch_bytes):
                fed += len(piece)
                block = cutter.feed(decoder.decode(piece))
                if block is not None:
                    yield batch(block, position + encoding.source_bytes(block))
                elif cutter.pending_bytes > max_record_bytes:
                    raise record_too_long(position, line, max_record_bytes)
    block = cutter.feed(decoder.decode(b"", final=True))
    if block is not None:
        yield batch(block, position + encoding.source_bytes(block))
    whole, unclosed = cutter.finish()
    if whole:
        yield batch(whole, position + encoding.source_bytes(whole) if unclosed else fed)
    if unclosed:
        yield batch(unclosed, fed, open_quote=True)


def _pieces(chunk: bytes, cutter: RecordCutter, batch_bytes: int) -> Iterator[bytes]:
    """The chunk in pieces that make batches of `batch_bytes`, whatever the source sends; longer in a long record."""
    start = 0
    while start < len(chunk):
        end = start + max(batch_bytes, cutter.pending_bytes)
        yield chunk[start:end]
        start = end


def record_too_long(position: int, line: int, max_record_bytes: int) -> InvalidData:
    return InvalidData(
        f"The record that begins at line {line} (byte {position}) is longer than {max_record_bytes} bytes. "
        "Probably a quote there is never closed: correct the file, or set the right quote and escape "
        "characters in the import's csv options.",
        line=line,
        position=position,
    )
