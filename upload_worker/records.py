"""Records in a block of CSV bytes, by the rules of PostgreSQL's COPY: their ends, lines and fields.

COPY toggles between quoted and unquoted at every quote, wherever it stands; an escape that is not the
quote itself counts only inside quotes (CopyReadLineText in PostgreSQL's copyfromparse.c).
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from upload_worker.encoding import with_original_bytes
from upload_worker.plan import Dialect

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLANK_LINES = re.compile(rb"\A[\r\n]+|(\r\n|\n|\r(?!\n))[\r\n]+")
_END_MARK = re.compile(rb"(?:\A|(?<=[\r\n]))\\\.(?=[\r\n]|\Z)")


@lru_cache(maxsize=16)
def _escaped_fragments(quote: bytes, escape: bytes) -> re.Pattern[bytes]:
    q, e = re.escape(quote), re.escape(escape)
    return re.compile(rb"([^%b]*+)(?:%b((?:[^%b%b]++|%b(?:.|\Z))*+)(%b|\Z))?" % (q, q, q, e, e, q), re.DOTALL)


def fragments(data: bytes, dialect: Dialect, in_quotes: bool = False) -> list[bytes]:
    """Split at every quote that opens or closes: even items lie outside quotes, odd ones inside.

    With `in_quotes` the data begins inside a quoted field, and an empty item stands for what came before.
    """
    quote, escape = dialect.quote_byte, dialect.escape_byte
    if quote == escape or escape not in data:
        parts = data.split(quote)
        return [b"", *parts] if in_quotes else parts
    parts = []
    for match in _escaped_fragments(quote, escape).finditer(quote + data if in_quotes else data):
        outside, inside, closing = match.groups()
        if parts and not outside and inside is None:
            break  # the empty match at the end of the data
        parts.append(outside)
        if inside is not None:
            parts.append(inside)
            if not closing:
                return parts
    if len(parts) % 2 == 0:
        parts.append(b"")
    return parts


def last_record_end(
    data: bytes, dialect: Dialect, in_quotes: bool = False, *, ends_in_quotes: bool | None = None
) -> int:
    """Offset after the last newline that ends a record, 0 if none does.

    Quicker when the caller knows whether the data ends inside quotes: then only what follows that newline is counted.
    """
    end = max(data.rfind(b"\n"), data.rfind(b"\r"))
    if end < 0:
        return 0
    quote = dialect.quote_byte
    if dialect.escape_byte == quote:
        if ends_in_quotes is None:
            quotes = byte_count(data, quote, end) + in_quotes
        else:
            quotes = data.count(quote, end) + ends_in_quotes
        if quotes % 2 == 0:
            return end + 1
    parts = fragments(data, dialect, in_quotes)
    outside = quote.join(parts[::2])
    end = max(outside.rfind(b"\n"), outside.rfind(b"\r"))
    if end < 0:
        return 0
    later = outside.count(quote, end)
    piece = 2 * (outside.count(quote) - later)
    piece_end = outside.find(quote, end)
    rest = (piece_end if later else len(outside)) - end - 1
    return len(data) - rest - (len(quote.join(parts[piece:])) - len(parts[piece]))


def byte_count(data: bytes, byte: bytes, end: int | None = None) -> int:
    """Quick where there is none, as for the quotes of many files: searching is many times as fast as counting."""
    return data.count(byte, 0, end) if byte in data else 0


def line_count(data: bytes) -> int:
    """Physical lines that end in the data: LF, CRLF and CR each end one."""
    lines = data.count(b"\n")
    if b"\r" in data:
        lines += data.count(b"\r") - data.count(b"\r\n")
    return lines


def record_count(data: bytes, dialect: Dialect) -> int:
    """Records in a block of whole records, counted by PostgreSQL's rule without parsing them."""
    parts = fragments(data, dialect)
    outside = dialect.quote_byte.join(parts[::2])
    unended = len(parts) % 2 == 0 or not outside.endswith((b"\n", b"\r"))
    return line_count(outside) + (unended and data != b"")


def split_records(data: bytes, dialect: Dialect) -> Iterator[tuple[int, int]]:
    """Offsets of each record, its newline included; exact, but too slow for every batch."""
    start = offset = 0
    for index, part in enumerate(fragments(data, dialect)):
        if index % 2 == 0:
            for match in _LINE_END.finditer(part):
                yield start, offset + match.end()
                start = offset + match.end()
        offset += len(part) + 1
    if start < len(data):
        yield start, len(data)


