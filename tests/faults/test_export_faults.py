"""What an export makes of workers, servers and networks that die, stall or forget: the same bytes, and nothing left."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest

from shared.domain.errors import LockTimeout
from shared.domain.task import Command, LoadId, Task, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES, Part
from sluice.stack import Stack
from sluice.stack.server import Server
from sluice.stack.services import Service
from tests.exports import (
    add_numbers,
    add_rare,
    begin_export,
    content,
    export,
    leftovers,
    out_of_reach,
    planned,
    reads,
    reference,
    succeeded,
)
from tests.faults.scene import Scene, open_scene
from tests.faults.tap import ConnectionCut, Tap
from tests.tasks import QUICK

# About 60 MB: ten parts.
ROWS = 280_000
SLOWLY = 3 * MIN_PART_BYTES
LANES = 3
ENVIRONMENT = {
    **QUICK,
    "SLUICE_PART_BYTES": str(MIN_PART_BYTES),
    "SLUICE_LANES": str(LANES),
    "SLUICE_SWEEP_INTERVAL_SECONDS": "1",
}


@pytest.fixture(scope="module")
def servers() -> Iterator[Stack]:
    """Servers that the tests of this module kill and restart; PostgreSQL as safe as in production."""
    stack = Stack.temporary(given={})
    try:
        stack.start()
        yield stack
    finally:
        stack.purge()


@dataclass
class Fleet:
    """A control service and two export workers, an account whose exports they run, and what its dataset holds."""

    stack: Stack
    scene: Scene
    control: Service
    workers: list[Service]
    load: LoadId
    expected: bytes

    def holder(self, task: Task) -> Service:
        """The process that has the task."""
        assert task.worker is not None, "only a task that is being worked on has a worker"
        pid = int(task.worker.rpartition(":")[2])
        [holder] = [worker for worker in self.workers if worker.pid == pid]
        return holder

    async def whole(self) -> None:
        """Start again what was killed, and wait until everything is ready."""
        for server in self.stack.servers:
            if not server.process.is_running():
                await asyncio.to_thread(server.restart)
        for service in (self.control, *self.workers):
            if not service.process.is_running():
                service.start()
        for service in (self.control, *self.workers):
            await asyncio.to_thread(service.wait_ready)

    async def begun(self, **params: Any) -> TaskId:
        """An export of which a part is committed, and much is not."""
        task_id = await begin_export(self.scene, max_bytes_per_second=SLOWLY, **params)
        await self.scene.when(task_id, lambda task: task.bytes_done > 0)
        return task_id

    async def segmented(self) -> TaskId:
        """A paused export of three segments, with some left to do."""
        task_id = await self.begun()
        for _ in range(2):
            await self.scene.command(task_id, Command.PAUSE)
            before = (await self.scene.until(task_id, TaskState.PAUSED)).bytes_done
            await self.scene.command(task_id, Command.RESUME)
            await self.scene.when(task_id, lambda task, before=before: task.bytes_done > before)  # type: ignore[misc]
        await self.scene.command(task_id, Command.PAUSE)
        await self.scene.until(task_id, TaskState.PAUSED)
        return task_id

    async def orphaned(self, task_id: TaskId) -> tuple[str, str, list[Part]]:
        """Kill all workers; answers the upload that they leave: key, id and committed parts."""
        for worker in self.workers:
            worker.kill()
        ledger = await self.scene.fetch(
            "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1 AND upload_id IS NOT NULL",
            task_id,
        )
        parts = await self.scene.fetch(
            "SELECT part_number, etag, bytes FROM sluice.export_parts WHERE task_id = $1 ORDER BY part_number", task_id
        )
        assert parts
        return ledger[0]["object_key"], ledger[0]["upload_id"], [Part(*row.values()) for row in parts]

    async def finished(self, task_id: TaskId) -> Task:
        """Wait for success and compare every byte."""
        task = await succeeded(self.scene, task_id)
        assert await content(self.scene, task) == self.expected
        await self.whole()
        return task

    @asynccontextmanager
    async def behind(self, tap: Tap, **changed: str) -> AsyncIterator[Service]:
        """Only one worker, that reaches the store through `tap`."""
        for worker in self.workers:
            worker.kill()
        environment = {**ENVIRONMENT, **changed, "SLUICE_S3_ENDPOINT": f"http://{tap.address}"}
        [worker] = self.stack.spawn("export-worker", 1, environment)
        try:
            yield worker
        finally:
            await asyncio.to_thread(worker.terminate)
            self.stack.services.remove(worker)


@pytest.fixture(scope="module")
async def processes(servers: Stack) -> AsyncIterator[Fleet]:
    [control] = servers.spawn("control", 1, ENVIRONMENT)
    workers = servers.spawn("export-worker", 2, ENVIRONMENT)
    async with open_scene({**servers.environment(), **ENVIRONMENT}) as scene:
        load = await add_numbers(scene, ROWS)
        expected = await reference(scene, [load], ["n", "filling"])
        yield Fleet(servers, scene, control, workers, load, expected)


@pytest.fixture
async def fleet(processes: Fleet, shows_logs: Callable[[Stack], None]) -> AsyncIterator[Fleet]:
    """Everything running."""
    await processes.whole()
    yield processes
    shows_logs(processes.stack)


def held(*, after_epoch: int, more_than: int = -1) -> Callable[[Task], bool]:
    """Whether a worker has it that took it after that epoch, and has committed more than so many bytes; or it ended."""

    def holds(task: Task) -> bool:
        claimed = task.worker is not None and task.epoch > after_epoch
        return task.state is TaskState.SUCCEEDED or (claimed and task.bytes_done > more_than)

    return holds


# --- processes


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_workers_killed_again_and_again_write_the_same_bytes(fleet: Fleet, seed: int) -> None:
    chance = random.Random(seed)
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    epoch, size, kills = 0, -1, 0
    while kills < 6:
        # Sometimes right after the claim, else between two parts or inside one.
        anything = chance.random() < 0.3
        task = await scene.when(task_id, held(after_epoch=epoch, more_than=-1 if anything else size))
        if task.state is TaskState.SUCCEEDED:
            break
        await asyncio.sleep(chance.uniform(0, 0.3))
        worker = fleet.holder(task)
        worker.kill()
        worker.start()
        epoch, size, kills = task.epoch, task.bytes_done, kills + 1
    assert kills
    await fleet.finished(task_id)


async def test_kills_pauses_and_resumes_at_random_moments_write_the_same_bytes(fleet: Fleet) -> None:
    chance = random.Random(4)
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    for _ in range(12):
        await asyncio.sleep(chance.uniform(0, 0.5))
        if chance.random() < 0.4:
            worker = chance.choice(fleet.workers)
            worker.kill()
            worker.start()
        else:
            await scene.command(task_id, chance.choice([Command.PAUSE, Command.RESUME]))
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


async def test_a_killed_workers_upload_goes_on(fleet: Fleet) -> None:
    task_id = await fleet.begun()
    key, _, parts = await fleet.orphaned(task_id)
    task = await fleet.scene.store.get(task_id)
    assert task is not None
    assert sum(part.bytes for part in parts) == task.bytes_done
    await fleet.whole()
    task = await fleet.finished(task_id)
    assert task.result is not None
    file_key = await fleet.scene.value("SELECT object_key FROM sluice.files WHERE file_id = $1", task.result["file_id"])
    assert file_key == key


@pytest.mark.parametrize("swept", [False, True])
async def test_a_scan_that_finds_little_is_not_begun_again_after_each_kill(fleet: Fleet, swept: bool) -> None:
    scene = fleet.scene
    dataset = f"rare_{int(swept)}"
    await add_numbers(scene, ROWS, dataset=dataset)
    loads = [await add_rare(scene, 100, dataset) for _ in range(3)]
    condition = {"column": "n", "op": ">", "value": 0}
    undisturbed = await content(scene, await export(scene, dataset, conditions=[condition], file_name=dataset))
    task_id = await planned(scene, dataset, conditions=[condition])
    async with AsyncExitStack() as behind:
        doors = [await behind.enter_async_context(_door(scene, load)) for load in loads]
        await scene.command(task_id, Command.RESUME)
        for number, (load, door) in enumerate(zip(loads, doors, strict=True)):
            await reads(scene, load)
            # Longer than a worker keeps to itself what it has read: a quarter of its lease.
            await asyncio.sleep(1.5)
            door.set()
            await scene.when(task_id, lambda task, rows=ROWS + 10 * number: task.rows_done > rows)  # type: ignore[misc]
            key, upload_id, _ = await fleet.orphaned(task_id)
            # What the dead had asked for still waits.
            await scene.fetch("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
            if swept and number == 1:
                await scene.objects.abort_upload(key, upload_id)
            await fleet.whole()
    assert await content(scene, await succeeded(scene, task_id)) == undisturbed


@asynccontextmanager
async def _door(scene: Scene, load: LoadId) -> AsyncIterator[asyncio.Event]:
    """A load is out of reach until the event is set."""
    opened = asyncio.Event()

    async def keep() -> None:
        async with out_of_reach(scene, load):
            shut.set_result(None)
            await opened.wait()

    shut = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(keep())
        await shut
        try:
            yield opened
        finally:
            opened.set()


async def test_a_frozen_worker_changes_nothing_when_it_wakes_up(fleet: Fleet) -> None:
    task_id = await fleet.begun()
    task = await fleet.scene.store.get(task_id)
    assert task is not None
    worker = fleet.holder(task)
    worker.pause()
    try:
        await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    finally:
        worker.resume()
    await fleet.whole()
    assert (await fleet.finished(task_id)).claims == 2


async def test_a_reader_that_is_frozen_keeps_nobody_from_the_dataset_once_its_lease_has_ended(fleet: Fleet) -> None:
    scene = fleet.scene
    load = await add_numbers(scene, 60_000, dataset="read")
    task_id = await planned(scene, "read")
    async with out_of_reach(scene, load):
        await scene.command(task_id, Command.RESUME)
        await reads(scene, load)
        task = await scene.store.get(task_id)
        assert task is not None
        holder = fleet.holder(task)
        await asyncio.to_thread(holder.pause)
    # Now the server answers, and nobody takes it.
    half_sent = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
    await scene.when_value(half_sent, True)
    async with asyncio.timeout(60):
        while await scene.value("SELECT count(*) FROM sluice.loads WHERE load_id = $1 AND detached_at IS NULL", load):
            with suppress(LockTimeout):
                await scene.catalog.revert(scene.account_id, "read", load)
    await asyncio.to_thread(holder.resume)
    await succeeded(scene, task_id)
    await fleet.whole()


@pytest.mark.parametrize("seed", range(4))
async def test_an_abort_at_any_moment_leaves_nothing_though_the_worker_is_killed_as_well(
    fleet: Fleet, seed: int
) -> None:
    chance = random.Random(seed)
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    await scene.when(task_id, lambda task: task.worker is not None)
    await asyncio.sleep(chance.uniform(0, 1))
    task = await scene.store.get(task_id)
    if seed % 2 and task is not None and task.worker is not None:
        worker = fleet.holder(task)
        worker.kill()
        worker.start()
    await scene.abort(task_id)
    await fleet.whole()
    assert await leftovers(scene, task_id) == {}


async def test_an_abort_that_meets_a_completion_on_its_way_leaves_nothing(fleet: Fleet) -> None:
    scene = fleet.scene
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    async with Tap(endpoint.port or 0) as tap:
        on_its_way, let_through = asyncio.Event(), asyncio.Event()

        async def hold_completion(_: int, chunk: bytes) -> bytes:
            if chunk.startswith(b"POST ") and b"uploadId=" in chunk:
                on_its_way.set()
                await let_through.wait()
            return chunk

        async with fleet.behind(tap):
            task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
            await scene.when(task_id, lambda task: task.bytes_done > 0)
            tap.up = hold_completion
            await scene.command(task_id, Command.PAUSE)
            await on_its_way.wait()
            [row] = await scene.fetch(
                "SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task_id
            )
            await scene.command(task_id, Command.ABORT)
            await fleet.whole()
            await scene.until(task_id, TaskState.ABORTED)
            let_through.set()
    # As a store that was slow with it would have done.
    await scene.objects.put(row["object_key"], b"completed")
    async with asyncio.timeout(30):
        while await leftovers(scene, task_id):  # noqa: ASYNC110 - the sweeper runs every second
            await asyncio.sleep(0.1)


# --- uploads


async def test_a_swept_upload_is_done_again_and_only_its_own_segment(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    await scene.command(task_id, Command.PAUSE)
    sealed = (await scene.until(task_id, TaskState.PAUSED)).bytes_done
    await scene.command(task_id, Command.RESUME)
    await scene.when(task_id, lambda task: task.bytes_done > sealed)
    key, upload_id, _ = await fleet.orphaned(task_id)
    await scene.objects.abort_upload(key, upload_id)
    await fleet.whole()
    task = await scene.when(task_id, held(after_epoch=3, more_than=0))
    assert task.bytes_done >= sealed
    await fleet.finished(task_id)
    assert await scene.value("SELECT count(*) FROM sluice.object_ledger WHERE object_key = $1", key) == 0


async def test_an_upload_swept_under_a_running_worker_is_done_again(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    [row] = await scene.fetch("SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task_id)
    await scene.objects.abort_upload(row["object_key"], row["upload_id"])
    task = await fleet.finished(task_id)
    assert task.claims == 2
    assert any("no longer has the upload" in (reason or "") for _, reason in await scene.events(task_id))


async def test_a_segment_that_was_completed_and_not_noted_counts(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    key, upload_id, parts = await fleet.orphaned(task_id)
    await scene.objects.complete_upload(key, upload_id, parts)
    await fleet.whole()
    await scene.when(task_id, held(after_epoch=1, more_than=sum(part.bytes for part in parts)))
    await fleet.finished(task_id)


async def test_a_completion_that_the_store_carries_out_late_costs_only_its_segment(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    key, upload_id, parts = await fleet.orphaned(task_id)
    await fleet.whole()
    await scene.when(task_id, held(after_epoch=1, more_than=sum(part.bytes for part in parts)))
    await scene.objects.complete_upload(key, upload_id, parts)
    await fleet.finished(task_id)


async def test_an_empty_file_is_written_though_the_worker_died_before(fleet: Fleet) -> None:
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    async with Tap(endpoint.port or 0) as tap:
        worker: Service
        killed = asyncio.Event()

        async def kill(_: int, chunk: bytes) -> bytes:
            if b"/whole-" in chunk:
                worker.kill()
                killed.set()
                raise ConnectionCut
            return chunk

        tap.up = kill
        async with fleet.behind(tap) as worker:
            nothing = [{"column": "n", "op": "<", "value": 0}]
            task_id = await begin_export(fleet.scene, format="jsonl", conditions=nothing)
            await killed.wait()
            await fleet.whole()
            task = await succeeded(fleet.scene, task_id)
    assert await content(fleet.scene, task) == b""


async def test_a_part_overwritten_by_other_bytes_is_noticed(fleet: Fleet) -> None:
    task_id = await fleet.begun()
    key, upload_id, parts = await fleet.orphaned(task_id)
    await fleet.scene.objects.put_part(key, upload_id, parts[-1].number, b"x" * MIN_PART_BYTES)
    await fleet.whole()
    await fleet.finished(task_id)


async def test_a_store_that_loses_every_upload_fails_the_export_in_the_end(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY)
    another = (
        "SELECT count(*) > 0 FROM sluice.export_parts JOIN sluice.object_ledger USING (task_id)"
        " WHERE task_id = $1 AND upload_id <> $2"
    )
    upload_id = ""
    for _ in range(5):
        await scene.when_value(another, True, task_id, upload_id)
        key, upload_id, _ = await fleet.orphaned(task_id)
        await scene.objects.abort_upload(key, upload_id)
        await fleet.whole()
    task = await scene.until(task_id, TaskState.FAILED)
    assert task.error is not None
    assert "lost the same upload 5 times" in task.error["detail"]
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


# --- the join of the segments

COPIES = "SELECT count(*) > 0 FROM sluice.export_parts WHERE task_id = $1 AND segment = 0"


@asynccontextmanager
async def joining(fleet: Fleet, **changed: str) -> AsyncIterator[tuple[TaskId, Service, list[bytes]]]:
    """An export whose segments a worker of its own copies, slowly; one is done. The copies so far."""
    task_id = await fleet.segmented()
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    copied: list[bytes] = []
    async with Tap(endpoint.port or 0) as tap:

        async def slowly(_: int, chunk: bytes) -> bytes:
            if b"x-amz-copy-source" in chunk.lower():
                copied.extend(re.findall(rb"partNumber=(\d+)", chunk))
                await asyncio.sleep(0.7)  # the time in which a test can disturb a copy
            return chunk

        tap.up = slowly
        async with fleet.behind(tap, SLUICE_LANES="1", **changed) as worker:
            await fleet.scene.command(task_id, Command.RESUME)
            await fleet.scene.when_value(COPIES, True, task_id)
            yield task_id, worker, copied


async def test_a_join_goes_on_where_its_slice_and_its_worker_ended(fleet: Fleet) -> None:
    async with joining(fleet, SLUICE_SLICE_SECONDS="1.5") as (task_id, worker, copied):
        worker.kill()
        worker.start()
        await fleet.scene.until(task_id, TaskState.SUCCEEDED)
    # One was on its way when the worker was killed.
    assert 3 <= len(set(copied)) <= len(copied) <= len(set(copied)) + 1
    assert sum(reason == "its slice is over" for _, reason in await fleet.scene.events(task_id)) > 0
    await fleet.finished(task_id)


async def test_a_pause_gives_up_a_join_and_a_resume_begins_another(fleet: Fleet) -> None:
    scene = fleet.scene
    async with joining(fleet) as (task_id, _, _):
        await scene.command(task_id, Command.PAUSE)
        await scene.until(task_id, TaskState.PAUSED)
        assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []
        assert not await scene.value(COPIES, task_id)
        await scene.command(task_id, Command.RESUME)
        await scene.until(task_id, TaskState.SUCCEEDED)
    await fleet.finished(task_id)


async def test_a_join_whose_upload_is_swept_is_done_again(fleet: Fleet) -> None:
    scene = fleet.scene
    async with joining(fleet) as (task_id, _, _):
        [upload] = [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")]
        await scene.objects.abort_upload(upload.key, upload.upload_id)
        await scene.until(task_id, TaskState.SUCCEEDED)
    assert any("no longer has the upload" in (reason or "") for _, reason in await scene.events(task_id))
    await fleet.finished(task_id)


async def test_an_abort_during_the_join_leaves_nothing(fleet: Fleet) -> None:
    async with joining(fleet) as (task_id, _, _):
        await fleet.scene.abort(task_id)
        assert await leftovers(fleet.scene, task_id) == {}


# --- servers


@pytest.mark.parametrize(
    ("server", "kill"), [("rabbitmq", True), ("postgres", False), ("postgres", True), ("seaweedfs", False)]
)
async def test_an_export_goes_on_after_a_restart_of_a_server(fleet: Fleet, server: str, kill: bool) -> None:
    task_id = await fleet.begun()
    restarted: Server = getattr(fleet.stack, server)
    if kill:
        await asyncio.to_thread(restarted.kill)
    await asyncio.to_thread(restarted.restart)
    await fleet.finished(task_id)


async def test_an_export_whose_worker_dies_on_the_way_to_its_pause_keeps_no_upload(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await fleet.begun()
    task = await scene.store.get(task_id)
    assert task is not None
    worker = fleet.holder(task)
    worker.pause()
    await scene.command(task_id, Command.PAUSE)
    worker.kill()
    worker.start()
    await scene.until(task_id, TaskState.PAUSED)
    sealed = "SELECT count(*) FROM sluice.object_ledger WHERE task_id = $1 AND upload_id IS NULL"
    await scene.when_value(sealed, 1, task_id)
    assert [upload async for upload in scene.objects.list_uploads(f"exports/{task_id}/")] == []
    await scene.command(task_id, Command.RESUME)
    await fleet.finished(task_id)


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


# --- networks


async def test_connections_to_the_store_that_break_in_the_middle_of_parts_cost_time_only(fleet: Fleet) -> None:
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    chance = random.Random(5)
    async with Tap(endpoint.port or 0) as tap:

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
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    async with Tap(endpoint.port or 0) as tap:
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
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    busy = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    refused = 0

    async with Tap(endpoint.port or 0) as tap:

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
