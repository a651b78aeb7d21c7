"""The object store against a real one: objects, ranges, uploads, joins."""

import os
from collections.abc import AsyncIterator
from contextlib import aclosing

import aiohttp
import pytest
from pydantic import SecretStr

from shared.adapters.objects import S3ObjectStore
from shared.config import Settings
from shared.domain.errors import (
    ObjectMissing,
    SourceChanged,
    StoreMisconfigured,
    StoreRefused,
    StoreUnavailable,
    UploadMissing,
)
from shared.ports.objects import MIB, MIN_PART_BYTES, Body, ObjectStat, Part
from tests.faults.scene import settings_of

AWKWARD_KEYS = [
    "a b",
    "ü/é/日本",
    "100%",
    "50%41",
    "a+b",
    "a?x=1&y",
    "a#b",
    "a;b:c@d=e,f",
    "quote'\"s",
    "a~b*(c)",
]


@pytest.fixture
def settings(store_environment: dict[str, str]) -> Settings:
    """No test here has a use for a database or a broker of its own."""
    return settings_of(store_environment)


@pytest.fixture
async def store(settings: Settings) -> AsyncIterator[S3ObjectStore]:
    store = S3ObjectStore(settings)
    await store.ensure_bucket()
    yield store
    await store.aclose()


async def fetch(
    store: S3ObjectStore, key: str, *, etag: str | None = None, start: int = 0, end: int | None = None
) -> bytes:
    return b"".join([chunk async for chunk in store.read(key, etag=etag, start=start, end=end)])


async def joined(store: S3ObjectStore, key: str, sources: list[str]) -> ObjectStat:
    join = await store.plan_join(sources)
    upload_id = await store.create_upload(key)
    # In any order.
    parts = [await join.make(key, upload_id, number) for number in range(join.parts, 0, -1)]
    await store.complete_upload(key, upload_id, parts[::-1])
    return await store.stat(key)


async def open_uploads(store: S3ObjectStore) -> list[tuple[str, str]]:
    return [(upload.key, upload.upload_id) async for upload in store.list_uploads("")]


# --- objects


@pytest.mark.parametrize("key", AWKWARD_KEYS)
async def test_any_key_names_one_object_in_every_call(store: S3ObjectStore, key: str) -> None:
    etag = await store.put(key, key.encode())
    assert await fetch(store, key, etag=etag) == key.encode()
    assert (await store.stat(key)).etag == etag
    assert [item.key async for item in store.list_objects("")] == [key]
    await joined(store, "copy", [key])
    assert await fetch(store, "copy") == key.encode()
    upload_id = await store.create_upload(key)
    part = await store.put_part(key, upload_id, 1, b"part")
    assert await open_uploads(store) == [(key, upload_id)]
    assert await store.list_parts(key, upload_id) == [part]
    await store.abort_upload(key, upload_id)
    await store.delete(key)
    with pytest.raises(ObjectMissing):
        await store.stat(key)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"x",
        bytearray(b"abc"),
        memoryview(b"abc"),
        [b"a", bytearray(b"b"), memoryview(b"c")],
        [],
        [b"", b"a"],
    ],
    ids=["empty", "bytes", "bytearray", "view", "pieces", "no-pieces", "empty-piece"],
)
async def test_a_body_arrives_whole_whatever_holds_it(store: S3ObjectStore, body: Body) -> None:
    expected = b"".join(body) if isinstance(body, list) else bytes(body)  # type: ignore[arg-type]
    etag = await store.put("key", body)
    assert await fetch(store, "key", etag=etag) == expected
    assert (await store.stat("key")).bytes == len(expected)


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, None, b"0123456789"),
        (0, 0, b""),
        (3, 3, b""),
        (0, 1, b"0"),
        (3, 7, b"3456"),
        (9, None, b"9"),
        (5, 1000, b"56789"),
        (10, None, b""),
        (11, 12, b""),
    ],
)
async def test_a_range_is_read_as_python_slices(
    store: S3ObjectStore, start: int, end: int | None, expected: bytes
) -> None:
    etag = await store.put("digits", b"0123456789")
    assert await fetch(store, "digits", etag=etag, start=start, end=end) == expected


