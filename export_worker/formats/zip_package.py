"""The records of a ZIP file under 4 GiB, for members that are written by hand (PKWARE APPNOTE, 4.3)."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

_VERSION = 20
_DEFLATED = 8
_SIZES_FOLLOW = 0x08
_NO_TIME = 0
_FIRST_DAY = 0x21  # 1980-01-01


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    offset: int
    bytes: int
    packed_bytes: int
    crc: int
    streamed: bool = False
    """Whether its sizes follow it, as they were not known before."""


def local_header(name: str, member: Member | None = None) -> bytes:
    """Without a member the sizes follow in its `descriptor`."""
    flags = _SIZES_FOLLOW if member is None else 0
    sizes = (member.crc, member.packed_bytes, member.bytes) if member else (0, 0, 0)
    fixed = struct.pack(
        "<4s5H3L2H", b"PK\x03\x04", _VERSION, flags, _DEFLATED, _NO_TIME, _FIRST_DAY, *sizes, len(name), 0
    )
    return fixed + name.encode("ascii")


def descriptor(member: Member) -> bytes:
    return struct.pack("<4s3L", b"PK\x07\x08", member.crc, member.packed_bytes, member.bytes)


def central_directory(members: Sequence[Member], position: int) -> bytes:
    """What ends the file, from `position` on."""
    entries = b"".join(map(_entry, members))
    count = len(members)
    return entries + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(entries), position, 0)


def _entry(member: Member) -> bytes:
    fixed = struct.pack(
        "<4s6H3L5H2L",
        b"PK\x01\x02",
        _VERSION,
        _VERSION,
        _SIZES_FOLLOW if member.streamed else 0,
        _DEFLATED,
        _NO_TIME,
        _FIRST_DAY,
        member.crc,
        member.packed_bytes,
        member.bytes,
        len(member.name),
        0,
        0,
        0,
        0,
        0,
        member.offset,
    )
    return fixed + member.name.encode("ascii")
