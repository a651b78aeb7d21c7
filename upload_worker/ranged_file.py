"""A stored object as a file for libraries that read files from threads: each read is one ranged GET on the loop."""

import asyncio
import io
from typing import TYPE_CHECKING

from upload_worker.sources import RangeReader, closing

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

# The object store gives up on a read that stalls well before; this is for a loop that is gone.
_READ_SECONDS = 300.0


class RangedFile(io.RawIOBase):
    """Make it on the loop, read it in threads. After `close` every read fails, so that its reader ends soon."""

    def __init__(self, reader: RangeReader, size: int) -> None:
        super().__init__()
        self._reader = reader
        self._size = size
        self._position = 0
        self._loop = asyncio.get_running_loop()
        self.error: Exception | None = None
        """Why a read failed: libraries do not pass our errors on as they are."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        if self.closed:
            raise ValueError("read of a closed file")
        start = self._position
        end = self._size if size < 0 else min(self._size, start + size)
        if start >= end:
            return b""
        try:
            data = asyncio.run_coroutine_threadsafe(self._fetch(start, end), self._loop).result(_READ_SECONDS)
        except Exception as error:
            self.error = error
            raise
        self._position = start + len(data)
        return data

    async def _fetch(self, start: int, end: int) -> bytes:
        data = bytearray()
        async with closing(self._reader(start, end)) as chunks:
            async for chunk in chunks:
                data += chunk
        return bytes(data)
