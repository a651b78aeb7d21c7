"""Downloads that break off again and again and go on where they were, by the programs that people use."""

import asyncio
import os
import random
import shutil
import sys
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp
import pytest

from shared.domain.task import AccountId, Command, TaskState
from shared.ports.objects import MIN_PART_BYTES
from tests.exports import add_numbers, begin_export, reference, succeeded
from tests.faults.scene import Scene
from tests.faults.tap import ConnectionCut, Tap
from tests.gateway_process import PASSWORD, Client, running_gateway

# What curl -C - does, for machines without it.
GO_ON = """
import os, sys, urllib.request
login, path, url = sys.argv[1:]
there = os.path.getsize(path) if os.path.exists(path) else 0
request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
request.add_unredirected_header("Authorization", login)
try:
    response = urllib.request.urlopen(request)
except urllib.error.HTTPError as error:
    sys.exit(0 if error.headers["Content-Range"] == f"bytes */{there}" else 22)
assert response.status == (206 if there else 200), response.status
with response, open(path, "ab") as file:
    while chunk := response.read(65536):
        file.write(chunk)
    sys.exit(18 if response.length else 0)
"""
PROGRAMS = ["python", *(name for name in ("curl",) if shutil.which(name))]


def command(program: str, username: str, path: Path, url: str) -> list[str]:
    if program == "curl":
        return ["curl", "-sSfL", "-u", f"{username}:{PASSWORD}", "-C", "-", "-o", str(path), url]
    return [sys.executable, "-c", GO_ON, aiohttp.encode_basic_auth(username, PASSWORD), str(path), url]


@dataclass
class Desk:
    """An account that exports and downloads; `gateway` and `store` are in the way of its bytes."""

    client: Client
    scene: Scene
    gateway: Tap
    store: Tap


@pytest.fixture
async def desk(exporters: Scene) -> AsyncIterator[Desk]:
    async with (
        Tap(urlsplit(exporters.settings.s3_endpoint).port or 0) as store,
        running_gateway(exporters.settings, s3_public_endpoint=f"http://{store.address}") as nobody,
        Tap(urlsplit(nobody.url).port or 0) as gateway,
    ):
        client = await nobody.with_account(f"user_{uuid.uuid4().hex[:12]}")
        account_id = AccountId((await client.get("/v1/accounts/me")).json["account_id"])
        yield Desk(client, replace(exporters, account_id=account_id, username=client.username), gateway, store)


async def run_until(tap: Tap, at: int, words: Sequence[str], *, kill: bool) -> int:
    """Let `at` bytes through to the program; then its connection is cut, or it is killed. Answers how it ended."""
    tap.reset()
    reached = asyncio.Event()

    async def stop(offset: int, chunk: bytes) -> bytes:
        if offset + len(chunk) <= at:
            return chunk
        reached.set()
        if not kill:
            raise ConnectionCut
        return chunk[: max(0, at - offset)]

    tap.down = stop
    program = await asyncio.create_subprocess_exec(*words)
    if kill:
        await reached.wait()
        program.kill()
    return await program.wait()


def written(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


async def download_in_pieces(desk: Desk, program: str, path: Path, address: str, expected: bytes) -> None:
    redirected = address.endswith("redirect=true")
    tap = desk.store if redirected else desk.gateway
    words = command(program, desk.client.username, path, f"http://{desk.gateway.address}{address}")
    there = b""
    for kill in (False, True, False, True):
        at = random.randint(1, len(expected) - len(there))
        assert await run_until(tap, at, words, kill=kill) != 0, (len(there), at)
        there = written(path)
        assert expected.startswith(there), (len(there), at)
    tap.reset()
    # The second finds that all is there, which curl before 8.5 calls an error (22) when told to fail.
    for ends in ((0,), (0, 22)):
        assert await (await asyncio.create_subprocess_exec(*words)).wait() in ends
        assert written(path) == expected


@pytest.mark.parametrize("query", ["", "?redirect=true"])
@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_download_that_breaks_off_goes_on(desk: Desk, program: str, query: str, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    put = await desk.client.put("/v1/files/data", data)
    await download_in_pieces(desk, program, tmp_path / "data", f"{put.headers['Location']}/content{query}", data)


async def test_an_export_of_several_segments_downloads_in_pieces(desk: Desk, tmp_path: Path) -> None:
    load = await add_numbers(desk.scene, 120_000)
    task_id = await begin_export(desk.scene, max_bytes_per_second=4 * MIN_PART_BYTES)
    for segments in range(1, 4):
        await desk.scene.when(task_id, lambda task, least=segments: task.bytes_done >= least * MIN_PART_BYTES)
        await desk.scene.command(task_id, Command.PAUSE)
        await desk.scene.until(task_id, TaskState.PAUSED)
        await desk.scene.command(task_id, Command.RESUME)
    task = await succeeded(desk.scene, task_id)
    assert task.result is not None
    file_id = task.result["file_id"]
    assert "/whole-" in await desk.scene.value("SELECT object_key FROM sluice.files WHERE file_id = $1", file_id)
    expected = await reference(desk.scene, [load], ["n", "filling"])
    for program in PROGRAMS:
        for query in ("", "?redirect=true"):
            path = tmp_path / f"{program}{len(query)}"
            await download_in_pieces(desk, program, path, f"/v1/files/{file_id}/content{query}", expected)


NAMES = ["select", "a b.csv", "it's.csv", 'quo"te.csv', "semi;colon, comma.csv", "%41\\.csv", "Größe/日本語 🎉.csv"]


async def test_an_export_is_saved_under_the_name_that_was_asked_for(desk: Desk) -> None:
    load = await add_numbers(desk.scene, 10)
    expected = await reference(desk.scene, [load], ["n", "filling"])
    for name in NAMES:
        request = {"kind": "export", "dataset": "data", "file_name": name}
        made = await desk.client.post("/v1/tasks", request)
        result = (await desk.client.get(f"{made.headers['Location']}?wait=60")).json["result"]
        assert result["file_name"] == name
        content = f"/v1/files/{result['file_id']}/content"
        link = (await desk.client.get(f"{content}?redirect=true")).headers["Location"]
        store = Client("", desk.client.session)
        for answer in (await desk.client.get(content), await store.get(link)):
            assert answer.body == expected
            # What browsers save it as (RFC 8187).
            saved = unquote(answer.headers["Content-Disposition"].partition("filename*=UTF-8''")[2])
            assert saved == name.rpartition("/")[2]
