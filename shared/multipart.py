"""A stream of chunks becomes one object: parts are gathered, sent side by side, and completed at the end."""

import asyncio
from types import TracebackType
from typing import Self

import structlog

from shared.domain.errors import SluiceError
from shared.ports.objects import MIN_PART_BYTES, ObjectStore, Part, UploadHook

log = structlog.get_logger(__name__)


def part_size(number: int, part_bytes: int, *, equal: int = 1000, step: int = 1000) -> int:
    """The size of part `number`: `part_bytes` for the first `equal` parts, then doubled every `step`, up to 32 times.

    So 10,000 parts hold 1.5 TB from 8 MiB on.
    """
    return part_bytes << min(max(0, -(-(number - equal) // step)), 5)


class MultipartWriter:
    """Writes one object; use it as a context manager, which aborts unless `finish` was reached.

    At most `parallel` parts are on their way while one more is gathered, so memory is bounded by
    `(parallel + 1) * part_bytes` (more beyond 1000 parts, see `part_size`). A body that fits into one part
    is stored without a multipart upload. Not for concurrent use.

    Raises what `ObjectStore` raises, at the next `write` or at `finish`.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        part_bytes: int,
        parallel: int = 2,
        content_type: str = "application/octet-stream",
        on_upload_created: UploadHook | None = None,
    ) -> None:
        if part_bytes < MIN_PART_BYTES:
            raise ValueError(f"part_bytes is {part_bytes}; S3 wants {MIN_PART_BYTES} at least")
        self._store = store
        self._key = key
        self._part_bytes = part_bytes
        self._parallel = parallel
        self._content_type = content_type
        self._on_upload_created = on_upload_created
        self._buffer = bytearray()
        self._upload_id: str | None = None
        self._sending: set[asyncio.Task[Part]] = set()
        self._parts: list[Part] = []
        self._next_number = 1
        self._finished = False
        self.bytes = 0
        """Bytes written so far."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._finished:
            await self.abort()

    async def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Take a chunk; waits while `parallel` parts are on their way."""
        self.bytes += len(chunk)
        view = memoryview(chunk)
        # `>` and not `>=`: whether a full part is the whole body shows only when more comes.
        while len(self._buffer) + len(view) > (size := part_size(self._next_number, self._part_bytes)):
            take = size - len(self._buffer)
            self._buffer += view[:take]
            view = view[take:]
            await self._send_part()
        self._buffer += view

    async def finish(self) -> str:
        """Complete the object and return its ETag.

        When it raises `StoreUnavailable` the object may be there all the same: delete the key.
        """
        if self._upload_id is None:
            etag = await self._store.put(self._key, self._buffer, content_type=self._content_type)
        else:
            await self._send_part()
            while self._sending:
                await self._collect()
            self._parts.sort(key=lambda part: part.number)
            etag = await self._store.complete_upload(self._key, self._upload_id, self._parts)
        self._finished = True
        return etag

    async def abort(self) -> None:
        """Stop every transfer and drop the upload. An unreachable store keeps it for the sweeper."""
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        self._sending.clear()
        self._buffer = bytearray()
        if self._upload_id is not None:
            try:
                await asyncio.shield(self._store.abort_upload(self._key, self._upload_id))
            except SluiceError as error:  # must not hide what led here
                log.warning("upload_left_behind", key=self._key, upload_id=self._upload_id, reason=error.detail)

    async def _send_part(self) -> None:
        if self._upload_id is None:
            await self._begin()
        assert self._upload_id is not None
        while len(self._sending) >= self._parallel:
            await self._collect()
        body, self._buffer = self._buffer, bytearray()
        number, self._next_number = self._next_number, self._next_number + 1
        self._sending.add(
            asyncio.create_task(self._store.put_part(self._key, self._upload_id, number, body), name=f"part {number}")
        )

    async def _begin(self) -> None:
        creating = asyncio.ensure_future(self._store.create_upload(self._key, content_type=self._content_type))
        try:
            self._upload_id = await asyncio.shield(creating)
        except asyncio.CancelledError:
            await asyncio.wait([creating])
            if not creating.cancelled() and creating.exception() is None:
                self._upload_id = creating.result()  # so that `abort` knows it
            raise
        if self._on_upload_created:
            await self._on_upload_created(self._upload_id)

    async def _collect(self) -> None:
        done, self._sending = await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        if failures := [failure for task in done if (failure := task.exception())]:
            raise failures[0]
        self._parts += [task.result() for task in done]
