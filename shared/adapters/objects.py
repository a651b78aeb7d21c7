"""The object store: admin calls through the minio SDK, bytes by aiohttp on URLs that the SDK signs.

Considerations

- A part or object is accepted only if the ETag that comes back is the MD5 of what was sent. The MD5 is made
  in a thread while the bytes are on their way. Stores whose ETag is no MD5 (SSE-KMS, SSE-C) say so by a
  header, or by an ETag of another form; then TLS is what protects the bytes. With `s3_checksum=crc32` the
  store itself compares a CRC-32 before it accepts, and says so in its answer; one that does not is checked
  by MD5. It is not the default because AWS refuses such parts in uploads that were not begun for them.
- Timeouts count silence, not duration: a transfer may take hours, but `idle_seconds` without a byte is
  `StoreUnavailable`. Sends are repeated here for as long as one silence may last; reads are resumed by
  the caller, who knows which bytes it has used.
- A call whose answer is lost may have been carried out: `create_upload` then leaves an upload that nobody
  knows (the sweeper's), `complete_upload` an object that a repeat finds.
- SeaweedFS 4.48: `If-Match` holds for GET with and without `Range`; a range of an empty object is 416, also
  `0-`; a part copied inside the store has an ETag like that of a multipart object, so only sizes are
  compared; completing twice answers alike; aborting a completed upload succeeds and leaves the object;
  listed upload keys come unquoted although the answer says `url`, so we ask for no encoding; `a//b` is `a/b`;
  a part sent twice is listed twice, stamped to the second, and completing takes the one whose ETag is named.
- SeaweedFS pages uploads by their ids alone and S3 by key and id, so the markers go back as they came;
  minio 7.2.20 keeps one of them under a misspelt name.
"""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import timedelta
from itertools import islice
from urllib.parse import quote

import structlog
from minio import Minio
from minio.datatypes import ListMultipartUploadsResult
from minio.datatypes import Part as MinioPart
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

from shared.adapters.object_compose import Piece, plan_parts
from shared.adapters.s3_client import S3Client
from shared.adapters.s3_transfer import Transfers, size_of
from shared.config import Settings
from shared.domain.errors import ObjectMissing, StoreMisconfigured, StoreUnavailable, UploadMissing
from shared.ports.objects import Body, ObjectInfo, ObjectStat, Part, UploadInfo

log = structlog.get_logger(__name__)

OCTETS = "application/octet-stream"
# S3 keeps no type of a part. SeaweedFS looks into parts of no particular type and compresses those that hold text,
# which makes reading them cost many times as much.
PART_TYPE = "application/x-part"
PAGE = 1000  # S3's largest page of a listing


