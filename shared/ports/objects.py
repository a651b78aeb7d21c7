"""What the services need of an object store: objects, multipart uploads, listings, signed links."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

MIB = 1024 * 1024

MIN_PART_BYTES = 5 * MIB
"""Every part but the last (Amazon S3, "multipart upload limits"; SeaweedFS and MinIO enforce it too)."""

MAX_PARTS = 10_000
"""Parts of one multipart upload (the same page)."""

Buffer = bytes | bytearray | memoryview
Body = Buffer | Sequence[Buffer]
"""Bytes to send, whole or in pieces; a repeated send reads them again, so do not change them meanwhile."""

UploadHook = Callable[[str], Awaitable[None]]
"""Is told a new upload id before the first part is sent, so that it can be written down first."""


@dataclass(frozen=True, slots=True)
class ObjectStat:
    bytes: int
    etag: str
    last_modified: datetime


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    key: str
    bytes: int
    last_modified: datetime


@dataclass(frozen=True, slots=True)
class Part:
    number: int
    etag: str
    bytes: int


@dataclass(frozen=True, slots=True)
class UploadInfo:
    key: str
    upload_id: str
    started_at: datetime


class Join(Protocol):
    """Objects that become one: the parts of an upload, to be made in any order. The sources stay."""

    @property
    def parts(self) -> int: ...

    async def make(self, key: str, upload_id: str, number: int) -> Part:
        """Make part `number`, from 1; a repeat overwrites.

        Raises `UploadMissing`, and `ObjectMissing` or `SourceChanged` when a source is not as it was planned for.
        """
        ...


class ObjectStore(Protocol):
    """An S3-compatible store. ETags are without quotes.

    Every method raises `StoreUnavailable` when the store does not answer, breaks off or stalls, and
    `StoreMisconfigured` when it refuses us: wrong credentials, bucket or region.
    """

    async def probe(self) -> None:
        """Return when the store answers and the bucket is there."""

    async def ensure_bucket(self) -> None:
        """Create the bucket unless it exists."""

    async def stat(self, key: str) -> ObjectStat:
        """Raises `ObjectMissing`."""

    def read(
        self, key: str, *, etag: str | None = None, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The bytes from `start` up to, not including, `end`, in chunks as they come.

        All of them arrive or it raises; after `StoreUnavailable` read on from the bytes that came. A range
        that begins at the object's end is empty. Leave early through `contextlib.aclosing`, so that the
        connection is given back at once.

        Raises `SourceChanged` when the object's ETag is not `etag`, `ObjectMissing`.
        """

    async def put(self, key: str, body: Body, *, content_type: str = ...) -> str:
        """Store a whole object and return its ETag; a repeat overwrites. Raises `IntegrityMismatch`."""

    async def create_upload(self, key: str, *, content_type: str = ...) -> str:
        """Begin a multipart upload and return its id. Not idempotent: a repeat begins another."""

    async def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        """Store part `number`, from 1; a repeat overwrites. Raises `UploadMissing`, `IntegrityMismatch`."""

    async def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """The parts of an upload by number. Raises `UploadMissing`.

        A number that was sent with different bytes within one second may be absent: send it again.
        """

    async def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        """Make the parts one object and return its ETag.

        Idempotent: after a lost answer a repeat succeeds if the object is there. Raises `UploadMissing`
        when neither upload nor object is there, `StoreRefused` when a part is not what the store has.
        """

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Drop an upload and its parts. Idempotent; leaves a completed object alone."""

    async def plan_join(self, sources: Sequence[str]) -> "Join":
        """How to join `sources` in order into one object, inside the store but for pieces under 5 MiB.

        Raises `ObjectMissing`.
        """

    async def delete(self, *keys: str) -> None:
        """Delete objects; the missing ones do not matter."""

    def list_objects(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, by key."""

    def list_uploads(self, prefix: str) -> AsyncIterator[UploadInfo]:
        """Every open multipart upload whose key begins with `prefix`."""

    def presign_get(self, key: str, seconds: int, *, filename: str | None = None) -> str:
        """A link that anyone may GET for `seconds`; `filename` makes browsers save it under that name."""

    async def aclose(self) -> None:
        """Close every connection."""
