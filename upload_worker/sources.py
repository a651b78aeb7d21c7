"""Where the uncompressed bytes of a CSV object come from: a plain or a gzip object, read by ranges."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Protocol

from shared.domain.csv_options import Compression
from upload_worker.inflate import Inflater, SeekPoint

# Enough to reach back behind the slowest lane; older ones are in the checkpoint or not needed.
_POINTS_KEPT = 4


class RangeReader(Protocol):
    """Reads bytes `[start, end)` of the stored object, in chunks of any size; `end` None means to its end."""

    def __call__(self, start: int, end: int | None) -> AsyncIterator[bytes]: ...


class ByteSource(Protocol):
    """An object's uncompressed bytes, readable from any position."""

    @property
    def size(self) -> int | None:
        """Uncompressed bytes, None while unknown."""

    def read(self, start: int, end: int | None = None) -> AsyncIterator[bytes]: ...


def closing(chunks: AsyncIterator[bytes]) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
    """Gives a stream's connection back at once when it is left early."""
    return aclosing(chunks) if isinstance(chunks, AsyncGenerator) else nullcontext(chunks)


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


class GzipSource:
    """A gzip object of any number of members; positions count uncompressed bytes.

    A read begins at the nearest seek point before its start, so going on costs no more than what lies
    between two of them (SPACING_BYTES).
    """

    size = None

    def __init__(
        self, reader: RangeReader, state: bytes | None = None, max_uncompressed_bytes: int | None = None
    ) -> None:
        self._reader = reader
        self._max_uncompressed_bytes = max_uncompressed_bytes
        self._restored = SeekPoint.from_bytes(state) if state else SeekPoint()
        self._points: deque[SeekPoint] = deque(maxlen=_POINTS_KEPT)
        self._compressed_position = self._restored.compressed

    @property
    def compressed_position(self) -> int:
        """How far the stored object has been read: progress, where the uncompressed size is unknown."""
        return self._compressed_position

    def resume_state(self, position: int) -> bytes | None:
        """What a later source needs to read from `position` on: 33 KiB at most, None for "from the start".

        `position` is the lowest one that is not done.
        """
        point = self._nearest(position)
        return point.to_bytes() if point.position else None

    def _nearest(self, position: int) -> SeekPoint:
        candidates = [SeekPoint(), self._restored, *self._points]
        return max((p for p in candidates if p.position <= position), key=lambda p: p.position)

    async def read(self, start: int, end: int | None = None) -> AsyncIterator[bytes]:
        inflater = Inflater(self._nearest(start), self._max_uncompressed_bytes)
        async with closing(self._reader(inflater.compressed, None)) as chunks:
            async for chunk in chunks:
                inflater.feed(chunk)
                while True:
                    begin = inflater.position
                    data = await asyncio.to_thread(inflater.read)
                    self._note(inflater)
                    if not data:
                        break
                    wanted = data[max(0, start - begin) : None if end is None else max(0, end - begin)]
                    if wanted:
                        yield wanted
                    if end is not None and inflater.position >= end:
                        return
        inflater.finish()

    def _note(self, inflater: Inflater) -> None:
        newest = self._points[-1].position if self._points else self._restored.position
        self._points.extend(point for point in inflater.points if point.position > newest)
        inflater.points.clear()
        self._compressed_position = max(self._compressed_position, inflater.compressed)


def open_source(
    reader: RangeReader,
    size: int,
    compression: Compression,
    state: bytes | None = None,
    max_uncompressed_bytes: int | None = None,
) -> PlainSource | GzipSource:
    """The source for an object of `size` stored bytes; `state` is an earlier source's `resume_state`."""
    if compression is Compression.GZIP:
        return GzipSource(reader, state, max_uncompressed_bytes)
    return PlainSource(reader, size)
