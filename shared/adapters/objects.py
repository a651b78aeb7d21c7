"""The object store: admin calls through the minio SDK, bytes by aiohttp on URLs that the SDK signs.

Considerations

- A part or object is accepted only if the ETag that comes back is the MD5 of what was sent. The MD5 is made
  in a thread while the bytes are on their way. Stores whose ETag is no MD5 (SSE-KMS, SSE-C) say so by a
  header, or by an ETag of another form; then TLS is what protects the bytes.
- Timeouts count silence, not duration: a transfer may take hours, but `idle_seconds` without a byte is
  `StoreUnavailable`. Sends are repeated here for as long as one silence may last; reads are resumed by
  the caller, who knows which bytes it has used.
- A call whose answer is lost may have been carried out: `create_upload` then leaves an upload that nobody
  knows (the sweeper's), `complete_upload` an object that a repeat finds.
- SeaweedFS 4.48: `If-Match` holds for GET with and without `Range`; a range of an empty object is 416, also
  `0-`; a part copied inside the store has an ETag like that of a multipart object, so only sizes are
  compared; completing twice answers alike; aborting a completed upload succeeds and leaves the object;
  listed upload keys come unquoted although the answer says `url`, so we ask for no encoding.
- minio 7.2.20 never sets `next_upload_id_marker` (it is stored under another name): the last upload of a
  page is the marker.
"""

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from http import HTTPStatus
from itertools import islice
from typing import TypeVar
from urllib.parse import quote
from xml.etree import ElementTree

import aiohttp
import yarl
from minio import Minio
from minio.datatypes import ListMultipartUploadsResult
from minio.datatypes import Part as MinioPart
from minio.deleteobjects import DeleteObject
from minio.error import S3Error

from shared.adapters.object_compose import Piece, plan_parts
from shared.adapters.s3_client import CONNECT_SECONDS, S3Client
from shared.config import Settings
from shared.domain.errors import (
    IntegrityMismatch,
    ObjectMissing,
    Retryable,
    SourceChanged,
    StoreMisconfigured,
    StoreUnavailable,
    UploadMissing,
)
from shared.ports.objects import (
    MIB,
    Body,
    Buffer,
    ObjectInfo,
    ObjectStat,
    Part,
    UploadHook,
    UploadInfo,
)

T = TypeVar("T")

OCTETS = "application/octet-stream"
PAGE = 1000  # S3's largest page of a listing
READ_BUFFER_BYTES = 1 * MIB
SEND_SLICE_BYTES = 256 * 1024
COPIES_AT_ONCE = 4