async def test_a_large_object_comes_back_byte_for_byte(store: S3ObjectStore) -> None:
    data = os.urandom(20 * MIB + 1)
    etag = await store.put("large", data)
    assert await fetch(store, "large", etag=etag) == data
    assert await fetch(store, "large", etag=etag, start=9 * MIB - 1, end=17 * MIB) == data[9 * MIB - 1 : 17 * MIB]


@pytest.mark.parametrize(("start", "end"), [(0, None), (2, None), (2, 4), (1000, None)])
async def test_reading_on_after_a_replacement_is_noticed(store: S3ObjectStore, start: int, end: int | None) -> None:
    etag = await store.put("key", b"the first bytes")
    await store.put("key", b"the other bytes")
    with pytest.raises(SourceChanged):
        await fetch(store, "key", etag=etag, start=start, end=end)


async def test_a_deleted_object_is_missing(store: S3ObjectStore) -> None:
    etag = await store.put("key", b"bytes")
    await store.delete("key", "never-there")
    await store.delete("key")
    with pytest.raises(ObjectMissing):
        await fetch(store, "key", etag=etag)
    with pytest.raises(ObjectMissing):
        await store.stat("key")


async def test_a_read_that_is_left_early_gives_its_connection_back(store: S3ObjectStore) -> None:
    data = os.urandom(20 * MIB)
    await store.put("key", data)
    async with aclosing(store.read("key")) as chunks:
        first = await anext(chunks)
    assert data.startswith(first)
    assert await fetch(store, "key") == data


async def test_listings_stay_below_their_prefix_and_span_pages(store: S3ObjectStore) -> None:
    keys = [f"many/{number:04}/x" for number in range(1005)]
    for at in range(0, len(keys), 50):
        for key in keys[at : at + 50]:
            await store.put(key, b"1")
    await store.put("other/1", b"22")
    assert [item.key async for item in store.list_objects("many/")] == keys
    assert [(item.key, item.bytes) async for item in store.list_objects("other/")] == [("other/1", 2)]
    await store.delete(*keys)
    assert [item.key async for item in store.list_objects("")] == ["other/1"]


async def test_two_prefixes_are_two_worlds(store: S3ObjectStore, settings: Settings) -> None:
    elsewhere = S3ObjectStore(settings.model_copy(update={"s3_prefix": settings.s3_prefix + "elsewhere/"}))
    await elsewhere.put("key", b"theirs")
    with pytest.raises(ObjectMissing):
        await store.stat("key")
    assert await fetch(elsewhere, "key") == b"theirs"
    assert [item.key async for item in elsewhere.list_objects("")] == ["key"]
    await elsewhere.delete("key")
    await elsewhere.aclose()


async def test_a_signed_link_downloads_under_the_name_given(store: S3ObjectStore) -> None:
    await store.put("key", b"for anyone")
    link = store.presign_get("key", 60, filename='año "2026".csv')
    async with aiohttp.ClientSession() as anyone, anyone.get(link) as response:
        assert response.status == 200
        assert await response.read() == b"for anyone"
        disposition = response.headers["Content-Disposition"]
    assert disposition == "attachment; filename*=UTF-8''a%C3%B1o%20%222026%22.csv"


# --- multipart uploads


async def test_parts_of_a_crashed_upload_are_listed_and_completed_by_another(
    store: S3ObjectStore, settings: Settings
) -> None:
    first, last = os.urandom(MIN_PART_BYTES), os.urandom(100)
    upload_id = await store.create_upload("key", content_type="text/csv")
    sent = [await store.put_part("key", upload_id, 2, last), await store.put_part("key", upload_id, 1, first)]
    another = S3ObjectStore(settings)
    parts = await another.list_parts("key", upload_id)
    assert parts == sorted(sent, key=lambda part: part.number)
    etag = await another.complete_upload("key", upload_id, parts)
    await another.aclose()
    assert await fetch(store, "key", etag=etag) == first + last


