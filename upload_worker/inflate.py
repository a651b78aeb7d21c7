"""Decompresses gzip in a stream and marks seek points, from which decompression can begin again later.

Considerations: a seek point needs zlib's Z_BLOCK, inflatePrime and inflateGetDictionary, which Python's own
zlib module does not offer, so the system's zlib is called directly. Readers that build a seek index
instead (indexed_gzip) inflate everything twice and keep a window for every few MiB. The method is that of
zlib's examples/zran.c. Sums and lengths of all members are checked, also across a resume: the running
checksum is part of the seek point.
"""

import ctypes
import ctypes.util
import struct
import weakref
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from shared.domain.errors import InvalidData

OUTPUT_BYTES = 1 << 20
SPACING_BYTES = 32 << 20
# Deflate cannot do better than 1032:1; real CSV stays far below half of that.
MAX_RATIO = 500
RATIO_FREE_BYTES = 1 << 30

_WINDOW_BYTES = 32 << 10
_TRAILER_BYTES = 8
_GZIP_MEMBER, _RAW_DEFLATE = 31, -15  # windowBits
_NO_FLUSH, _BLOCK = 0, 5
_OK, _STREAM_END, _BUF_ERROR = 0, 1, -5
_AT_BLOCK_END, _BLOCK_FLAGS = 128, 128 | 64  # z_stream.data_type after Z_BLOCK; 64: in the last block


class _Stream(ctypes.Structure):
    _fields_ = (
        ("next_in", ctypes.c_void_p),
        ("avail_in", ctypes.c_uint),
        ("total_in", ctypes.c_ulong),
        ("next_out", ctypes.c_void_p),
        ("avail_out", ctypes.c_uint),
        ("total_out", ctypes.c_ulong),
        ("msg", ctypes.c_char_p),
        ("state", ctypes.c_void_p),
        ("zalloc", ctypes.c_void_p),
        ("zfree", ctypes.c_void_p),
        ("opaque", ctypes.c_void_p),
        ("data_type", ctypes.c_int),
        ("adler", ctypes.c_ulong),
        ("reserved", ctypes.c_ulong),
    )


@lru_cache(maxsize=1)
def _libz() -> Any:
    for name in ("libz.so.1", "libz.dylib", ctypes.util.find_library("z")):
        try:
            if name:
                library = ctypes.CDLL(name)
                library.zlibVersion.restype = ctypes.c_char_p
                return library
        except OSError:
            continue
    raise RuntimeError("Reading gzip needs the zlib library of the system (libz.so.1), which was not found.")


@dataclass(frozen=True)
class SeekPoint:
    """A place where decompression can begin: the start of a member, or of a block inside one."""

    compressed: int = 0
    """Offset of the first byte to read in the stored object."""
    position: int = 0
    """Offset of the first byte that comes out."""
    bits: int = 0
    """How many bits of the byte before `compressed` belong to what follows, and below, which."""
    bits_value: int = 0
    crc: int = 0
    member_bytes: int = 0
    """Uncompressed bytes of the member so far; 0 when it begins here."""
    window: bytes = b""

    _HEAD = struct.Struct("<BQQBBIQ")
    _VERSION = 1

    def to_bytes(self) -> bytes:
        """At most 33 KiB."""
        head = self._HEAD.pack(
            self._VERSION, self.compressed, self.position, self.bits, self.bits_value, self.crc, self.member_bytes
        )
        return head + zlib.compress(self.window, 6)

    @classmethod
    def from_bytes(cls, data: bytes) -> "SeekPoint":
        version, *fields = cls._HEAD.unpack_from(data)
        if version != cls._VERSION:
            raise ValueError(f"unknown version of a gzip seek point: {version}")
        return replace(cls(*fields), window=zlib.decompress(data[cls._HEAD.size :]))


