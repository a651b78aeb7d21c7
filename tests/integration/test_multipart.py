"""Streams of unknown length become objects, and nothing is left of those that fail."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from shared.adapters.objects import S3ObjectStore
from shared.config import Settings
from shared.domain.errors import ObjectMissing, UploadMissing
from shared.multipart import MultipartWriter
from shared.ports.objects import MIB, MIN_PART_BYTES, Body, Part
from tests.faults.scene import settings_of

PART = MIN_PART_BYTES


class CountingStore(S3ObjectStore):
    """Counts the parts that are on their way, and can hold them there."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.on_their_way = self.most = 0
        self.held = asyncio.Event()
        self.release = asyncio.Event()
        self.release.set()

    async def put_part(self, key: str, upload_id: str, number: int, body: Body) -> Part:
        self.on_their_way += 1
        self.most = max(self.most, self.on_their_way)
        try:
            if not self.release.is_set():
                self.held.set()
                await self.release.wait()
            return await super().put_part(key, upload_id, number, body)
        finally:
            self.on_their_way -= 1


@pytest.fixture
def settings(store_environment: dict[str, str]) -> Settings:
    """No test here has a use for a database or a broker of its own."""
    return settings_of(store_environment)


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[CountingStore]:
    store = CountingStore(settings)
    await store.ensure_bucket()
    yield store
    await store.aclose()


async def nothing_is_left(store: CountingStore) -> bool:
    uploads = [upload async for upload in store.list_uploads("")]
    objects = [item async for item in store.list_objects("")]
    return not uploads and not objects and not store.on_their_way


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 3 * PART, 4 * PART + 7])
@pytest.mark.parametrize("chunk_bytes", [99_991, 64 * MIB])
async def test_a_stream_becomes_one_object(store: CountingStore, size: int, chunk_bytes: int) -> None:
    data = os.urandom(size)
    told: list[str] = []

    async def tell(upload_id: str) -> None:
        assert await store.list_parts("key", upload_id) == []
        assert store.on_their_way == 0
        told.append(upload_id)

    async with MultipartWriter(store, "key", part_bytes=PART, on_upload_created=tell) as writer:
        for at in range(0, size, chunk_bytes):
            await writer.write(data[at : at + chunk_bytes])
        etag = await writer.finish()
    assert writer.bytes == size
    assert b"".join([chunk async for chunk in store.read("key", etag=etag)]) == data
    assert len(told) == (1 if size > PART else 0)
    assert store.most <= 2
    assert [upload async for upload in store.list_uploads("")] == []


async def test_a_writer_holds_no_more_parts_than_it_may(store: CountingStore) -> None:
    store.release.clear()
    async with MultipartWriter(store, "key", part_bytes=PART, parallel=2) as writer:
        await writer.write(bytes(3 * PART))  # two on their way, one gathered
        waiting = asyncio.create_task(writer.write(bytes(PART)))
        await store.held.wait()
        assert (store.on_their_way, waiting.done()) == (2, False)
        store.release.set()
        await waiting
        await writer.finish()
    assert store.most == 2
    assert (await store.stat("key")).bytes == 4 * PART


async def test_an_error_in_the_stream_leaves_nothing(store: CountingStore) -> None:
    async def stream() -> None:
        async with MultipartWriter(store, "key", part_bytes=PART) as writer:
            await writer.write(bytes(2 * PART + 1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await stream()
    assert await nothing_is_left(store)


async def test_a_stream_that_is_not_finished_leaves_nothing(store: CountingStore) -> None:
    async with MultipartWriter(store, "key", part_bytes=PART) as writer:
        await writer.write(bytes(2 * PART + 1))
    assert await nothing_is_left(store)


async def test_a_cancel_leaves_nothing_on_its_way(store: CountingStore) -> None:
    store.release.clear()

    async def stream() -> None:
        async with MultipartWriter(store, "key", part_bytes=PART) as writer:
            await writer.write(bytes(9 * PART))

    task = asyncio.create_task(stream())
    await store.held.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await nothing_is_left(store)


async def test_a_cancel_while_the_upload_is_created_leaves_nothing(
    store: CountingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = store.create_upload
    created, go_on = asyncio.Event(), asyncio.Event()

    async def create_slowly(key: str, *, content_type: str) -> str:
        upload_id = await create(key, content_type=content_type)
        created.set()
        await go_on.wait()
        return upload_id

    monkeypatch.setattr(store, "create_upload", create_slowly)

    async def stream() -> None:
        async with MultipartWriter(store, "key", part_bytes=PART) as writer:
            await writer.write(bytes(2 * PART))

    task = asyncio.create_task(stream())
    await created.wait()
    task.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await nothing_is_left(store)


async def test_an_upload_that_cannot_be_written_down_is_dropped(store: CountingStore) -> None:
    async def fail(_: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with MultipartWriter(store, "key", part_bytes=PART, on_upload_created=fail) as writer:
            await writer.write(bytes(PART + 1))
    assert store.most == 0
    assert await nothing_is_left(store)


async def test_a_part_that_fails_fails_the_stream(store: CountingStore) -> None:
    async def sweep(upload_id: str) -> None:
        await store.abort_upload("key", upload_id)

    async def stream() -> None:
        async with MultipartWriter(store, "key", part_bytes=PART, on_upload_created=sweep) as writer:
            await writer.write(bytes(2 * PART + 1))
            await writer.finish()

    with pytest.raises(UploadMissing):
        await stream()
    assert await nothing_is_left(store)
    with pytest.raises(ObjectMissing):
        await store.stat("key")


def test_parts_that_s3_would_refuse_are_refused_here(settings: Settings) -> None:
    with pytest.raises(ValueError, match="5242880"):
        MultipartWriter(S3ObjectStore(settings), "key", part_bytes=MIB)