async def test_a_repeated_part_replaces_the_earlier_one(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    await store.put_part("key", upload_id, 1, b"earlier")
    part = await store.put_part("key", upload_id, 1, b"later")
    assert await store.list_parts("key", upload_id) in ([part], [])  # never the earlier one
    await store.complete_upload("key", upload_id, [part])
    assert await fetch(store, "key") == b"later"


async def test_a_part_that_was_sent_twice_is_listed_once(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    sent = [await store.put_part("key", upload_id, 1, b"the same") for _ in range(3)]
    assert await store.list_parts("key", upload_id) == sent[:1] == sent[2:]
    await store.abort_upload("key", upload_id)


async def test_an_object_is_not_there_before_its_upload_is_completed(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    part = await store.put_part("key", upload_id, 1, b"bytes")
    with pytest.raises(ObjectMissing):
        await store.stat("key")
    assert [item.key async for item in store.list_objects("")] == []
    await store.complete_upload("key", upload_id, [part])
    assert [item.key async for item in store.list_objects("")] == ["key"]
    assert await open_uploads(store) == []


async def test_completing_twice_answers_alike(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    part = await store.put_part("key", upload_id, 1, b"bytes")
    etag = await store.complete_upload("key", upload_id, [part])
    assert await store.complete_upload("key", upload_id, [part]) == etag


async def test_completing_with_a_part_that_the_store_does_not_have_is_refused(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    await store.put_part("key", upload_id, 1, b"bytes")
    with pytest.raises(StoreRefused):
        await store.complete_upload("key", upload_id, [Part(1, "0" * 32, 5)])
    await store.abort_upload("key", upload_id)


async def test_an_aborted_upload_leaves_nothing(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    part = await store.put_part("key", upload_id, 1, b"bytes")
    await store.abort_upload("key", upload_id)
    await store.abort_upload("key", upload_id)
    assert await open_uploads(store) == []
    assert [item.key async for item in store.list_objects("")] == []
    for call in (
        store.put_part("key", upload_id, 2, b"more"),
        store.list_parts("key", upload_id),
        store.complete_upload("key", upload_id, [part]),
    ):
        with pytest.raises(UploadMissing):
            await call


async def test_aborting_a_completed_upload_keeps_the_object(store: S3ObjectStore) -> None:
    upload_id = await store.create_upload("key")
    part = await store.put_part("key", upload_id, 1, b"bytes")
    await store.complete_upload("key", upload_id, [part])
    await store.abort_upload("key", upload_id)
    assert await fetch(store, "key") == b"bytes"


async def test_uploads_of_one_key_are_told_apart(store: S3ObjectStore) -> None:
    ids = {await store.create_upload("key") for _ in range(3)}
    assert {upload_id for _, upload_id in await open_uploads(store)} == ids
    for upload_id in ids:
        await store.abort_upload("key", upload_id)


async def test_lists_of_uploads_and_parts_span_pages(store: S3ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.adapters.objects.PAGE", 2)
    opened = {(key, await store.create_upload(key)) for key in ["b", "a", "d/1", "d/2", "c", "a", "a"]}
    assert sorted(await open_uploads(store)) == sorted(opened)
    below = [upload.key async for upload in store.list_uploads("d/")]
    assert sorted(below) == ["d/1", "d/2"]
    key, upload_id = min(opened)
    sent = [await store.put_part(key, upload_id, number, bytes([number])) for number in (3, 1, 5, 4, 2, 1)]
    assert await store.list_parts(key, upload_id) == sorted(sent[:5], key=lambda part: part.number)
    for key, upload_id in opened:
        await store.abort_upload(key, upload_id)
    assert await open_uploads(store) == []


# --- joins


@pytest.mark.parametrize(
    "sizes",
    [
        [3],
        [0, 3],
        [6 * MIB],
        [6 * MIB, 7 * MIB, 3],
        [3, 6 * MIB],
        [7 * MIB, 3, 0, 1 * MIB, 20 * MIB, 1, 1 * MIB, 4],
        [MIN_PART_BYTES, MIN_PART_BYTES - 1, MIN_PART_BYTES + 1],
    ],
    ids=str,
)
async def test_joined_segments_are_byte_equal(store: S3ObjectStore, sizes: list[int]) -> None:
    segments = [os.urandom(size) for size in sizes]
    keys = [f"segment/{number}" for number in range(len(sizes))]
    for key, segment in zip(keys, segments, strict=True):
        await store.put(key, segment)
    for _ in range(2):  # a repeat overwrites
        stat = await joined(store, "joined", keys)
    assert stat.bytes == sum(sizes)
    assert await fetch(store, "joined", etag=stat.etag) == b"".join(segments)


async def test_a_segment_made_of_parts_is_joined_too(store: S3ObjectStore) -> None:
    halves = [os.urandom(9 * MIB), os.urandom(MIB)]
    upload_id = await store.create_upload("segment/0")
    parts = [await store.put_part("segment/0", upload_id, n, half) for n, half in enumerate(halves, start=1)]
    await store.complete_upload("segment/0", upload_id, parts)
    await joined(store, "joined", ["segment/0", "segment/0"])
    assert await fetch(store, "joined") == b"".join(halves) * 2


async def test_a_join_notices_that_a_source_is_gone_or_another(store: S3ObjectStore) -> None:
    for number in range(2):
        await store.put(f"segment/{number}", os.urandom(6 * MIB))
    join = await store.plan_join(["segment/0", "segment/1"])
    upload_id = await store.create_upload("joined")
    await store.put("segment/0", os.urandom(6 * MIB))
    with pytest.raises(SourceChanged):
        await join.make("joined", upload_id, 1)
    await store.delete("segment/1")
    with pytest.raises(ObjectMissing):
        await join.make("joined", upload_id, 2)
    await store.abort_upload("joined", upload_id)
    with pytest.raises(ObjectMissing):
        await store.plan_join(["segment/0", "segment/1"])


# --- what an operator must act on


@pytest.mark.parametrize(
    "wrong",
    [{"s3_secret_key": SecretStr("wrong")}, {"s3_access_key": SecretStr("nobody")}],
    ids=lambda wrong: next(iter(wrong)),
)
async def test_a_store_that_refuses_us_is_not_worth_a_retry(settings: Settings, wrong: dict[str, object]) -> None:
    store = S3ObjectStore(settings.model_copy(update=wrong))
    for call in (store.probe(), store.put("key", b""), store.create_upload("key")):
        with pytest.raises(StoreMisconfigured, match="check SLUICE_S3_ACCESS_KEY"):
            await call
    await store.aclose()


async def test_a_missing_bucket_is_told_by_the_probe(settings: Settings) -> None:
    store = S3ObjectStore(settings.model_copy(update={"s3_bucket": "no-such-bucket"}))
    with pytest.raises(StoreMisconfigured, match="no bucket 'no-such-bucket'"):
        await store.probe()
    await store.aclose()


async def test_a_store_that_is_not_there_is_unavailable(settings: Settings, unused_tcp_port: int) -> None:
    nowhere = {"s3_endpoint": f"http://127.0.0.1:{unused_tcp_port}"}
    store = S3ObjectStore(settings.model_copy(update=nowhere), idle_seconds=0.5)
    for call in (store.probe(), store.stat("key"), store.put("key", b"x"), fetch(store, "key")):
        with pytest.raises(StoreUnavailable):
            await call
    await store.aclose()


def test_an_endpoint_that_is_no_url_is_told_at_the_start(settings: Settings) -> None:
    with pytest.raises(StoreMisconfigured, match="SLUICE_S3_ENDPOINT"):
        S3ObjectStore(settings.model_copy(update={"s3_endpoint": "localhost:8333"}))
