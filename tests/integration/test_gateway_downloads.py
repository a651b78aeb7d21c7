"""Downloads: ranges and conditions against a byte-exact model, and never a part that looks like the whole."""

import asyncio
import random
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import aiohttp
import pytest
import yarl
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from gateway.ranges import Part, Representation, is_unmodified, wanted_part
from shared.adapters.objects import S3ObjectStore
from shared.adapters.postgres import PgDatabase
from shared.config import MIB, Settings
from shared.domain.errors import PreconditionFailed, RangeNotSatisfiable
from tests.faults.tap import Tap
from tests.gateway_process import Client, running_gateway, until

SIZE = 1000
DATA = random.Random(1).randbytes(SIZE)
POSITIONS = st.one_of(st.integers(0, SIZE + 10), st.sampled_from([0, 1, SIZE - 1, SIZE, SIZE + 1, 10**30]))


def model(first: int | None, last: int | None) -> tuple[int, bytes]:
    """What RFC 9110 says of `bytes=first-last` on DATA."""
    if first is None:
        assert last is not None
        return (206, DATA[-last:]) if last else (416, b"")
    if last is not None and last < first:
        return 200, DATA  # malformed, and so ignored
    if first >= SIZE:
        return 416, b""
    return 206, DATA[first : None if last is None else last + 1]


@given(
    ranges=st.one_of(st.tuples(POSITIONS, st.none()), st.tuples(st.none(), POSITIONS), st.tuples(POSITIONS, POSITIONS))
)
@trials(max_examples=150, deadline=None)
def test_a_range_is_the_one_of_the_model(ranges: tuple[int | None, int | None]) -> None:
    first, last = ranges
    there = Representation(SIZE, "tag", datetime.now(UTC))
    text = f"bytes={'' if first is None else first}-{'' if last is None else last}"
    status, expected = model(first, last)
    if status == 416:
        with pytest.raises(RangeNotSatisfiable):
            wanted_part({"Range": text}, there)
        return
    part = wanted_part({"Range": text}, there)
    assert (part is None) == (status == 200)
    part = part or Part(0, SIZE)
    assert DATA[part.start : part.end] == expected


async def test_ranges_over_http_are_those_of_the_model(alice: Client) -> None:
    put = await alice.put("/v1/files/data", DATA)
    content = f"{put.headers['Location']}/content"
    cases: list[tuple[int | None, int | None]] = [
        (0, 0), (0, None), (1, 5), (999, 999), (999, 5000), (1000, None), (5, 4), (None, 1), (None, 0), (None, 5000)
    ]  # fmt: skip
    for first, last in cases:
        text = f"bytes={'' if first is None else first}-{'' if last is None else last}"
        status, expected = model(first, last)
        got = await alice.get(content, headers={"Range": text})
        assert got.status == status, text
        if status == 416:
            assert got.code == "range-not-satisfiable"
            assert got.headers["Content-Range"] == f"bytes */{SIZE}"
            continue
        assert got.body == expected
        assert got.headers["Content-Length"] == str(len(expected))
        if status == 206:
            start = SIZE - len(expected) if first is None else first
            assert got.headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{SIZE}"


@pytest.mark.parametrize(
    "text", ["bytes=0-1,5-6", "bytes=-", "bytes=a-b", "lines=0-5", "bytes", "bytes=1-2-3", "bytes=٣-٤"]
)
def test_ranges_that_are_not_understood_are_ignored(text: str) -> None:
    assert wanted_part({"Range": text}, Representation(SIZE, "tag", datetime.now(UTC))) is None


async def test_an_empty_file_has_no_ranges(alice: Client) -> None:
    put = await alice.put("/v1/files/empty", b"")
    content = f"{put.headers['Location']}/content"
    assert (await alice.get(content)).status == 200
    assert (await alice.get(content, headers={"Range": "bytes=0-"})).status == 416
    assert (await alice.get(content, headers={"Range": "bytes=-5"})).status == 200


async def test_a_head_tells_what_a_get_would(alice: Client) -> None:
    put = await alice.put("/v1/files/data", DATA)
    content = f"{put.headers['Location']}/content"
    for headers in ({}, {"If-None-Match": put.headers["ETag"]}, {"If-Match": '"other"'}):
        head, got = await alice.ask("HEAD", content, headers=headers), await alice.get(content, headers=headers)
        assert head.body == b""
        assert head.status == got.status
        varying = {"Date", "X-Request-Id", "X-Request-ID"}
        assert {n: v for n, v in head.headers.items() if n not in varying} == {
            n: v for n, v in got.headers.items() if n not in varying
        }
    for text in ("bytes=5-9", "bytes=5000-"):  # ranges are for GET (RFC 9110, section 14.2)
        head = await alice.ask("HEAD", content, headers={"Range": text})
        assert (head.status, head.headers["Content-Length"]) == (200, str(SIZE))


MODIFIED = datetime(2026, 5, 1, 12, 0, 0, 500_000, tzinfo=UTC)
THERE = Representation(SIZE, "tag", MODIFIED)


def http_date(seconds: int) -> str:
    return Representation(0, "", MODIFIED + timedelta(seconds=seconds)).last_modified