class S3ObjectStore:
    """`shared.ports.objects.ObjectStore` on one bucket; every key gets `settings.s3_prefix` in front."""

    def __init__(self, settings: Settings, *, idle_seconds: float = 15.0, copy_seconds: float = 120.0) -> None:
        self._prefix = settings.s3_prefix
        self._s3 = S3Client(settings, idle_seconds=idle_seconds, copy_seconds=copy_seconds)
        self._transfers = Transfers(self._s3, idle_seconds=idle_seconds, crc32=settings.s3_checksum == "crc32")

    # --- bucket

    async def probe(self) -> None:
        if not await self._s3.ask(lambda s3: s3.bucket_exists(self._s3.bucket)):
            raise StoreMisconfigured(f"the object store at {self._s3.endpoint} has no bucket {self._s3.bucket!r}")

    async def ensure_bucket(self) -> None:
        def ensure(s3: Minio) -> None:
            try:
                if not s3.bucket_exists(self._s3.bucket):
                    s3.make_bucket(self._s3.bucket)
            except S3Error as error:  # another process was quicker
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        await self._s3.change(ensure)

    # --- objects

    async def stat(self, key: str) -> ObjectStat:
        found = await self._s3.ask(lambda s3: s3.stat_object(self._s3.bucket, self._prefix + key), key)
        assert found.size is not None
        assert found.etag is not None
        assert found.last_modified is not None
        return ObjectStat(found.size, found.etag, found.last_modified)

    def read(
        self, key: str, *, etag: str | None = None, start: int = 0, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        return self._transfers.get(self._prefix + key, etag=etag, start=start, end=end)

    async def put(self, key: str, body: Body, *, content_type: str = OCTETS) -> str:
        return await self._transfers.put(self._prefix + key, {}, body, content_type)

    async def delete(self, *keys: str) -> None:
        def delete(s3: Minio) -> list[str]:
            doomed = [DeleteObject(self._prefix + key) for key in keys]
            return [str(error) for error in s3.remove_objects(self._s3.bucket, doomed)]

        if errors := await self._s3.change(delete):
            raise StoreUnavailable(f"{len(errors)} of {len(keys)} objects could not be deleted: {errors[0]}")

    async def list_objects(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        found = await self._s3.ask(lambda s3: s3.list_objects(self._s3.bucket, self._prefix + prefix, recursive=True))
        while page := await self._s3.ask(lambda _: list(islice(found, PAGE))):
            for item in page:
                assert item.object_name is not None
                assert item.last_modified is not None
                yield ObjectInfo(item.object_name.removeprefix(self._prefix), item.size or 0, item.last_modified)

    def presign_get(self, key: str, seconds: int, *, filename: str | None = None) -> str:
        query = {}
        if filename is not None:
            query["response-content-disposition"] = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        expiry = timedelta(seconds=seconds)
        return str(self._s3.presign("GET", self._prefix + key, query=query, expiry=expiry, public=True))

    # --- multipart uploads: the SDK offers them only through its underscored methods, called nowhere else

    async def create_upload(self, key: str, *, content_type: str = OCTETS) -> str:
        return await self._s3.change(
            lambda s3: s3._create_multipart_upload(self._s3.bucket, self._prefix + key, {"Content-Type": content_type}),
            key,
        )

    async def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        query = {"partNumber": str(number), "uploadId": upload_id}
        etag = await self._transfers.put(self._prefix + key, query, body, PART_TYPE)
        return Part(number, etag, size_of(body))

    async def list_parts(self, key: str, upload_id: str) -> list[Part]:
        listed: list[MinioPart] = []
        marker: str | None = None
        while True:
            page = await self._s3.ask(
                lambda s3, marker=marker: s3._list_parts(  # type: ignore[misc]
                    self._s3.bucket, self._prefix + key, upload_id, max_parts=PAGE, part_number_marker=marker
                ),
                key,
            )
            listed += page.parts
            if not page.is_truncated or not page.parts:
                return _latest(listed)
            marker = page.next_part_number_marker or str(page.parts[-1].part_number)

    async def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        def complete(s3: Minio) -> str | None:
            listed = [MinioPart(part.number, part.etag) for part in parts]
            return s3._complete_multipart_upload(self._s3.bucket, self._prefix + key, upload_id, listed).etag

        async def complete_once() -> str:
            etag = await self._s3.change(complete, key, patient=True)
            if not etag:  # S3 may find an error after it has sent "200 OK"
                raise StoreUnavailable(f"the object store did not complete the upload of {key!r}")
            return etag

        try:
            return await self._transfers.repeat(complete_once)
        except UploadMissing as missing:
            # An earlier call was carried out and its answer lost, unless the object says otherwise.
            with contextlib.suppress(ObjectMissing):
                found = await self.stat(key)
                if found.bytes == sum(part.bytes for part in parts) and found.etag.endswith(f"-{len(parts)}"):
                    return found.etag
            raise missing

    async def abort_upload(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(UploadMissing, ObjectMissing):
            await self._s3.change(
                lambda s3: s3._abort_multipart_upload(self._s3.bucket, self._prefix + key, upload_id), key
            )

    async def list_uploads(self, prefix: str) -> AsyncIterator[UploadInfo]:
        marker: dict[str, str] = {}
        while True:
            query = {"uploads": "", "prefix": self._prefix + prefix, "max-uploads": str(PAGE), **marker}
            page = await self._s3.ask(
                lambda s3, query=query: ListMultipartUploadsResult(  # type: ignore[misc]
                    s3._execute("GET", self._s3.bucket, query_params=query)
                )
            )
            for upload in page.uploads:
                assert upload.upload_id is not None
                assert upload.initiated_time is not None
                key = upload.object_name.removeprefix(self._prefix)
                yield UploadInfo(key, upload.upload_id, upload.initiated_time)
            next_id = getattr(page, "self._next_upload_id_marker", page.next_upload_id_marker)
            markers = {"key-marker": page.next_key_marker, "upload-id-marker": next_id}
            previous, marker = marker, {name: value for name, value in markers.items() if value}
            if not page.is_truncated or marker == previous:
                return

    async def plan_join(self, sources: Sequence[str]) -> "S3Join":
        return S3Join(self, sources, [await self.stat(source) for source in sources])

    async def copy_part(self, key: str, upload_id: str, number: int, source: str, etag: str, piece: Piece) -> Part:
        """Have the store make a part of a piece of another object. Raises as `Join.make`."""
        headers: dict[str, str | list[str] | tuple[str]] = {
            "x-amz-copy-source": quote(f"/{self._s3.bucket}/{self._prefix}{source}"),
            "x-amz-copy-source-if-match": f'"{etag}"',
        }
        if not piece.whole:
            headers["x-amz-copy-source-range"] = f"bytes={piece.start}-{piece.end - 1}"

        async def copy() -> str:
            etag, _ = await self._s3.change(
                lambda s3: s3._upload_part_copy(self._s3.bucket, self._prefix + key, upload_id, number, headers),
                source,
                patient=True,
            )
            return etag

        return Part(number, await self._transfers.repeat(copy), piece.end - piece.start)

    async def aclose(self) -> None:
        await self._transfers.aclose()
        self._s3.close()


class S3Join:
    """`shared.ports.objects.Join`."""

    def __init__(self, store: S3ObjectStore, sources: Sequence[str], stats: Sequence[ObjectStat]) -> None:
        self._store = store
        self._sources = sources
        self._stats = stats
        self._plan = plan_parts([stat.bytes for stat in stats])

    @property
    def parts(self) -> int:
        return len(self._plan)

    async def make(self, key: str, upload_id: str, number: int) -> Part:
        pieces = self._plan[number - 1]
        if len(pieces) == 1 and pieces[0].copyable:
            source = pieces[0].source
            etag = self._stats[source].etag
            return await self._store.copy_part(key, upload_id, number, self._sources[source], etag, pieces[0])
        body = [chunk for piece in pieces async for chunk in self._read(piece)]
        return await self._store.put_part(key, upload_id, number, body)

    def _read(self, piece: Piece) -> AsyncGenerator[bytes, None]:
        etag = self._stats[piece.source].etag
        return self._store.read(self._sources[piece.source], etag=etag, start=piece.start, end=piece.end)


def _latest(listed: Sequence[MinioPart]) -> list[Part]:
    """One part per number; a number whose latest content cannot be told is left out."""
    newest: dict[int, list[MinioPart]] = {}
    for part in listed:
        rivals = newest.setdefault(part.part_number, [part])
        assert part.last_modified is not None
        assert rivals[0].last_modified is not None
        if part.last_modified > rivals[0].last_modified:
            newest[part.part_number] = [part]
        elif part.last_modified == rivals[0].last_modified:
            rivals.append(part)
    return [
        Part(number, rivals[0].etag, rivals[0].size or 0)
        for number, rivals in sorted(newest.items())
        if len({rival.etag for rival in rivals}) == 1
    ]
