"""Cuts small Parquet files into pages and footer, and joins footers: the pages of many files become one file.

Everything a Parquet file knows of itself is in its footer, and the only things there that depend on where pages lie are
the offsets of column chunks. Field numbers are those of `parquet.thrift` in the Parquet format's specification.
"""

from collections.abc import Iterable
from typing import NamedTuple

from export_worker.formats.thrift_compact import Field, Items, Struct, Type, read_struct, write_struct

MAGIC = b"PAR1"
_LENGTH_BYTES = 4

_FILE_ROWS = 3
_FILE_GROUPS = 4
_GROUP_COLUMNS = 1
_GROUP_OFFSET = 5
_GROUP_ORDINAL = 7
_CHUNK_OFFSETS = (2, 4, 6)  # file_offset, offset_index_offset, column_index_offset
_CHUNK_META = 3
_META_OFFSETS = (9, 10, 11, 14)  # of data pages, index page, dictionary page, bloom filter


class Pages(NamedTuple):
    """The pages of one file without magic and footer, and its row groups as the footer describes them."""

    data: bytes
    rows: int
    groups: list[bytes]


def take_apart(file: bytes) -> Pages:
    footer, start = _footer(file)
    groups = [write_struct(group) for group in footer[_FILE_GROUPS].value.values]
    return Pages(file[len(MAGIC) : start], footer[_FILE_ROWS].value, groups)


def joined_footer(empty_file: bytes, pages: Iterable[tuple[int, int, Iterable[bytes]]]) -> bytes:
    """The end of a file of MAGIC and these pages, each given as bytes, rows and groups; `empty_file` has the schema."""
    footer, _ = _footer(empty_file)
    position = rows = 0
    # Written one by one: as Python values all groups of a large file are hundreds of megabytes.
    groups: list[bytes] = []
    for size, count, described in pages:
        groups += [write_struct(_moved(read_struct(group), position)) for group in described]
        position += size
        rows += count
    footer[_FILE_ROWS] = Field(Type.I64, rows)
    footer[_FILE_GROUPS] = Field(Type.LIST, Items(Type.STRUCT, groups))
    written = write_struct(footer)
    return written + len(written).to_bytes(_LENGTH_BYTES, "little") + MAGIC


def _footer(file: bytes) -> tuple[Struct, int]:
    end = len(file) - len(MAGIC) - _LENGTH_BYTES
    start = end - int.from_bytes(file[end : end + _LENGTH_BYTES], "little")
    return read_struct(file[start:end]), start


def _moved(group: Struct, by: int) -> Struct:
    # Not needed, and 16 bits would not be enough for it.
    group.pop(_GROUP_ORDINAL, None)
    _move(group, (_GROUP_OFFSET,), by)
    for chunk in group[_GROUP_COLUMNS].value.values:
        _move(chunk, _CHUNK_OFFSETS, by)
        if _CHUNK_META in chunk:
            _move(chunk[_CHUNK_META].value, _META_OFFSETS, by)
    return group


def _move(struct: Struct, offsets: Iterable[int], by: int) -> None:
    for number in offsets:
        # Zero stands for "not there" in files of old; no page lies before the magic.
        if number in struct and struct[number].value:
            struct[number] = Field(Type.I64, struct[number].value + by)
