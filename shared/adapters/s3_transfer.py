"""Bytes to and from the object store by aiohttp, on signed URLs, under limits of silence and checked."""

import asyncio
import base64
import hashlib
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import TypeVar
from xml.etree import ElementTree

import aiohttp
from isal import isal_zlib

from shared.adapters.s3_client import CONNECT_SECONDS, S3Client
from shared.domain.errors import IntegrityMismatch, Retryable, SourceChanged, StoreUnavailable
from shared.ports.objects import MIB, Body, Buffer

T = TypeVar("T")

READ_BUFFER_BYTES = 1 * MIB
CRC32 = "x-amz-checksum-crc32"
SEND_SLICE_BYTES = 256 * 1024


class Transfers:
    """GET and PUT of whole objects, ranges and parts; keys are taken as they are."""

    def __init__(self, s3: S3Client, *, idle_seconds: float, crc32: bool = False) -> None:
        self._s3 = s3
        self._idle_seconds = idle_seconds
        self._crc32 = crc32
        self._hashers = ThreadPoolExecutor(2, thread_name_prefix="s3-md5")
        self._http: aiohttp.ClientSession | None = None

    async def get(self, key: str, *, etag: str | None, start: int, end: int | None) -> AsyncGenerator[bytes, None]:
        """See `ObjectStore.read`."""
        if end is not None and end <= start:
            return
        headers = {"If-Match": f'"{etag}"'} if etag else {}
        if start or end is not None:  # an empty object has no range that could be asked for
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            async with self._session().get(self._s3.presign("GET", key), headers=headers) as response:
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
                    raise StoreUnavailable(f"the object store broke off {missing} bytes before the end of {key!r}")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broke_off(key, error) from error

    async def put(self, key: str, query: dict[str, str], body: Body, content_type: str) -> str:
        """Send a body, again if need be, and return its ETag."""
        return await self.repeat(lambda: self._put(key, query, body, content_type))

    async def repeat(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat an idempotent attempt while it may succeed, for as long as one silence may last."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        deadline: float | None = None
        pause_seconds = 0.1
        while True:
            try:
                return await attempt()
            except Retryable as error:
                if deadline is None:
                    # A slow attempt that was answered may be repeated like a quick one; silence has had its time.
                    was_silent = isinstance(error.__cause__, TimeoutError)
                    deadline = (begun if was_silent else loop.time()) + self._idle_seconds
                if loop.time() + pause_seconds >= deadline:
                    raise
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311
            pause_seconds = min(2 * pause_seconds, 2.0)

    async def aclose(self) -> None:
        if self._http is not None:
            await self._http.close()
        self._hashers.shutdown(wait=False, cancel_futures=True)

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                # The callers bound how many transfers run; a wait for a connection would count as silence.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=self._idle_seconds),
                headers={"Accept-Encoding": "identity"},  # offsets and lengths are those of the stored bytes
                auto_decompress=False,
                read_bufsize=READ_BUFFER_BYTES,
            )
        return self._http

    async def _put(self, key: str, query: dict[str, str], body: Body, content_type: str) -> str:
        loop = asyncio.get_running_loop()
        digest: asyncio.Future[str] | None = None
        if self._crc32:
            # In the address, as SDKs sign it: a header of this name would have to be signed as well.
            query = {**query, CRC32: _crc32(body)}
        else:
            digest = loop.run_in_executor(self._hashers, _md5, body)
        headers = {"Content-Length": str(size_of(body)), "Content-Type": content_type}
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
                    self._s3.presign("PUT", key, query=query), data=slices(), headers=headers
                ) as response:
                    await self._check(response, key)
                    etag = _etag(response)
                    if self._crc32 and response.headers.get(CRC32) == query[CRC32]:
                        return etag
                    digest = digest or loop.run_in_executor(self._hashers, _md5, body)
                    if _is_md5(etag, response) and etag != await digest:
                        raise IntegrityMismatch(
                            f"the object store holds other bytes of {key!r} than were sent ({etag})"
                        )
                    return etag
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broke_off(key, error) from error
        finally:
            if digest is not None:
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


def _pieces(body: Body) -> Sequence[Buffer]:
    return [body] if isinstance(body, bytes | bytearray | memoryview) else body


def size_of(body: Body) -> int:
    """Its bytes, whole or in pieces."""
    return sum(len(piece) for piece in _pieces(body))


def _md5(body: Body) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    for piece in _pieces(body):
        digest.update(piece)
    return digest.hexdigest()


def _crc32(body: Body) -> str:
    """As S3 writes it: base64 of four bytes, the highest first. No work for a thread: 40 GB/s."""
    value = 0
    for piece in _pieces(body):
        value = isal_zlib.crc32(piece, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def _etag(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("ETag", "").removeprefix("W/").strip('"')


def _is_md5(etag: str, response: aiohttp.ClientResponse) -> bool:
    encrypted = response.headers.get("x-amz-server-side-encryption", "AES256") != "AES256"
    customer_key = "x-amz-server-side-encryption-customer-algorithm" in response.headers
    return len(etag) == 32 and "-" not in etag and not encrypted and not customer_key