class Inflater:
    """One pass over a gzip object from a seek point on. Not for two threads at a time.

    Raises InvalidData for anything that is no whole, sound gzip.
    """

    def __init__(self, start: SeekPoint, max_uncompressed_bytes: int | None = None) -> None:
        self._library = _libz()
        self._max_uncompressed_bytes = max_uncompressed_bytes
        self._stream = _Stream()
        self._output = ctypes.create_string_buffer(OUTPUT_BYTES)
        self._input = b""
        self._last_byte = 0
        self._trailer = b""
        self._between_members = start.member_bytes == 0
        self._in_trailer = False
        self._raw = start.member_bytes > 0
        self._crc, self._member_bytes = start.crc, start.member_bytes
        self.compressed, self.position = start.compressed, start.position
        self._last_point = start.position
        self.points: list[SeekPoint] = []
        """Seek points passed; the caller takes them away."""
        self._call(
            "inflateInit2_",
            _RAW_DEFLATE if self._raw else _GZIP_MEMBER,
            self._library.zlibVersion(),
            ctypes.c_int(ctypes.sizeof(_Stream)),
        )
        weakref.finalize(self, self._library.inflateEnd, ctypes.byref(self._stream))
        if self._raw:
            if start.bits:
                self._call("inflatePrime", start.bits, start.bits_value)
            self._call("inflateSetDictionary", start.window, len(start.window))

    def feed(self, chunk: bytes) -> None:
        """More compressed bytes; only after `read` has returned nothing."""
        assert not self._input
        self._input = chunk

    def read(self) -> bytes:
        """The next uncompressed bytes, at most OUTPUT_BYTES; nothing when it needs to be fed."""
        while self._input:
            if self._in_trailer:
                self._read_trailer()
            elif self._between_members:
                self._begin_member()
            else:
                produced = self._inflate()
                if produced:
                    return produced
        return b""

    def finish(self) -> None:
        """Raises InvalidData unless the object may end here."""
        if not self._between_members:
            raise InvalidData(
                f"The gzip data ends too early, after {self.compressed} compressed bytes. The file is "
                "incomplete: upload it again.",
                compressed_offset=self.compressed,
            )

    def _inflate(self) -> bytes:
        stream, source = self._stream, self._input
        stream.next_in = ctypes.cast(ctypes.c_char_p(source), ctypes.c_void_p)
        stream.avail_in = len(source)
        stream.next_out = ctypes.addressof(self._output)
        stream.avail_out = OUTPUT_BYTES
        point_due = self.position - self._last_point >= SPACING_BYTES
        result = self._library.inflate(ctypes.byref(stream), _BLOCK if point_due else _NO_FLUSH)
        used = len(source) - stream.avail_in
        produced = ctypes.string_at(self._output, OUTPUT_BYTES - stream.avail_out)
        self._consume(used)
        self.position += len(produced)
        self._member_bytes += len(produced)
        self._crc = zlib.crc32(produced, self._crc) if self._raw else stream.adler
        if result not in (_OK, _STREAM_END, _BUF_ERROR):
            raise self._corrupt((stream.msg or b"unknown error").decode())
        self._check_size()
        if result == _STREAM_END:
            self._in_trailer, self._between_members = self._raw, not self._raw
        elif point_due and self._member_bytes and stream.data_type & _BLOCK_FLAGS == _AT_BLOCK_END:
            self._mark_block(stream.data_type & 7)
        return produced

    def _consume(self, count: int) -> None:
        if count:
            self._last_byte = self._input[count - 1]
        self._input = self._input[count:]
        self.compressed += count

    def _begin_member(self) -> None:
        padding = len(self._input) - len(self._input.lstrip(b"\0"))
        self._consume(padding)
        if not self._input:
            return
        if self.position - self._last_point >= SPACING_BYTES:
            self._add(SeekPoint(self.compressed, self.position))
        self._call("inflateReset2", _GZIP_MEMBER)
        self._raw = self._between_members = False
        self._crc = self._member_bytes = 0

    def _read_trailer(self) -> None:
        """After a resume inside a member zlib sees raw deflate, so its trailer is checked here."""
        part = self._input[: _TRAILER_BYTES - len(self._trailer)]
        self._trailer += part
        self._consume(len(part))
        if len(self._trailer) < _TRAILER_BYTES:
            return
        crc, length = struct.unpack("<II", self._trailer)
        if crc != self._crc:
            raise self._corrupt("incorrect data check")
        if length != self._member_bytes & 0xFFFFFFFF:
            raise self._corrupt("incorrect length check")
        self._trailer = b""
        self._in_trailer, self._between_members = False, True

    def _mark_block(self, bits: int) -> None:
        window = ctypes.create_string_buffer(_WINDOW_BYTES)
        length = ctypes.c_uint(0)
        self._call("inflateGetDictionary", window, ctypes.byref(length))
        value = self._last_byte >> (8 - bits) if bits else 0
        self._add(
            SeekPoint(
                self.compressed,
                self.position,
                bits,
                value,
                self._crc,
                self._member_bytes,
                window.raw[: length.value],
            )
        )

    def _add(self, point: SeekPoint) -> None:
        self.points.append(point)
        self._last_point = point.position

    def _check_size(self) -> None:
        limit = self._max_uncompressed_bytes
        if limit is not None and self.position > limit:
            raise InvalidData(
                f"The gzip data unpacks to more than {limit} bytes, the most that is allowed here.",
                max_uncompressed_bytes=limit,
            )
        if self.position > RATIO_FREE_BYTES and self.position > MAX_RATIO * self.compressed:
            raise InvalidData(
                f"{self.compressed} bytes of gzip data unpacked to {self.position} bytes, more than {MAX_RATIO} "
                "times as much. This looks like a decompression bomb; unpack the file and upload it as it is.",
                max_ratio=MAX_RATIO,
            )

    def _corrupt(self, reason: str) -> InvalidData:
        return InvalidData(
            f"The gzip data is corrupt near compressed byte {self.compressed} ({reason}). Make the file anew "
            "and upload it again.",
            compressed_offset=self.compressed,
        )

    def _call(self, function: str, *arguments: Any) -> None:
        result = getattr(self._library, function)(ctypes.byref(self._stream), *arguments)
        if result != _OK:
            raise RuntimeError(f"zlib's {function} answered {result}")
