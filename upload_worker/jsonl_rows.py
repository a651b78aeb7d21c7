"""Writes lines of JSON as lines of COPY's text format, and sets those aside that are no rows of the table.

Numbers are never parsed: their digits go to PostgreSQL as they stand in the file.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import orjson

from shared.domain.csv_options import ColumnType
from shared.domain.errors import storable
from upload_worker.loading import RAW_CHARACTERS, Reject
from upload_worker.plan import Column
from upload_worker.records import Forward, printable


class Number(str):
    """A JSON number as it was written, to tell it from a JSON string."""

    __slots__ = ()


class BadLine(ValueError):
    """A line that is no row; the message says why."""

    def __init__(self, reason: str, column: str | None = None) -> None:
        super().__init__(reason)
        self.column = column


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadLine(f"the key {twice!r} is there twice")
    return found


# NaN and Infinity are no JSON, but Python and others write them, and PostgreSQL reads them.
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=Number)

_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
_NULL = "\\N"
_PLAIN = frozenset({str, Number})


def decode_object(line: bytes) -> dict[str, Any]:
    """The object on this line; its numbers are `Number`. Raises BadLine."""
    try:
        found = _DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        raise BadLine(f"byte {error.start + 1} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise BadLine(f"it is no valid JSON: {error.msg} at character {error.pos + 1}") from error
    except RecursionError as error:
        raise BadLine("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise BadLine("it is no JSON object")
    return found


def as_json(value: object, column: str) -> str:
    """The JSON text of a decoded value, its numbers digit by digit. Raises BadLine."""
    try:
        return orjson.dumps(value, _number, orjson.OPT_PASSTHROUGH_SUBCLASS).decode()
    except orjson.JSONEncodeError as error:
        raise BadLine(f"a nested value cannot be stored: {error}", column) from error


def _number(value: object) -> orjson.Fragment:
    assert isinstance(value, Number)
    return orjson.Fragment(value.encode())


class RowWriter:
    """Writes objects as rows of these columns."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = [
            (column.source_name or column.name, column.name, column.type is ColumnType.JSONB) for column in columns
        ]
        self._keys = frozenset(key for key, _, _ in self._columns)

    def row(self, line: bytes) -> str:
        """The line without its newline. Raises BadLine."""
        found = decode_object(line)
        if not found.keys() <= self._keys:
            # What the plan calls a key is what can be stored of it.
            found = {storable(key): value for key, value in found.items()}
            if not found.keys() <= self._keys:
                raise self._unknown_key(found)
        # Whatever COPY wants escaped is escaped in JSON too, with a backslash.
        escaped = b"\\" in line
        fields = []
        for key, name, is_json in self._columns:
            value = found.get(key)
            if value is None:
                fields.append(_NULL)
                continue
            if is_json:
                value = as_json(value, name)
            elif value.__class__ not in _PLAIN:
                value = _scalar(value, name)
            fields.append(value.translate(_ESCAPES) if escaped else value)
        return "\t".join(fields)

    def _unknown_key(self, found: dict[str, Any]) -> BadLine:
        key = next(key for key in found if key not in self._keys)
        return BadLine(f"the key {key!r} was not in the lines that were sampled; give its type in columns", key)


def _scalar(value: object, column: str) -> str:
    if value is True:
        return "true"
    if value is False:
        return "false"
    what = "an object" if isinstance(value, dict) else "an array"
    raise BadLine(f"{what} in a column of single values; make the column jsonb", column)


@dataclass(frozen=True)
class JsonlPiece:
    """Lines of the file; `data` has one line for each that is a row."""

    start: int
    end: int
    line: int
    lines: int
    data: bytes
    rows: Sequence[int]
    """For each line of `data` the offset of its line in the piece."""
    rejects: list[Reject]
    source: bytes

    def holds(self, rows: int) -> bool:
        return rows == len(self.rows)

    def records_end(self, start: int, size: int) -> int:
        return self.data.rfind(b"\n", start, start + size) + 1

    def record_at(self, start: int, end: int, line: int) -> tuple[int, int] | None:
        for _ in range(line - 1):
            start = self.data.find(b"\n", start, end) + 1
            if not start:
                return None
        return start, self.data.index(b"\n", start, end) + 1

    def source_of(self, start: int, end: int) -> tuple[int, str]:
        offset = self.rows[self._rows.before(start)]
        return self.line + offset, _text(self._source_lines[offset])

    @cached_property
    def _rows(self) -> Forward:
        return Forward(self.data, lambda data: data.count(b"\n"))

    @cached_property
    def _source_lines(self) -> list[bytes]:
        return self.source.split(b"\n")


def write_piece(source: bytes, start: int, end: int, line: int, writer: RowWriter) -> JsonlPiece:
    """The piece for whole lines of the file, of which the first has number `line`."""
    rows: list[str] = []
    offsets: list[int] = []
    rejects: list[Reject] = []
    for offset, raw in enumerate(source.split(b"\n")):
        if not raw or raw.isspace():
            continue
        try:
            rows.append(writer.row(raw))
            offsets.append(offset)
        except BadLine as error:
            rejects.append(Reject(line + offset, error.column, str(error), _text(raw)))
    rows.append("")
    # A lone surrogate passes here so that PostgreSQL refuses it, and names the line.
    data = "\n".join(rows).encode("utf-8", "surrogatepass")
    return JsonlPiece(start, end, line, source.count(b"\n"), data, offsets, rejects, source)


def _text(line: bytes) -> str:
    return printable(line[:RAW_CHARACTERS].rstrip(b"\r\n"))
