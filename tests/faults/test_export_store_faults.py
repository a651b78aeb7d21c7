"""What an export makes of a store that is away, slow, busy or full, and of networks that break."""

import asyncio
import random
from collections import Counter

import pytest

from shared.domain.task import Command, TaskState
from shared.ports.objects import MIN_PART_BYTES
from tests.exports import begin_export, leftovers
from tests.faults.fleet import SLOWLY, Fleet
from tests.faults.tap import Answered, ConnectionCut


async def test_a_pause_without_the_store_is_a_pause_and_goes_on_when_it_is_back(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    await asyncio.to_thread(fleet.stack.seaweedfs.stop)
    await scene.command(task_id, Command.PAUSE)
    await asyncio.to_thread(fleet.stack.seaweedfs.restart)
    await scene.until(task_id, TaskState.PAUSED)
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


async def test_an_abort_waits_for_a_store_that_is_away_and_then_leaves_nothing(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    await asyncio.to_thread(fleet.stack.seaweedfs.stop)
    await scene.command(task_id, Command.ABORT)
    await asyncio.to_thread(fleet.stack.seaweedfs.restart)
    await scene.until(task_id, TaskState.ABORTED)
    assert await leftovers(scene, task_id) == {}


async def test_connections_to_the_store_that_break_in_the_middle_of_parts_cost_time_only(fleet: Fleet) -> None:
    chance = random.Random(5)
    async with fleet.tap() as tap:

        async def break_sometimes(_: int, chunk: bytes) -> bytes:
            if chance.random() < 0.002:
                raise ConnectionCut
            return chunk

        tap.up = tap.down = break_sometimes
        async with fleet.behind(tap):
            task_id = await begin_export(fleet.scene)
            await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    await fleet.finished(task_id)


@pytest.mark.parametrize("lost", ["request", "answer"])
async def test_a_completion_that_is_cut_off_is_repeated_whether_or_not_it_was_carried_out(
    fleet: Fleet, lost: str
) -> None:
    async with fleet.tap() as tap:
        cuts = 0
        completing = False

        async def up(_: int, chunk: bytes) -> bytes:
            nonlocal cuts, completing
            if b"POST " in chunk and b"uploadId=" in chunk and cuts < 2:
                cuts += 1
                if lost == "request":
                    raise ConnectionCut
                completing = True
            return chunk

        async def down(_: int, chunk: bytes) -> bytes:
            nonlocal completing
            if completing:
                completing = False
                raise ConnectionCut
            return chunk

        tap.up, tap.down = up, down
        async with fleet.behind(tap):
            task_id = await begin_export(fleet.scene)
            await fleet.scene.until(task_id, TaskState.SUCCEEDED)
        assert cuts == 2
    await fleet.finished(task_id)


async def test_a_store_that_answers_503_for_a_while_delays_the_export(fleet: Fleet) -> None:
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    refused = 0

    async with fleet.tap() as tap:

        async def answer_busy(_: int, chunk: bytes) -> bytes:
            nonlocal refused
            if chunk.startswith(b"HTTP/1.1 200") and refused < 8:
                refused += 1
                return busy
            return chunk

        async with fleet.behind(tap):
            task_id = await begin_export(fleet.scene, max_bytes_per_second=SLOWLY)
            await fleet.scene.when(task_id, lambda task: task.bytes_done > 0)
            tap.down = answer_busy
            await fleet.scene.until(task_id, TaskState.SUCCEEDED)
        assert refused == 8
    await fleet.finished(task_id)


# What tells a request apart, in its first bytes.
REQUESTS = {
    "copy": (b"PUT ", b"x-amz-copy-source"),
    "part": (b"PUT ", b"partNumber="),
    "completion": (b"POST ", b"uploadId="),
}


@pytest.mark.parametrize(
    ("status", "code"), [("503 Slow Down", "SlowDown"), ("507 Insufficient Storage", "XMinioStorageFull")]
)
async def test_parts_copies_and_completions_that_the_store_refuses_for_a_while_are_repeated(
    fleet: Fleet, status: str, code: str
) -> None:
    body = f"<Error><Code>{code}</Code><Message>not now</Message></Error>"
    answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    refused: Counter[str] = Counter()
    sending: dict[object, int] = {}

    async def refuse(_: int, chunk: bytes) -> bytes:
        head = chunk.partition(b"\r\n\r\n")[0].lower()
        connection = asyncio.current_task()
        what = next((what for what, marks in REQUESTS.items() if all(mark.lower() in head for mark in marks)), None)
        if what is not None:
            sending[connection] = 0
        if what is None and connection in sending and refused["part"] < 4:
            # In the middle of it.
            sending[connection] += len(chunk)
            if sending[connection] > MIN_PART_BYTES // 2:
                refused["part"] += 1
                raise Answered(answer)
        if what in ("copy", "completion") and refused[what] < 4:
            refused[what] += 1
            raise Answered(answer)
        return chunk

    task_id = await fleet.segmented()
    async with fleet.tap() as tap:
        tap.up = refuse
        async with fleet.behind(tap):
            await fleet.scene.command(task_id, Command.RESUME)
            await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    assert refused == {"part": 4, "copy": 4, "completion": 4}
    await fleet.finished(task_id)


async def test_an_export_into_a_slow_store_pauses_and_resumes_and_loses_nothing(fleet: Fleet) -> None:
    scene = fleet.scene

    async def slowly(_: int, chunk: bytes) -> bytes:
        await asyncio.sleep(0.01)  # at most 6 MB/s in each connection: a part takes about a second
        return chunk

    async with fleet.tap() as tap, fleet.behind(tap):
        tap.up = tap.down = slowly
        task_id = await begin_export(scene)
        done = 0
        for _ in range(2):
            await scene.when(task_id, lambda task, done=done: task.bytes_done > done)  # type: ignore[misc]
            await scene.command(task_id, Command.PAUSE)
            done = (await scene.until(task_id, TaskState.PAUSED)).bytes_done
            assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []
            sealed = [found.bytes async for found in scene.objects.list_objects(f"exports/{task_id}/")]
            assert sum(sealed) == done
            await scene.command(task_id, Command.RESUME)
        await scene.until(task_id, TaskState.SUCCEEDED)
    await fleet.finished(task_id)


async def test_an_abort_does_not_wait_for_a_store_that_takes_nothing_any_more(fleet: Fleet) -> None:
    scene = fleet.scene
    stalled, let_through = asyncio.Event(), asyncio.Event()

    async def stall(_: int, chunk: bytes) -> bytes:
        if chunk.startswith(b"PUT ") and b"partNumber=" in chunk:
            stalled.set()
            await let_through.wait()
        return chunk

    async with fleet.tap() as tap, fleet.behind(tap):
        task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
        await scene.when(task_id, lambda task: task.bytes_done > 0)
        tap.up = stall
        await stalled.wait()
        await scene.abort(task_id)
        assert await leftovers(scene, task_id) == {}
        let_through.set()
