"""What the gateway does when a server behind it dies or breaks off."""

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import aiohttp
import asyncpg
import pytest

from shared.config import Settings
from shared.ports.objects import MIB
from tests.faults.tap import ConnectionCut, Tap
from tests.gateway_process import Client, running_gateway


@pytest.fixture
async def store_tap(settings: Settings) -> AsyncIterator[Tap]:
    async with Tap(urlsplit(settings.s3_endpoint).port or 0) as tap:
        yield tap


@pytest.fixture
async def alice(settings: Settings, store_tap: Tap) -> AsyncIterator[Client]:
    """An account of a gateway that reaches the object store through the tap."""
    async with running_gateway(settings, s3_endpoint=f"http://{store_tap.address}") as nobody:
        yield await nobody.with_account("alice")


async def test_a_store_that_breaks_off_cuts_the_download(alice: Client, store_tap: Tap) -> None:
    """The head has said how much there is: the client must see that less came."""
    put = await alice.put("/v1/files/large", b"x" * 20 * MIB)
    store_tap.reset()

    async def cut(offset: int, chunk: bytes) -> bytes:
        if offset > 10 * MIB:
            raise ConnectionCut
        return chunk

    store_tap.down = cut
    with pytest.raises(aiohttp.ClientPayloadError):
        await alice.get(f"{put.headers['Location']}/content")


async def test_a_store_that_is_away_is_503_and_what_it_holds_stays_in_the_ledger(
    alice: Client, store_tap: Tap, settings: Settings
) -> None:
    store_tap.reset()

    async def cut(offset: int, chunk: bytes) -> bytes:
        if offset > 5 * MIB:  # in the middle of the first part
            raise ConnectionCut
        return chunk

    store_tap.up = cut
    answer = await alice.put("/v1/files/a", b"x" * 20 * MIB)
    assert (answer.status, answer.code) == (503, "store-unavailable")
    assert (await alice.get("/v1/files")).json["files"] == []
    connection = await asyncpg.connect(settings.postgres_dsn)
    rows = await connection.fetch("SELECT upload_id, alive_until <= now() AS given_up FROM sluice.object_ledger")
    await connection.close()
    # The sweeper finds it: which upload it is, and that nobody writes it any more.
    assert [(row["upload_id"] is not None, row["given_up"]) for row in rows] == [(True, True)]


async def test_a_store_that_hangs_leaves_the_database_to_the_others(
    settings: Settings, store_tap: Tap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.main.DATABASE_CONNECTIONS", 2)
    hanging, asked, goes_on = [], asyncio.Event(), asyncio.Event()

    async def hang(_: int, chunk: bytes) -> bytes:
        hanging.append(chunk)
        if len(hanging) == 2:
            asked.set()
        await goes_on.wait()
        return chunk

    async with running_gateway(settings, s3_endpoint=f"http://{store_tap.address}") as nobody:
        alice = await nobody.with_account("alice")
        store_tap.up = hang
        for name in "ab":
            raw = await alice.connect()
            await raw.send_head("PUT", f"/v1/files/{name}", Content_Length="10")
            await raw.send(b"x")
            await raw.close()
        await asked.wait()  # both are being cleaned away
        assert (await alice.get("/v1/files")).status == 200
        goes_on.set()


async def test_a_database_that_cuts_its_connections_is_503_once_and_then_answers(
    alice: Client, settings: Settings
) -> None:
    connection = await asyncpg.connect(settings.postgres_dsn)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()
    statuses = [(await alice.get("/v1/files")).status for _ in range(25)]
    assert set(statuses) <= {200, 503}
    assert statuses[-1] == 200
