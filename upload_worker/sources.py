"""Where the bytes of a CSV object come from: plain objects, read by ranges."""

from collections.abc import AsyncIterator
from typing import Protocol


class RangeReader(Protocol):
    """Reads bytes `[start, end)` of the stored object, in chunks of any size; `end` None means to its end."""

    def __call__(self, start: int, end: int | None) -> AsyncIterator[bytes]: ...


class ByteSource(Protocol):
    """An object's uncompressed bytes, readable from any position."""

    @property
    def size(self) -> int | None:
        """Uncompressed bytes, None while unknown."""

    def read(self, start: int, end: int | None = None) -> AsyncIterator[bytes]: ...


class PlainSource:
    """An object that is stored as it is."""

    def __init__(self, reader: RangeReader, size: int) -> None:
        self._reader = reader
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def read(self, start: int, end: int | None = None) -> AsyncIterator[bytes]:
        return self._reader(start, end)