@pytest.mark.parametrize(
    ("headers", "unmodified"),
    [
        ({}, False),
        ({"If-None-Match": '"tag"'}, True),
        ({"If-None-Match": 'W/"tag"'}, True),
        ({"If-None-Match": '"other", "tag"'}, True),
        ({"If-None-Match": "*"}, True),
        ({"If-None-Match": '"other"'}, False),
        ({"If-None-Match": "tag"}, False),
        ({"If-Modified-Since": http_date(0)}, True),
        ({"If-Modified-Since": http_date(-1)}, False),
        ({"If-Modified-Since": "yesterday"}, False),
        ({"If-Modified-Since": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, False),
        ({"If-None-Match": '"other"', "If-Modified-Since": http_date(0)}, False),
        ({"If-Match": '"tag"'}, False),
        ({"If-Match": "*"}, False),
        ({"If-Unmodified-Since": http_date(0)}, False),
        ({"If-Match": '"tag"', "If-Unmodified-Since": http_date(-1)}, False),
    ],
)
def test_a_copy_is_good_as_long_as_its_conditions_hold(headers: dict[str, str], *, unmodified: bool) -> None:
    assert is_unmodified(headers, THERE) is unmodified


@pytest.mark.parametrize(
    "headers", [{"If-Match": '"other"'}, {"If-Match": 'W/"tag"'}, {"If-Unmodified-Since": http_date(-1)}]
)
def test_a_precondition_that_does_not_hold_fails(headers: dict[str, str]) -> None:
    with pytest.raises(PreconditionFailed):
        is_unmodified(headers, THERE)


@pytest.mark.parametrize(
    ("if_range", "holds"),
    [
        ('"tag"', True),
        ('W/"tag"', False),
        ('"other"', False),
        (http_date(0), True),
        (http_date(1), False),
        ("x", False),
    ],
)
def test_a_range_goes_with_the_copy_that_if_range_names(if_range: str, *, holds: bool) -> None:
    part = wanted_part({"Range": "bytes=0-1", "If-Range": if_range}, THERE)
    assert (part is not None) is holds


async def test_what_is_stored_never_runs_as_a_page(alice: Client) -> None:
    page = b"<script>alert(1)</script>"
    put = await alice.put("/v1/files/page.html", page, headers={"Content-Type": "text/html"})
    got = await alice.get(f"{put.headers['Location']}/content")
    assert got.headers["Content-Disposition"].startswith("attachment;")
    assert got.headers["X-Content-Type-Options"] == "nosniff"
    assert got.headers["Content-Security-Policy"] == "sandbox"


async def test_a_redirect_leads_to_the_bytes_without_credentials(alice: Client) -> None:
    put = await alice.put("/v1/files/%C3%A4.bin", DATA)
    answer = await alice.get(f"{put.headers['Location']}/content?redirect=true")
    assert answer.status == 307
    async with aiohttp.ClientSession() as session, session.get(answer.headers["Location"]) as response:
        assert await response.read() == DATA
        assert "%C3%A4.bin" in response.headers["Content-Disposition"]


async def test_a_redirect_leads_where_clients_reach_the_store(settings: Settings) -> None:
    async with (
        Tap(urlsplit(settings.s3_endpoint).port or 0) as tap,
        running_gateway(settings, s3_public_endpoint=f"http://{tap.address}") as nobody,
    ):
        alice = await nobody.with_account("alice")
        put = await alice.put("/v1/files/a", DATA)
        link = (await alice.get(f"{put.headers['Location']}/content?redirect=true")).headers["Location"]
        assert link.startswith(f"http://{tap.address}/")
        async with aiohttp.ClientSession() as session, session.get(yarl.URL(link, encoded=True)) as response:
            assert await response.read() == DATA  # signed for that address


async def test_bytes_that_the_store_lost_are_an_error_and_no_empty_file(
    alice: Client, database: PgDatabase, object_store: S3ObjectStore
) -> None:
    put = await alice.put("/v1/files/data", DATA)
    async with database.connection() as connection:
        await object_store.delete(await connection.fetchval("SELECT object_key FROM sluice.files"))
    answer = await alice.get(f"{put.headers['Location']}/content")
    assert (answer.status, answer.code) == (503, "store-unavailable")
    assert "Retry-After" in answer.headers


async def test_a_client_of_old_gets_all_of_it(alice: Client) -> None:
    put = await alice.put("/v1/files/data", DATA * 1000)
    raw = await alice.connect()
    await raw.send_head("GET", f"{put.headers['Location']}/content", version="HTTP/1.0")
    status, head = await raw.read_head()
    assert (status, await raw.reader.read()) == (200, DATA * 1000)
    assert f"Content-Length: {SIZE * 1000}\r\n" in head
    assert "Transfer-Encoding" not in head
    await raw.close()


async def test_a_reader_that_leaves_does_not_disturb_the_others(
    alice: Client, caplog: pytest.LogCaptureFixture
) -> None:
    put = await alice.put("/v1/files/large", b"x" * 30 * MIB)
    content = f"{put.headers['Location']}/content"
    raw = await alice.connect()
    await raw.send_head("GET", content)
    await raw.reader.readexactly(100_000)
    await raw.close()
    whole, part = await asyncio.gather(alice.get(content), alice.get(content, headers={"Range": "bytes=-5"}))
    assert (len(whole.body), part.body) == (30 * MIB, b"xxxxx")

    async def is_noticed() -> bool:
        return b'route="/v1/files/{file}/content",status="499"' in (await alice.get("/metrics")).body

    await until(is_noticed)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