class S3ObjectStore:
    """`shared.ports.objects.ObjectStore` on one bucket; every key gets `settings.s3_prefix` in front."""

    def __init__(
        self, settings: Settings, *, idle_seconds: float = 15.0, copy_seconds: float = 120.0
    ) -> None:
        self._prefix = settings.s3_prefix
        self._idle_seconds = idle_seconds
        self._s3 = S3Client(settings, idle_seconds=idle_seconds, copy_seconds=copy_seconds)
        self._hashers = ThreadPoolExecutor(2, thread_name_prefix="s3-md5")
        self._http: aiohttp.ClientSession | None = None

    # --- bucket

    async def probe(self) -> None:
        if not await self._s3.call(lambda s3: s3.bucket_exists(self._s3.bucket)):
            raise StoreMisconfigured(
                f"the object store at {self._s3.endpoint} has no bucket {self._s3.bucket!r}"
            )

    async def ensure_bucket(self) -> None:
        def ensure(s3: Minio) -> None:
            try:
                if not s3.bucket_exists(self._s3.bucket):
                    s3.make_bucket(self._s3.bucket)
            except S3Error as error:  # another process was quicker
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        await self._s3.call(ensure)

    # --- objects

    async def stat(self, key: str) -> ObjectStat:
        found = await self._s3.call(lambda s3: s3.stat_object(self._s3.bucket, self._prefix + key), key=key)
        assert found.size is not None
        assert found.etag is not None
        assert found.last_modified is not None
        return ObjectStat(found.size, found.etag, found.last_modified)

    async def read(
        self, key: str, *, etag: str | None = None, start: int = 0, end: int | None = None
    ) -> AsyncIterator[bytes]:
        if end is not None and end <= start:
            return
        headers = {"If-Match": f'"{etag}"'} if etag else {}
        if start or end is not None:  # an empty object has no range that could be asked for
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            async with self._session().get(self._sign("GET", key), headers=headers) as response:
                if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return
                await self._check(response, key)
                if etag and _etag(response) != etag:
                    raise SourceChanged(f"the object {key!r} was replaced")
                missing = response.content_length
                async for chunk in response.content.iter_any():
                    if missing is not None:
                        missing -= len(chunk)
                    yield chunk
                if missing:
                    raise StoreUnavailable(
                        f"the object store broke off {missing} bytes before the end of {key!r}"
                    )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broke_off(key, error) from error

    async def put(self, key: str, body: Body, *, content_type: str = OCTETS) -> str:
        async def send() -> str:
            return await self._send(key, {}, body, content_type)

        return await self._repeat(send)

    async def delete(self, *keys: str) -> None:
        def delete(s3: Minio) -> list[str]:
            doomed = [DeleteObject(self._prefix + key) for key in keys]
            return [str(error) for error in s3.remove_objects(self._s3.bucket, doomed)]

        if errors := await self._s3.call(delete):
            raise StoreUnavailable(f"{len(errors)} of {len(keys)} objects could not be deleted: {errors[0]}")

    async def list_objects(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        found = await self._s3.call(
            lambda s3: s3.list_objects(self._s3.bucket, self._prefix + prefix, recursive=True)
        )
        while page := await self._s3.call(lambda _: list(islice(found, PAGE))):
            for item in page:
                assert item.object_name is not None
                assert item.last_modified is not None
                yield ObjectInfo(
                    item.object_name.removeprefix(self._prefix), item.size or 0, item.last_modified
                )

    def presign_get(self, key: str, seconds: int, *, filename: str | None = None) -> str:
        query = {}
        if filename is not None:
            query["response-content-disposition"] = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        return str(self._sign("GET", key, query, timedelta(seconds=seconds)))

    # --- multipart uploads: the SDK offers them only through its underscored methods, called nowhere else

    async def create_upload(self, key: str, *, content_type: str = OCTETS) -> str:
        return await self._s3.call(
            lambda s3: s3._create_multipart_upload(
                self._s3.bucket, self._prefix + key, {"Content-Type": content_type}
            ),
            key=key,
        )

    async def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        query = {"partNumber": str(number), "uploadId": upload_id}

        async def send() -> str:
            return await self._send(key, query, body, OCTETS)

        return Part(number, await self._repeat(send), _size(body))

    async def list_parts(self, key: str, upload_id: str) -> list[Part]:
        parts: list[Part] = []
        marker: str | None = None
        while True:
            page = await self._s3.call(
                lambda s3, marker=marker: s3._list_parts(  # type: ignore[misc]
                    self._s3.bucket, self._prefix + key, upload_id, part_number_marker=marker
                ),
                key=key,
            )
            parts += [Part(part.part_number, part.etag, part.size or 0) for part in page.parts]
            if not page.is_truncated or not page.parts:
                return parts
            marker = page.next_part_number_marker or str(page.parts[-1].part_number)

    async def complete_upload(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        def complete(s3: Minio) -> str | None:
            listed = [MinioPart(part.number, part.etag) for part in parts]
            return s3._complete_multipart_upload(self._s3.bucket, self._prefix + key, upload_id, listed).etag

        async def complete_once() -> str:
            etag = await self._s3.call(complete, key=key, patient=True)
            if not etag:  # S3 may find an error after it has sent "200 OK"
                raise StoreUnavailable(f"the object store did not complete the upload of {key!r}")
            return etag

        try:
            return await self._repeat(complete_once)
        except UploadMissing as missing:
            # An earlier call was carried out and its answer lost, unless the object says otherwise.
            with contextlib.suppress(ObjectMissing):
                found = await self.stat(key)
                if found.bytes == sum(part.bytes for part in parts) and found.etag.endswith(f"-{len(parts)}"):
                    return found.etag
            raise missing

    async def abort_upload(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(UploadMissing, ObjectMissing):
            await self._s3.call(
                lambda s3: s3._abort_multipart_upload(self._s3.bucket, self._prefix + key, upload_id), key=key
            )

    async def list_uploads(self, prefix: str) -> AsyncIterator[UploadInfo]:
        marker: dict[str, str] = {}
        while True:
            query = {"uploads": "", "prefix": self._prefix + prefix, "max-uploads": str(PAGE), **marker}
            page = await self._s3.call(
                lambda s3, query=query: ListMultipartUploadsResult(  # type: ignore[misc]
                    s3._execute("GET", self._s3.bucket, query_params=query)
                )
            )
            for upload in page.uploads:
                assert upload.upload_id is not None
                assert upload.initiated_time is not None
                key = upload.object_name.removeprefix(self._prefix)
                yield UploadInfo(key, upload.upload_id, upload.initiated_time)
            if not page.is_truncated or not page.uploads:
                return
            last = page.uploads[-1]
            marker = {"key-marker": last.object_name, "upload-id-marker": last.upload_id or ""}

    async def compose(
        self,
        key: str,
        sources: Sequence[str],
        *,
        content_type: str = OCTETS,
        on_upload_created: UploadHook | None = None,
    ) -> ObjectStat:
        stats = [await self.stat(source) for source in sources]
        plan = plan_parts([stat.bytes for stat in stats])
        if not plan:
            await self.put(key, b"", content_type=content_type)
            return await self.stat(key)
        upload_id = await self.create_upload(key, content_type=content_type)
        at_once = asyncio.Semaphore(COPIES_AT_ONCE)

        async def make(number: int, pieces: Sequence[Piece]) -> Part:
            async with at_once:
                piece = pieces[0]
                if len(pieces) == 1 and piece.copyable:
                    return await self._copy_part(
                        key, upload_id, number, sources[piece.source], stats[piece.source].etag, piece
                    )
                body = [
                    chunk
                    for piece in pieces
                    async for chunk in self.read(
                        sources[piece.source], etag=stats[piece.source].etag, start=piece.start, end=piece.end
                    )
                ]
                return await self.put_part(key, upload_id, number, body)

        try:
            if on_upload_created:
                await on_upload_created(upload_id)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(make(n, pieces)) for n, pieces in enumerate(plan, start=1)]
            await self.complete_upload(key, upload_id, [task.result() for task in tasks])
        except BaseException as error:
            await asyncio.shield(self.abort_upload(key, upload_id))
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        return await self.stat(key)

    async def _copy_part(
        self, key: str, upload_id: str, number: int, source: str, etag: str, piece: Piece
    ) -> Part:
        headers: dict[str, str | list[str] | tuple[str]] = {
            "x-amz-copy-source": quote(f"/{self._s3.bucket}/{self._prefix}{source}"),
            "x-amz-copy-source-if-match": f'"{etag}"',
        }
        if not piece.whole:
            headers["x-amz-copy-source-range"] = f"bytes={piece.start}-{piece.end - 1}"

        async def copy() -> str:
            etag, _ = await self._s3.call(
                lambda s3: s3._upload_part_copy(
                    self._s3.bucket, self._prefix + key, upload_id, number, headers
                ),
                key=source,
                patient=True,
            )
            return etag

        return Part(number, await self._repeat(copy), piece.end - piece.start)

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.close()
        self._s3.close()
        self._hashers.shutdown(wait=False, cancel_futures=True)

    # --- bytes

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                # The callers bound how many transfers run; a wait for a connection would count as silence.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_SECONDS, sock_read=self._idle_seconds
                ),
                headers={"Accept-Encoding": "identity"},  # offsets and lengths are those of the stored bytes
                auto_decompress=False,
                read_bufsize=READ_BUFFER_BYTES,
            )
        return self._http

    def _sign(
        self, method: str, key: str, query: dict[str, str] | None = None, expiry: timedelta | None = None
    ) -> yarl.URL:
        if expiry is None:
            return self._s3.presign(method, self._prefix + key, query=query)
        return self._s3.presign(method, self._prefix + key, query=query, expiry=expiry)

    async def _send(self, key: str, query: dict[str, str], body: Body, content_type: str) -> str:
        loop = asyncio.get_running_loop()
        digest = loop.run_in_executor(self._hashers, _md5, body)
        headers = {"Content-Length": str(_size(body)), "Content-Type": content_type}
        try:
            async with asyncio.timeout(self._idle_seconds) as silence:

                async def slices() -> AsyncIterator[Buffer]:
                    for piece in _pieces(body):
                        view = memoryview(piece)
                        for at in range(0, len(view), SEND_SLICE_BYTES):
                            silence.reschedule(loop.time() + self._idle_seconds)
                            yield view[at : at + SEND_SLICE_BYTES]
                    silence.reschedule(loop.time() + self._idle_seconds)

                async with self._session().put(
                    self._sign("PUT", key, query), data=slices(), headers=headers
                ) as response:
                    await self._check(response, key)
                    etag = _etag(response)
                    if _is_md5(etag, response) and etag != await digest:
                        raise IntegrityMismatch(
                            f"the object store holds other bytes of {key!r} than were sent ({etag})"
                        )
                    return etag
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broke_off(key, error) from error
        finally:
            digest.cancel()

    async def _check(self, response: aiohttp.ClientResponse, key: str) -> None:
        if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            return
        text = (await response.content.read(64 * 1024)).decode("utf-8", "replace")
        try:
            answer = {item.tag.rpartition("}")[2]: item.text or "" for item in ElementTree.fromstring(text)}  # noqa: S314
        except ElementTree.ParseError:
            answer = {"Message": text[:200]}
        raise self._s3.refusal(response.status, answer.get("Code", ""), answer.get("Message", ""), key)

    def _broke_off(self, key: str, error: Exception) -> StoreUnavailable:
        what = str(error) or type(error).__name__
        return StoreUnavailable(f"the object store at {self._s3.endpoint} broke off at {key!r}: {what}")

    async def _repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an idempotent attempt while it may succeed, for as long as one silence may last."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._idle_seconds
        pause_seconds = 0.1
        while True:
            try:
                return await attempt()
            except Retryable:
                if loop.time() + pause_seconds >= deadline:
                    raise
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311
            pause_seconds = min(2 * pause_seconds, 2.0)


def _pieces(body: Body) -> Sequence[Buffer]:
    return [body] if isinstance(body, bytes | bytearray | memoryview) else body


def _size(body: Body) -> int:
    return sum(len(piece) for piece in _pieces(body))


def _md5(body: Body) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for piece in _pieces(body):
        digest.update(piece)
    return digest.hexdigest()


def _etag(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("ETag", "").removeprefix("W/").strip('"')


def _is_md5(etag: str, response: aiohttp.ClientResponse) -> bool:
    encrypted = response.headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    customer_key = "x-amz-server-side-encryption-customer-algorithm" in response.headers
    return len(etag) == 32 and "-" not in etag and not encrypted and not customer_key
