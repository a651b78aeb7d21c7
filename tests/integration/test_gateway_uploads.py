"""PUT of files: every byte or nothing, and nothing is left of what did not arrive."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from urllib.parse import quote

import pytest

from shared.adapters.objects import S3ObjectStore
from shared.adapters.postgres import PgDatabase
from shared.config import MIB, Settings
from tests.gateway_process import Client, running_gateway, until

PART = 8 * MIB


async def leftovers(database: PgDatabase, objects: S3ObjectStore) -> tuple[int, int, int]:
    """Ledger rows, open multipart uploads, and objects without a file."""
    async with database.connection() as connection:
        ledger = await connection.fetchval("SELECT count(*) FROM sluice.object_ledger")
        known = {row["object_key"] for row in await connection.fetch("SELECT object_key FROM sluice.files")}
    uploads = [upload async for upload in objects.list_uploads("")]
    unknown = [found async for found in objects.list_objects("") if found.key not in known]
    return ledger, len(uploads), len(unknown)


async def nothing_left(database: PgDatabase, objects: S3ObjectStore) -> None:
    async def holds() -> bool:
        return await leftovers(database, objects) == (0, 0, 0)

    await until(holds)


async def being_received(database: PgDatabase, objects: S3ObjectStore) -> None:
    async def holds() -> bool:
        return (await leftovers(database, objects))[0] > 0

    await until(holds)


async def sent_in_parts(database: PgDatabase, objects: S3ObjectStore) -> None:
    async def holds() -> bool:
        return (await leftovers(database, objects))[1] > 0

    await until(holds)


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 30_000_000])
async def test_a_file_comes_back_as_it_was_sent(
    alice: Client, database: PgDatabase, object_store: S3ObjectStore, size: int
) -> None:
    data = os.urandom(min(size, MIB)) * (size // MIB + 1)
    data = data[:size]
    put = await alice.put("/v1/files/data.bin", data, headers={"Content-Type": "application/x-test"})
    assert put.status == 201, put.body
    assert put.json["bytes"] == size
    got = await alice.get(f"{put.headers['Location']}/content")
    assert hashlib.sha256(got.body).digest() == hashlib.sha256(data).digest()
    assert got.headers["Content-Type"] == "application/x-test"
    assert got.headers["ETag"] == put.headers["ETag"]
    assert await leftovers(database, object_store) == (0, 0, 0)


async def test_a_chunked_body_is_stored_whole(alice: Client) -> None:
    async def body() -> AsyncIterator[bytes]:
        for number in range(40):
            yield bytes([number]) * 300_000

    put = await alice.put("/v1/files/chunked", body())
    got = await alice.get(f"{put.headers['Location']}/content")
    assert got.body == b"".join(bytes([number]) * 300_000 for number in range(40))


async def test_a_gzip_file_stays_gzip(alice: Client) -> None:
    refused = await alice.put("/v1/files/a.gz", b"\x1f\x8b not really", headers={"Content-Encoding": "gzip"})
    assert (refused.status, refused.code) == (415, "unsupported-media-type")


@pytest.mark.parametrize("over", [0, 1, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
async def test_the_size_limit_is_exact(
    settings: Settings, database: PgDatabase, object_store: S3ObjectStore, *, over: int, chunked: bool
) -> None:
    limit = 9_000_000
    data = b"x" * (limit + over)

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 100_000):
            yield data[at : at + 100_000]

    async with running_gateway(settings, max_file_bytes=limit) as nobody:
        alice = await nobody.with_account("alice")
        answer = await alice.put("/v1/files/big", pieces() if chunked else data)
        if over:
            assert (answer.status, answer.code, answer.json["max_bytes"]) == (413, "too-large", limit)
        else:
            assert answer.status == 201
        assert len((await alice.get("/v1/files")).json["files"]) == (0 if over else 1)
        await nothing_left(database, object_store)


@pytest.mark.parametrize("sent", [0, 1000, 20 * MIB])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    alice: Client, database: PgDatabase, object_store: S3ObjectStore, *, sent: int, chunked: bool
) -> None:
    raw = await alice.connect()
    if chunked:
        await raw.send_head("PUT", "/v1/files/lost", Transfer_Encoding="chunked")
    else:
        await raw.send_head("PUT", "/v1/files/lost", Content_Length=str(100 * MIB))
    await being_received(database, object_store)
    for _ in range(sent // 1000):
        await (raw.send_chunk(b"x" * 1000) if chunked else raw.send(b"x" * 1000))
    if sent > PART:
        await sent_in_parts(database, object_store)
    await raw.close()
    await nothing_left(database, object_store)
    assert (await alice.get("/v1/files")).json["files"] == []


async def test_a_broken_chunk_is_refused_and_leaves_nothing(
    alice: Client, database: PgDatabase, object_store: S3ObjectStore
) -> None:
    raw = await alice.connect()
    await raw.send_head("PUT", "/v1/files/broken", Transfer_Encoding="chunked")
    await raw.send_chunk(b"x" * 1000)
    await raw.send(b"this is no chunk size\r\n")
    assert await raw.reader.read() is not None  # answered or cut, but not waited for
    await raw.close()
    await nothing_left(database, object_store)


async def test_a_body_that_falls_silent_is_cut(
    settings: Settings, database: PgDatabase, object_store: S3ObjectStore
) -> None:
    async with running_gateway(settings, body_idle_seconds=0.3) as nobody:
        alice = await nobody.with_account("alice")
        raw = await alice.connect()
        await raw.send_head("PUT", "/v1/files/slow", Content_Length="1000")
        await raw.send(b"x" * 10)
        status, head = await raw.read_head()
        assert status == 408
        assert "Connection: close" in head
        await raw.close()
        await nothing_left(database, object_store)


async def test_an_upload_that_the_shutdown_cancels_leaves_nothing(
    settings: Settings, database: PgDatabase, object_store: S3ObjectStore
) -> None:
    async with running_gateway(settings, drain_seconds=0.4) as nobody:
        alice = await nobody.with_account("alice")
        raw = await alice.connect()
        await raw.send_head("PUT", "/v1/files/cut", Content_Length=str(100 * MIB))
        await raw.send(b"x" * 20 * MIB)
        await sent_in_parts(database, object_store)
    assert await leftovers(database, object_store) == (0, 0, 0)
    await raw.close()


async def test_continue_is_said_only_when_the_body_is_wanted(settings: Settings) -> None:
    async with running_gateway(settings, max_file_bytes=1000) as nobody:
        alice = await nobody.with_account("alice")
        unknown = await nobody.connect()
        await unknown.send_head("PUT", "/v1/files/a", Content_Length="10", Expect="100-continue")
        status, head = await unknown.read_head()
        assert status == 401
        assert "Connection: close" in head
        large = await alice.connect()
        await large.send_head("PUT", "/v1/files/a", Content_Length="1001", Expect="100-continue")
        assert (await large.read_head())[0] == 413
        wanted = await alice.connect()
        await wanted.send_head("PUT", "/v1/files/a", Content_Length="10", Expect="100-continue")
        assert (await wanted.read_head())[0] == 100
        await wanted.send(b"0123456789")
        assert (await wanted.read_head())[0] == 201
        other = await alice.connect()
        await other.send_head("PUT", "/v1/files/a", Content_Length="10", Expect="the-unexpected")
        status, head = await other.read_head()
        assert status == 417
        assert "application/problem+json" in head
        for raw in (unknown, large, wanted, other):
            await raw.close()


async def test_a_file_of_the_same_name_replaces_the_old_one(alice: Client) -> None:
    first = await alice.put("/v1/files/a.csv", b"old")
    second = await alice.put("/v1/files/a.csv", b"new")
    assert (first.status, second.status) == (201, 200)
    assert (await alice.get(first.headers["Location"])).status == 404
    assert (await alice.get(f"{second.headers['Location']}/content")).body == b"new"
    assert [file["file_id"] for file in (await alice.get("/v1/files")).json["files"]] == [second.json["file_id"]]


async def test_a_part_of_a_file_is_not_put(alice: Client) -> None:
    await alice.put("/v1/files/a", b"0123456789")
    refused = await alice.put("/v1/files/a", b"6789", headers={"Content-Range": "bytes 6-9/10"})
    assert (refused.status, refused.code) == (400, "malformed")
    assert [file["bytes"] for file in (await alice.get("/v1/files")).json["files"]] == [10]


async def test_a_put_replaces_only_what_its_condition_names(
    alice: Client, database: PgDatabase, object_store: S3ObjectStore
) -> None:
    async def put(**headers: str) -> tuple[int, str | None]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await alice.put("/v1/files/a", b"x", headers=sent)
        return answer.status, answer.headers.get("ETag")

    assert (await put(If_Match="*"))[0] == 412
    status, first = await put(If_None_Match="*")
    assert (status, (await put(If_None_Match="*"))[0]) == (201, 412)
    assert first is not None
    assert (await put(If_None_Match=first))[0] == 412
    assert (await put(If_Match='"other"'))[0] == 412
    assert (await put(If_Match=f'"other", {first}'))[0] == 200
    assert (await put(If_None_Match='"other"'))[0] == 200
    answers = await asyncio.gather(
        *(alice.put("/v1/files/new", b"%d" % n, headers={"If-None-Match": "*"}) for n in range(6))
    )
    assert sorted(answer.status for answer in answers) == [201] + [412] * 5
    await nothing_left(database, object_store)


async def test_a_file_is_deleted_only_if_its_condition_names_it(alice: Client) -> None:
    put = await alice.put("/v1/files/a", b"x")
    file = put.headers["Location"]
    refused = await alice.delete(file, headers={"If-Match": '"other"'})
    assert (refused.status, refused.code) == (412, "precondition-failed")
    assert (await alice.get(file)).status == 200
    assert (await alice.delete(file, headers={"If-Match": put.headers["ETag"]})).status == 204


async def test_of_many_puts_of_one_name_at_once_one_file_remains(
    alice: Client, database: PgDatabase, object_store: S3ObjectStore
) -> None:
    answers = await asyncio.gather(*(alice.put("/v1/files/same", b"%d" % n) for n in range(12)))
    assert sorted(answer.status for answer in answers) == [200] * 11 + [201]
    files = (await alice.get("/v1/files")).json["files"]
    assert [file["file_id"] for file in files] == [max(answer.json["file_id"] for answer in answers)]
    assert await leftovers(database, object_store) == (0, 0, 0)


NAMES = [
    "1",
    "12345",
    "a b",
    "100%",
    "a/b/c.csv",
    "äöü.csv",
    "文件.csv",
    'quote".csv',
    "a?b#c",
    "plus+and&",
    "..a",
    "😀" * 250,
    "Screenshot at 1.00.00\u202fPM.png",
    "👩\u200d💻.csv",
]


async def test_a_name_is_kept_as_it_is(alice: Client) -> None:
    for name in NAMES:
        put = await alice.put(f"/v1/files/{quote(name)}", b"x")
        assert put.status == 201, put.body
        assert put.json["name"] == name
        got = await alice.get(f"{put.headers['Location']}/content")
        header = got.headers["Content-Disposition"]
        assert header.isascii()
        assert header.endswith(f"filename*=UTF-8''{quote(name.rpartition('/')[2], safe='')}")
        # An encoded slash is a slash.
        assert (await alice.put(f"/v1/files/{quote(name, safe='')}", b"y")).status == 200


BAD_NAMES = [
    ("a%00b", 422),
    ("a%0Ab", 422),
    ("a%7Fb", 422),
    ("%ff%fe", 400),
    ("%ED%A0%80", 400),
    ("a/../b", 422),
    ("%2E%2E/b", 422),
    ("./a", 422),
    ("a//b", 422),
    ("a/", 422),
    ("%E2%80%AEfdp.exe", 422),
    ("a%E2%80%A8b", 422),
    ("%E2%81%A6a", 422),
    ("x" * 1025, 422),
]


async def test_a_name_that_would_do_harm_is_refused(alice: Client) -> None:
    for path, status in BAD_NAMES:
        raw = await alice.connect()
        await raw.send_head("PUT", f"/v1/files/{path}", Content_Length="1")
        await raw.send(b"x")
        answered, _ = await raw.read_head()
        await raw.close()
        assert answered == status, path
        assert (await alice.get("/v1/files")).json["files"] == []


BAD_TYPES = ["text", "text/", "a/b/c", "text/csv\x7f", "x" * 300 + "/y"]


async def test_a_content_type_that_is_none_is_refused(alice: Client) -> None:
    for media_type in BAD_TYPES:
        raw = await alice.connect()
        await raw.send_head("PUT", "/v1/files/a", Content_Length="1", Content_Type=media_type)
        await raw.send(b"x")
        assert (await raw.read_head())[0] in (400, 415), media_type
        await raw.close()


async def test_a_connection_is_good_for_another_request_after_a_refused_body(alice: Client) -> None:
    raw = await alice.connect()
    await raw.send_head("PUT", "/v1/files/a%00", Content_Length="1000")
    await raw.send(b"x" * 1000)
    status, head = await raw.read_head()
    assert status == 422
    length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
    await raw.reader.readexactly(length)
    await raw.send_head("GET", "/v1/files")
    assert (await raw.read_head())[0] == 200
    await raw.close()
