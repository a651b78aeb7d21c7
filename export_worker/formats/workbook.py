"""XLSX: one sheet whose rows are written range by range, inside a package that XlsxWriter makes.

Considerations
- A workbook is a ZIP file, and a deflated member of it may be many deflate streams in a row: each range of rows is one,
  made apart from the others. So an export to XLSX pauses, resumes and survives kills like any other, without a
  temporary file. The sheet is the last member; its length and checksum follow it.
- Excel keeps 15 digits: numbers with more are written as text, like all that Excel has no cell for (NaN, infinity,
  times before March 1900). Times with a zone are shown in UTC. NULL is an empty cell.
"""

import asyncio
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple
from datetime import UTC, date, datetime
from typing import Any

from isal import isal_zlib

from export_worker.formats.answers import COPY_OPTIONS, in_turn, tables
from export_worker.formats.format import Copy, Encoded
from export_worker.formats.zip_package import Member, central_directory, descriptor, local_header
from shared.adapters.catalog import Column
from shared.adapters.postgres import quoted
from shared.domain.errors import InvalidData

# Excel's own limit, as that of the rows ("Excel specifications and limits").
MAX_CELL_CHARACTERS = 32_767
_EXACT_DIGITS = 15

_SHEET = "xl/worksheets/sheet1.xml"
_LEVEL = 3
_RAW_DEFLATE = -15
_MOST_SHEET_BYTES = 2**32 - 1

_EPOCH = date(1899, 12, 30)
_DATES_FROM = date(1900, 3, 1)
_DAYS_END = 2_958_466  # the year 10000
_DAY_MICROSECONDS = 86_400_000_000

# What XML cannot hold, and what would be taken for the escape of it (ECMA-376, ST_Xstring).
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\ufffe\uffff]|_(?=x[0-9A-Fa-f]{4}_)")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})

_EMPTY = "<c/>"


_STYLES = ({"bold": True}, {"num_format": "yyyy-mm-dd"}, {"num_format": "yyyy-mm-dd hh:mm:ss"})
_HEADER_STYLE, _DATE_STYLE, _TIME_STYLE = (f' s="{number}"' for number in (1, 2, 3))

# What becomes cells at a time, of what the server answered: small numbers take fifty times as much.
_BLOCK_BYTES = 256 << 10


class Workbook:
    """The `Format` XLSX."""

    content_type = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns
        self._select = ", ".join(quoted(column.name) for column in columns)

    def head(self) -> Encoded:
        return _head(self._columns)

    def rows(self, source: str) -> Copy:
        return Copy(f"SELECT {self._select} {source}", COPY_OPTIONS)

    async def encode(self, answer: bytes) -> Encoded:
        if not answer:
            return Encoded(b"")
        return await in_turn(self._encoded, answer)

    async def tail(self, details: Sequence[Any]) -> bytes:
        return await asyncio.to_thread(_tail, details)

    def _encoded(self, answer: bytes) -> Encoded:
        sheet = _Piece()
        for rows in tables(answer, self._columns, {}, block_bytes=_BLOCK_BYTES):
            cells = [
                _cells(column, values.to_pylist()) for column, values in zip(self._columns, rows.columns, strict=True)
            ]
            sheet.add("".join(f"<row>{''.join(row)}</row>" for row in zip(*cells, strict=True)).encode())
        return sheet.ended()


def _tail(details: Sequence[Any]) -> bytes:
    """The end for a head as it was written: whoever ends the file may have other libraries than who began it."""
    head = details[0]
    sheet = _Piece()
    sheet.add(head["sheet_end"].encode())
    end = sheet.ended(isal_zlib.Z_FINISH)
    size = packed = crc = 0
    for detail in (*details, end.detail):
        size += detail["xml_bytes"]
        packed += detail["bytes"]
        crc = _joined_crc(crc, detail["crc"], detail["xml_bytes"])
    if size > _MOST_SHEET_BYTES:
        raise InvalidData("the rows are more than a workbook can hold (4 GiB); export fewer columns, or as csv")
    data = Member(_SHEET, head["sheet_offset"], size, packed, crc, streamed=True)
    position = data.offset + len(local_header(_SHEET)) + packed + len(descriptor(data))
    members = [Member(*fields) for fields in head["members"]]
    return end.data + descriptor(data) + central_directory([*members, data], position)


