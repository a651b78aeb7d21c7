"""What the object store does when the server dies, freezes, garbles or loses an answer."""

import asyncio
import hashlib
import os
import re
from collections.abc import AsyncIterator, Iterator
from itertools import count

import pytest

from shared.adapters.objects import S3ObjectStore
from shared.config import Settings
from shared.domain.errors import IntegrityMismatch, StoreUnavailable
from shared.ports.objects import MIB
from sluice.stack.home import Home
from sluice.stack.seaweedfs import SeaweedFS
from tests.faults.tap import ConnectionCut, Tap

PREFIXES = count()
DATA = os.urandom(32 * MIB)


@pytest.fixture(scope="module")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    home = Home(tmp_path_factory.mktemp("weed"), default_ports=False)
    home.folder("logs")
    weed = SeaweedFS(home)
    weed.prepare()
    weed.start()
    weed.wait_ready()
    yield weed
    weed.kill()


@pytest.fixture
async def tap(weed: SeaweedFS) -> AsyncIterator[Tap]:
    async with Tap(int(weed.address.rpartition(":")[2])) as tap:
        yield tap


@pytest.fixture(params=["md5"])
async def store(weed: SeaweedFS, tap: Tap, request: pytest.FixtureRequest) -> AsyncIterator[S3ObjectStore]:
    """A store behind the tap that gives up after one second of silence."""
    settings = settings_of(weed, tap).model_copy(update={"s3_checksum": request.param})
    store = S3ObjectStore(settings, idle_seconds=1.0)
    await store.ensure_bucket()
    tap.reset()
    yield store
    await store.aclose()


def settings_of(weed: SeaweedFS, tap: Tap) -> Settings:
    return Settings(
        postgres_dsn="unused",
        amqp_url="unused",
        s3_endpoint=f"http://{tap.address}",
        s3_access_key=weed.access_key,  # type: ignore[arg-type]
        s3_secret_key=weed.secret_key,  # type: ignore[arg-type]
        s3_prefix=f"{next(PREFIXES)}/",
    )


async def read_into(store: S3ObjectStore, got: bytearray, etag: str) -> None:
    """Read on from what is there."""
    async for chunk in store.read("key", etag=etag, start=len(got)):
        got += chunk


async def test_a_store_killed_in_the_middle_of_a_read_is_read_on_after_its_restart(
    weed: SeaweedFS, tap: Tap, store: S3ObjectStore
) -> None:
    etag = await store.put("key", DATA)
    tap.reset()

    async def kill_half_way(offset: int, chunk: bytes) -> bytes:
        if offset > len(DATA) // 2:
            await asyncio.to_thread(weed.kill)
            raise ConnectionCut
        return chunk

    tap.down = kill_half_way
    got = bytearray()
    with pytest.raises(StoreUnavailable):
        await read_into(store, got, etag)
    assert 0 < len(got) < len(DATA)
    tap.reset()
    await asyncio.to_thread(weed.restart)
    await read_into(store, got, etag)
    assert got == DATA


async def test_a_store_killed_in_the_middle_of_a_part_takes_it_after_its_restart(weed: SeaweedFS, tap: Tap) -> None:
    settings = settings_of(weed, tap)
    # A server that has just been started may be silent for a second.
    impatient, store = S3ObjectStore(settings, idle_seconds=1), S3ObjectStore(settings, idle_seconds=60)
    upload_id = await store.create_upload("key")
    first = await store.put_part("key", upload_id, 1, DATA)
    tap.reset()

    async def kill_half_way(offset: int, chunk: bytes) -> bytes:
        if offset > len(DATA) // 2:
            await asyncio.to_thread(weed.kill)
            raise ConnectionCut
        return chunk

    tap.up = kill_half_way
    with pytest.raises(StoreUnavailable):
        await impatient.put_part("key", upload_id, 2, DATA[::-1])
    tap.reset()
    await asyncio.to_thread(weed.restart)
    assert await store.list_parts("key", upload_id) == [first]
    second = await store.put_part("key", upload_id, 2, DATA[::-1])
    etag = await store.complete_upload("key", upload_id, [first, second])
    got = bytearray()
    await read_into(store, got, etag)
    await impatient.aclose()
    await store.aclose()
    assert got == DATA + DATA[::-1]


async def test_a_part_outlives_a_quick_restart_of_the_store(weed: SeaweedFS, tap: Tap) -> None:
    patient = S3ObjectStore(settings_of(weed, tap), idle_seconds=60)
    upload_id = await patient.create_upload("key")
    tap.reset()
    restarts = []

    def kill_and_restart() -> None:  # one thread: the relay gives up on the filter when the server is gone
        weed.kill()
        weed.restart()

    async def restart_half_way(offset: int, chunk: bytes) -> bytes:
        if offset > len(DATA) // 2 and not restarts:
            restarts.append(offset)
            await asyncio.to_thread(kill_and_restart)
            raise ConnectionCut
        return chunk

    tap.up = restart_half_way
    part = await patient.put_part("key", upload_id, 1, DATA)
    assert restarts
    await patient.complete_upload("key", upload_id, [part])
    assert (await patient.stat("key")).bytes == len(DATA)
    await patient.aclose()


