"""What an export makes of a store that is away, slow, busy or full, and of networks that break."""

import asyncio
import random

import pytest

from shared.domain.task import Command, TaskState
from tests.exports import begin_export, leftovers
from tests.faults.fleet import SLOWLY, Fleet
from tests.faults.tap import ConnectionCut


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
            if chunk.startswith(b"HTTP/1.1 200") and refused < 20:
                refused += 1
                return busy
            return chunk

        async with fleet.behind(tap):
            task_id = await begin_export(fleet.scene, max_bytes_per_second=SLOWLY)
            await fleet.scene.when(task_id, lambda task: task.bytes_done > 0)
            tap.down = answer_busy
            await fleet.scene.until(task_id, TaskState.SUCCEEDED)
        assert refused == 20
    await fleet.finished(task_id)
