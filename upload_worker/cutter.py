"""Cuts the bytes of a CSV object into batches of whole records, without parsing them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import cached_property

from shared.domain.errors import InvalidData
from upload_worker.encoding import Encoding
from upload_worker.plan import CsvPlan, Dialect
from upload_worker.records import fragments, last_record_end, line_count, ready_for_copy, record_count
from upload_worker.sources import ByteSource

BATCH_BYTES = 4 << 20
MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class Batch:
    """Whole records, ready for one COPY. Both ends are record boundaries: reading can start at either.

    `data` is empty when the range holds nothing but blank lines.
    """

    start: int
    end: int
    data: bytes
    lines: int
    """Physical lines of the file in this range."""
    dialect: Dialect
    open_quote: bool = False
    """The range is one record whose quoted field the file never closes; COPY refuses it."""

    @cached_property
    def records(self) -> int:
        return record_count(self.data, self.dialect)

    def holds(self, rows: int) -> bool:
        """Whether that many records were cut; counts them only when there are fewer rows than lines."""
        return rows == self.data.count(b"\n") or rows == self.records


class RecordCutter:
    """Collects chunks and hands out blocks of whole records.

    Counts the quotes of each chunk as it comes, so that a record of any length is looked at once.
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
        # A CRLF, or an escape and what it escapes, must not fall apart between chunks.
        escapes = b"" if dialect.escape == dialect.quote else dialect.escape_byte
        self._holdable = b"\r" + escapes

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
        if chunk[-1:] and chunk[-1] in self._holdable:
            kept = chunk.rstrip(self._holdable)
            self._held = chunk[len(kept) :]
            chunk = kept
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
            self._searched = 0
            whole = self._take() or b""
        rest = b"".join(self._chunks)
        self._chunks, self._size = [], 0
        return (whole, rest) if self._in_quotes else (rest, b"")

    def _add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._opens_in_quotes.append(self._in_quotes)
        self._size += len(chunk)
        if self._dialect.escape == self._dialect.quote or self._dialect.escape_byte not in chunk:
            quotes = chunk.count(self._dialect.quote_byte)
        else:
            quotes = len(fragments(chunk, self._dialect, self._in_quotes)) - 1 - self._in_quotes
        self._in_quotes ^= quotes % 2 == 1

    def _take(self) -> bytes | None:
        for index in range(len(self._chunks) - 1, self._searched - 1, -1):
            chunk = self._chunks[index]
            end = last_record_end(chunk, self._dialect, self._opens_in_quotes[index])
            if end:
                block = b"".join([*self._chunks[:index], memoryview(chunk)[:end]])
                tail, after = chunk[end:], index + 1
                self._chunks = [tail, *self._chunks[after:]] if tail else self._chunks[after:]
                opens = self._opens_in_quotes[after:]
                self._opens_in_quotes = [False, *opens] if tail else opens
                self._size -= len(block)
                self._searched = 0
                return block
        self._searched = len(self._chunks)
        return None


async def cut(
    source: ByteSource,
    plan: CsvPlan,
    start: int,
    end: int | None = None,
    *,
    batch_bytes: int = BATCH_BYTES,
    max_record_bytes: int = MAX_RECORD_BYTES,
) -> AsyncIterator[Batch]:
    """Batches of `[start, end)`, which must be record boundaries; without `end`, to the end of the object.

    Raises InvalidData for a record longer than `max_record_bytes`.
    """
    cutter = RecordCutter(plan.dialect, batch_bytes)
    encoding = Encoding(plan.encoding)
    decoder = encoding.decoder()
    position, fed = start, start

    def batch(block: bytes, end: int, open_quote: bool = False) -> Batch:
        nonlocal position
        begin, position = position, end
        data = ready_for_copy(encoding.to_utf8(block), plan.dialect, skip_blank_lines=plan.skips_blank_lines)
        return Batch(begin, end, data, line_count(block), plan.dialect, open_quote)

    chunks = source.read(start, end)
    async for chunk in chunks:
        fed += len(chunk)
        block = cutter.feed(decoder.decode(chunk))
        if block is not None:
            yield batch(block, position + encoding.source_bytes(block))
        elif cutter.pending_bytes > max_record_bytes:
            raise record_too_long(position, max_record_bytes)
    block = cutter.feed(decoder.decode(b"", final=True))
    if block is not None:
        yield batch(block, position + encoding.source_bytes(block))
    whole, unclosed = cutter.finish()
    if whole:
        yield batch(whole, position + encoding.source_bytes(whole) if unclosed else fed)
    if unclosed:
        yield batch(unclosed, fed, open_quote=True)


def record_too_long(position: int, max_record_bytes: int) -> InvalidData:
    return InvalidData(
        f"The record that begins at byte {position} is longer than {max_record_bytes >> 20} MiB. "
        "Probably a quote there is never closed: correct the file, or set the right quote and escape "
        "characters in the import's csv options.",
        position=position,
    )