async def test_a_frozen_store_is_noticed_in_every_call(weed: SeaweedFS, store: S3ObjectStore) -> None:
    etag = await store.put("key", DATA)
    upload_id = await store.create_upload("key")
    chunks = store.read("key", etag=etag)
    await anext(chunks)
    weed.pause()
    try:
        with pytest.raises(StoreUnavailable):
            async for _ in chunks:
                pass
        for call in (
            store.put_part("key", upload_id, 1, DATA),
            store.put("key", b"small"),
            store.stat("key"),
            store.probe(),
            store.create_upload("key"),
        ):
            with pytest.raises(StoreUnavailable):
                await call
    finally:
        weed.resume()
    await store.probe()


async def test_a_read_that_is_cut_short_is_never_taken_for_the_end(tap: Tap, store: S3ObjectStore) -> None:
    etag = await store.put("key", DATA)
    tap.reset()

    async def cut(offset: int, chunk: bytes) -> bytes:
        if offset > len(DATA) // 3:
            raise ConnectionCut
        return chunk

    tap.down = cut
    got = bytearray()
    with pytest.raises(StoreUnavailable):
        await read_into(store, got, etag)
    tap.reset()
    await read_into(store, got, etag)
    assert got == DATA


async def test_a_slow_transfer_is_not_a_silent_one(tap: Tap, weed: SeaweedFS) -> None:
    """More than 512 pauses of 5 ms each way are longer than the silence that is allowed."""
    store = S3ObjectStore(settings_of(weed, tap), idle_seconds=1.5)

    async def slowly(offset: int, chunk: bytes) -> bytes:
        await asyncio.sleep(0.005)
        return chunk

    tap.up = tap.down = slowly
    etag = await store.put("key", DATA)
    got = bytearray()
    await read_into(store, got, etag)
    assert got == DATA
    await store.aclose()


@pytest.mark.parametrize("store", ["md5", "crc32"], indirect=True)
async def test_a_byte_that_changes_on_the_way_is_noticed_and_sent_again(tap: Tap, store: S3ObjectStore) -> None:
    garbled = []

    async def garble_once(offset: int, chunk: bytes) -> bytes:
        if offset > MIB and not garbled:
            garbled.append(offset)
            return bytes([chunk[0] ^ 1]) + chunk[1:]
        return chunk

    tap.up = garble_once
    etag = await store.put("key", DATA)
    assert garbled
    got = bytearray()
    await read_into(store, got, etag)
    assert got == DATA


@pytest.mark.parametrize("store", ["md5", "crc32"], indirect=True)
async def test_bytes_that_change_every_time_are_an_error(tap: Tap, store: S3ObjectStore) -> None:
    async def garble(offset: int, chunk: bytes) -> bytes:
        return chunk[:-1] + bytes([chunk[-1] ^ 1]) if len(chunk) == 64 * 1024 else chunk

    upload_id = await store.create_upload("key")
    tap.up = garble
    with pytest.raises(IntegrityMismatch):
        await store.put_part("key", upload_id, 1, DATA[: 6 * MIB])


@pytest.mark.parametrize("store", ["crc32"], indirect=True)
async def test_a_store_that_does_not_look_at_checksums_is_checked_by_its_etag(tap: Tap, store: S3ObjectStore) -> None:
    async def say_nothing_of_it(offset: int, chunk: bytes) -> bytes:
        return re.sub(rb"(?i)x-amz-checksum-crc32", b"x-unrelated-answer-xx", chunk)

    tap.down = say_nothing_of_it
    etag = await store.put("key", DATA)
    assert etag == hashlib.md5(DATA, usedforsecurity=False).hexdigest()

    async def another_etag(offset: int, chunk: bytes) -> bytes:
        return (await say_nothing_of_it(offset, chunk)).replace(etag.encode(), etag[::-1].encode())

    tap.down = another_etag
    with pytest.raises(IntegrityMismatch):
        await store.put("key", DATA)


async def test_a_completion_whose_answer_is_lost_is_found_by_the_repeat(tap: Tap, store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    part = await store.put_part("key", upload_id, 1, DATA)
    tap.reset()
    lost = []

    async def lose_first_answer(offset: int, chunk: bytes) -> bytes:
        if not lost:
            lost.append(chunk)
            raise ConnectionCut
        return chunk

    tap.down = lose_first_answer
    etag = await store.complete_upload("key", upload_id, [part])
    assert lost[0].startswith(b"HTTP/1.1 200")
    got = bytearray()
    await read_into(store, got, etag)
    assert got == DATA


async def test_a_cancelled_call_is_over_when_it_returns(tap: Tap, store: S3ObjectStore) -> None:
    """The answer is held back until the call is cancelled: the upload must exist by then, not later."""
    asked, cancelled = asyncio.Event(), asyncio.Event()

    async def hold(offset: int, chunk: bytes) -> bytes:
        asked.set()
        await cancelled.wait()
        return chunk

    tap.down = hold
    call = asyncio.create_task(store.create_upload("key"))
    await asked.wait()
    call.cancel()
    cancelled.set()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert len([upload async for upload in store.list_uploads("")]) == 1