def _head(columns: Sequence[Column]) -> Encoded:
    """A workbook without rows, up to where they begin; the detail says what is needed to end it."""
    import xlsxwriter

    made = io.BytesIO()
    with xlsxwriter.Workbook(made, {"in_memory": True}) as book:
        # The same bytes whenever it is made again.
        book.set_properties({"created": datetime(2000, 1, 1, tzinfo=UTC)})
        sheet = book.add_worksheet("data")
        sheet.freeze_panes(1, 0)
        for number, column in enumerate(columns):
            sheet.set_column(number, number, 20 if column.type.startswith("timestamp") else 12)
        for number, style in enumerate(_STYLES):
            sheet.write_number(0, number, 0, book.add_format(style))
    with zipfile.ZipFile(made) as zipped:
        parts = {name: zipped.read(name) for name in zipped.namelist()}
    xml = parts.pop(_SHEET)
    before, cells, after = re.split(rb"(?<=<sheetData>)(.*)(?=</sheetData>)", xml, maxsplit=1, flags=re.DOTALL)
    assert re.findall(rb's="(\d+)"', cells) == [b"1", b"2", b"3"], "styles are numbered as they come"
    package, members = b"", []
    for name, content in parts.items():
        part = _Piece()
        part.add(content)
        packed = part.ended(isal_zlib.Z_FINISH).data
        members.append(Member(name, len(package), len(content), len(packed), zlib.crc32(content)))
        package += local_header(name, members[-1]) + packed
    rows = _Piece()
    rows.add(re.sub(rb"<dimension [^>]*/>", b"", before))
    rows.add(f"<row>{''.join(_text_cell(column.name, _HEADER_STYLE) for column in columns)}</row>".encode())
    start = rows.ended()
    return Encoded(
        package + local_header(_SHEET) + start.data,
        {
            **start.detail,
            "members": [astuple(member) for member in members],
            "sheet_offset": len(package),
            "sheet_end": after.decode(),
        },
    )


class _Piece:
    """A piece of a member: it starts a deflate stream afresh and ends at a byte, so that pieces can be put together."""

    def __init__(self) -> None:
        self._packer = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, _RAW_DEFLATE)
        self._data: list[bytes] = []
        self._xml_bytes = self._crc = 0

    def add(self, xml: bytes) -> None:
        self._data.append(self._packer.compress(xml))
        self._xml_bytes += len(xml)
        self._crc = zlib.crc32(xml, self._crc)

    def ended(self, flush: int = isal_zlib.Z_SYNC_FLUSH) -> Encoded:
        data = b"".join([*self._data, self._packer.flush(flush)])
        return Encoded(data, {"bytes": len(data), "xml_bytes": self._xml_bytes, "crc": self._crc})


def _joined_crc(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of two texts from theirs: as many zero bytes behind the first move its CRC to where it counts."""
    zeros = bytes(min(second_bytes, 1 << 20))
    moved, nothing, left = first, 0, second_bytes
    while left:
        step = zeros[:left]
        moved, nothing = zlib.crc32(step, moved), zlib.crc32(step, nothing)
        left -= len(step)
    return moved ^ nothing ^ second


# --- cells


def _cells(column: Column, values: Sequence[str | None]) -> list[str]:
    write = _WRITERS.get(column.type)
    try:
        if write is None:
            return [_EMPTY if value is None else _text_cell(value) for value in values]
        return [_EMPTY if value is None else write(value) or _text_cell(value) for value in values]
    except InvalidData as error:
        raise InvalidData(
            f"column {column.name!r}: {error.detail}; leave it out, or export as csv", column=column.name
        ) from error


def _text_cell(text: str, style: str = "") -> str:
    # Excel counts UTF-16 units.
    length = len(text) if text.isascii() else len(text.encode("utf-16-le")) // 2
    if length > MAX_CELL_CHARACTERS:
        raise InvalidData(f"a text has {length} characters; a cell of a workbook holds {MAX_CELL_CHARACTERS}")
    safe = _UNSAFE.sub(lambda found: f"_x{ord(found.group()):04X}_", text).translate(_ENTITIES)
    return f'<c{style} t="inlineStr"><is><t xml:space="preserve">{safe}</t></is></c>'


def _number(text: str) -> str | None:
    digits = text.lstrip("-").replace(".", "")
    if not digits.isdigit() or len(digits.strip("0")) > _EXACT_DIGITS or len(digits) > 300:
        return None
    return f"<c><v>{text}</v></c>"


def _double(text: str) -> str | None:
    return None if text in ("NaN", "Infinity", "-Infinity") else f"<c><v>{text}</v></c>"


def _boolean(text: str) -> str:
    return f'<c t="b"><v>{int(text == "t")}</v></c>'


def _date(text: str) -> str | None:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        return None
    return f"<c{_DATE_STYLE}><v>{(day - _EPOCH).days}</v></c>" if day >= _DATES_FROM else None


def _time(text: str) -> str | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    if time.date() < _DATES_FROM:
        return None
    of_day = ((time.hour * 60 + time.minute) * 60 + time.second) * 1_000_000 + time.microsecond
    days = (time.date() - _EPOCH).days + of_day / _DAY_MICROSECONDS
    return f"<c{_TIME_STYLE}><v>{days!r}</v></c>" if days < _DAYS_END else None


_WRITERS: dict[str, Callable[[str], str | None]] = {
    "bigint": _number,
    "numeric": _number,
    "double precision": _double,
    "boolean": _boolean,
    "date": _date,
    "timestamp": _time,
    "timestamptz": _time,
}