class Forward:
    """Counts what is before an offset at which a record begins; no byte twice for those who only go forward."""

    def __init__(self, data: bytes, count: Callable[[bytes], int]) -> None:
        self._data = data
        self._count = count
        self._offset = self._counted = 0

    def before(self, offset: int) -> int:
        if offset < self._offset:
            self._offset = self._counted = 0
        self._counted += self._count(self._data[self._offset : offset])
        self._offset = offset
        return self._counted


def ready_for_copy(raw: bytes, dialect: Dialect, *, skip_blank_lines: bool) -> bytes:
    """The same records in a form that every PostgreSQL version loads with one COPY.

    Blank lines are dropped, newlines outside quotes are made alike, and a record that is exactly `\\.`,
    which ended the data before PostgreSQL 18, is quoted. Usually that is nothing to do.
    """
    mixed = b"\r" in raw and not (raw.count(b"\r\n") == raw.count(b"\r") == raw.count(b"\n"))
    blanks = skip_blank_lines and _may_have_blank_lines(raw)
    end_mark = b"\\" in raw and b"\\." in raw
    if not (mixed or blanks or end_mark):
        return raw
    quote = dialect.quote_byte
    parts = fragments(raw, dialect)
    outside = quote.join(parts[::2])
    if mixed and b"\r" in outside:
        crlf = outside.count(b"\r\n")
        if not (outside.count(b"\r") == crlf == outside.count(b"\n") or b"\n" not in outside):
            outside = outside.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if blanks:
        outside = _BLANK_LINES.sub(rb"\1", outside)
    parts[::2] = outside.split(quote)
    data = quote.join(parts)
    if end_mark and _END_MARK.search(outside):
        data = b"".join(_with_end_mark_quoted(data[start:end], quote) for start, end in split_records(data, dialect))
    return data


def _may_have_blank_lines(raw: bytes) -> bool:
    # Backwards, because CPython does that three times as fast for two bytes.
    if raw[:1] in (b"\n", b"\r") or raw.rfind(b"\n\n") >= 0:
        return True
    return b"\r" in raw and (b"\n\r" in raw or b"\r\r" in raw)


def _with_end_mark_quoted(record: bytes, quote: bytes) -> bytes:
    if record.rstrip(b"\r\n") != b"\\.":
        return record
    return quote + b"\\." + quote + record[2:]


def record_at_line(data: bytes, dialect: Dialect, line: int) -> tuple[int, int] | None:
    """Offsets of the record for which COPY reports `line` of this block, counted from 1.

    COPY reports the line of a record's end. Inside quotes it counts LF where records end in LF, and CR
    otherwise, also in the first record, before it knows how records end.
    """
    embedded, lines = b"\r", 0
    for start, end in split_records(data, dialect):
        record = data[start:end]
        body = record.rstrip(b"\r\n")
        lines += 1 + body.count(embedded)
        if lines >= line:
            return start, end
        if not start:
            embedded = b"\n" if record[len(body) :] == b"\n" else b"\r"
    return None


def parse_fields(record: bytes, dialect: Dialect) -> list[bytes]:
    """The values of one record as COPY would read them; for samples and messages, not for loading."""
    record = record.rstrip(b"\r\n")
    quote, delimiter = dialect.quote_byte, dialect.delimiter_byte
    if quote not in record:
        return record.split(delimiter)
    parts = fragments(record, dialect)
    doubles = dialect.escape == dialect.quote
    values = [b""]
    for index, part in enumerate(parts):
        if index % 2:
            values[-1] += part if doubles else _unescaped(part, dialect)
        elif doubles and not part and 0 < index < len(parts) - 1:
            values[-1] += quote
        else:
            first, *others = part.split(delimiter)
            values[-1] += first
            values.extend(others)
    return values


def _unescaped(part: bytes, dialect: Dialect) -> bytes:
    quote, escape = re.escape(dialect.quote_byte), re.escape(dialect.escape_byte)
    return re.sub(rb"%b([%b%b])" % (escape, quote, escape), rb"\1", part)


def printable(record: bytes) -> str:
    """The record as text that PostgreSQL can store: NUL and bytes that are not UTF-8 as `\\x00` escapes."""
    return with_original_bytes(record).decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
