"""What an import makes of workers, servers and networks that die, restart or stall: every row once, always."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from shared.domain.messages import CONTROL_COMMANDS, CONTROL_QUEUE, IMPORT_QUEUE, rollback_queue
from shared.domain.task import Command, Task, TaskId, TaskState
from sluice.stack import Stack
from sluice.stack.server import Server
from tests.faults.fleet import Workers
from tests.faults.scene import Scene, open_scene
from tests.faults.tap import Tap
from tests.servers import started
from tests.tasks import QUICK, ROW_BYTES, assert_loaded, numbered_csv

ROWS = 60_000
BODY = numbered_csv(ROWS)
BATCH_BYTES = int(QUICK["SLUICE_BATCH_BYTES"])
LANES = 3
# What one claim may have sent and not committed: a batch in each lane.
IN_FLIGHT_ROWS = LANES * (BATCH_BYTES // ROW_BYTES + 2)
# With the short back-off of QUICK: about six seconds for a restarted store to find itself again.
MAX_ATTEMPTS = 8
SLOWLY = 2_000_000  # bytes per second: about two seconds for BODY, in which things can happen


@pytest.fixture(scope="module")
def servers() -> Iterator[Stack]:
    """Servers that the tests of this module kill and restart; PostgreSQL as safe as in production."""
    with started(Stack.temporary(given={})) as stack:
        yield stack


@dataclass
class Fleet(Workers):
    """Import workers, and an account whose imports they run."""

    async def finished(self, task_id: TaskId, rows: int = ROWS) -> Task:
        """Wait for success, then count everything."""
        task = await self.scene.until(task_id, TaskState.SUCCEEDED)
        await assert_loaded(self.scene, "data", rows)
        assert (task.rows_done, task.rejects, task.bytes_done) == (rows, 0, task.bytes_total)
        assert task.result is not None
        assert task.result["rows"] == rows
        loads = await self.scene.fetch("SELECT load_id FROM sluice.loads WHERE account_id = $1", self.scene.account_id)
        assert [row["load_id"] for row in loads] == [task_id]
        await self.whole()
        await self.quiet()
        return task

    async def quiet(self) -> None:
        """Wait until no message waits anywhere."""
        await self.scene.when_value("SELECT count(*) FROM sluice.outbox", 0)
        for queue in (IMPORT_QUEUE, rollback_queue(IMPORT_QUEUE), CONTROL_QUEUE):
            async with asyncio.timeout(30):
                while await self.scene.bus.ready_messages(queue):  # noqa: ASYNC110 - the broker tells nobody
                    await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
async def processes(servers: Stack) -> AsyncIterator[Fleet]:
    environment = {**QUICK, "SLUICE_MAX_ATTEMPTS": str(MAX_ATTEMPTS), "SLUICE_LANES": str(LANES)}
    [control] = servers.spawn("control", 1, environment)
    workers = servers.spawn("upload-worker", 2, environment)
    async with open_scene({**servers.environment(), **environment}) as scene:
        yield Fleet(servers, scene, control, workers)


@pytest.fixture
async def fleet(processes: Fleet, shows_logs: Callable[[Stack], None]) -> AsyncIterator[Fleet]:
    """Everything running, and an account of the test's own."""
    await processes.whole()
    yield Fleet(processes.stack, await processes.scene.another_account(), processes.control, processes.workers)
    shows_logs(processes.stack)


# --- processes


async def inserted(scene: Scene, task_id: TaskId) -> int:
    """Rows that were sent to the load's table, those of transactions that were rolled back as well."""
    # Sessions tell of what they have counted when they end, and before that only ten seconds later.
    await scene.fetch(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name LIKE 'upload-worker@%'"
    )
    return int(await scene.value("SELECT pg_stat_get_tuples_inserted(to_regclass($1))", f"sluice_loads.load_{task_id}"))


def held(*, after_epoch: int, rows: int = 0) -> Callable[[Task], bool]:
    """Whether a worker has it that took it after that epoch, and so many rows are loaded; or all is done."""

    def holds(task: Task) -> bool:
        claimed = task.worker is not None and task.epoch > after_epoch and task.plan is not None
        return task.state is TaskState.SUCCEEDED or (claimed and task.rows_done >= rows)

    return holds


def held_or_failed(*, after_epoch: int) -> Callable[[Task], bool]:
    holds = held(after_epoch=after_epoch)
    return lambda task: task.state is TaskState.FAILED or holds(task)


@pytest.mark.parametrize("seed", [1, 2])
async def test_workers_killed_again_and_again_load_every_row_once_and_repeat_little(fleet: Fleet, seed: int) -> None:
    chance = random.Random(seed)
    scene = fleet.scene
    kills, epoch, rows = 0, 0, 0
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    while kills < 5:
        # Sometimes right after the claim, else somewhere between two batches or inside one.
        more = chance.choice([0, 1, 200, 5000, 10_000])
        task = await scene.when(task_id, held(after_epoch=epoch, rows=rows + more))
        if task.state is TaskState.SUCCEEDED:
            break
        worker = fleet.holder(task)
        worker.kill()
        worker.start()
        kills, epoch, rows = kills + 1, task.epoch, task.rows_done
    assert kills
    await fleet.finished(task_id)
    assert ROWS <= await inserted(scene, task_id) <= ROWS + kills * IN_FLIGHT_ROWS


async def test_a_worker_told_to_stop_hands_its_task_over(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    worker = fleet.holder(await scene.when(task_id, lambda task: task.rows_done > 0))
    assert await asyncio.to_thread(worker.terminate) == 0
    task = await fleet.finished(task_id)
    assert [event for event, _ in await scene.events(task_id)] == [
        "TaskQueued",
        "TaskStarted",
        "TaskYielded",
        "TaskStarted",
        "TaskSucceeded",
    ]
    assert task.claims == 2
    assert ROWS <= await inserted(scene, task_id) <= ROWS + IN_FLIGHT_ROWS


async def test_a_frozen_worker_loses_its_task_and_changes_nothing_when_it_wakes_up(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    worker = fleet.holder(await scene.when(task_id, lambda task: task.rows_done > 0))
    worker.pause()
    try:
        await scene.until(task_id, TaskState.SUCCEEDED)
        await assert_loaded(scene, "data", ROWS)
    finally:
        worker.resume()
    task = await fleet.finished(task_id)
    assert task.claims == 2


async def test_a_task_that_kills_every_worker_fails_and_is_left_alone(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    task = await scene.when(task_id, held(after_epoch=0))
    kills = 0
    async with scene.database.transaction() as somebody:
        # From now on no batch can be committed: each worker dies without progress.
        await somebody.execute(f"LOCK TABLE sluice_loads.load_{task_id} IN SHARE MODE")
        while task.state is not TaskState.FAILED:
            worker = fleet.holder(task)
            worker.kill()
            worker.start()
            kills += 1
            task = await scene.when(task_id, held_or_failed(after_epoch=task.epoch))
    # The first claim may have made progress before it was killed; it does not count then.
    assert kills in (MAX_ATTEMPTS, MAX_ATTEMPTS + 1)
    assert task.error is not None
    assert task.error["code"] == "no-progress"
    assert str(MAX_ATTEMPTS) in task.error["detail"]
    assert all(worker.process.is_running() for worker in fleet.workers)
    await scene.abort(task_id)
    assert await scene.leftovers(task_id) == {}
    await fleet.quiet()


async def test_commands_in_flight_survive_the_death_of_the_control_service(fleet: Fleet) -> None:
    scene = fleet.scene
    tasks = [await scene.begin(BODY, f"data{n}", max_bytes_per_second=10_000) for n in range(6)]
    await scene.when(tasks[0], lambda task: task.plan is not None)
    fleet.control.pause()  # the commands reach it and are not carried out
    commands = [CONTROL_COMMANDS[Command.ABORT](task_id=task_id, actor="test") for task_id in tasks]
    answers = await asyncio.gather(*(scene.bus.ask(command, timeout_seconds=0.5) for command in commands))
    assert answers == [None] * len(tasks)
    fleet.control.kill()
    fleet.control.start()
    for task_id in tasks:
        await scene.until(task_id, TaskState.ABORTED)
        assert await scene.leftovers(task_id) == {}
    await fleet.whole()
    await fleet.quiet()


# --- servers


async def test_an_import_ends_without_the_broker_and_is_told_of_once_it_is_back(fleet: Fleet) -> None:
    scene = fleet.scene
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    await scene.when(task_id, lambda task: task.rows_done > 0)
    await asyncio.to_thread(fleet.stack.rabbitmq.kill)
    task = await scene.until(task_id, TaskState.SUCCEEDED)
    assert task.claims == 1
    assert await scene.value("SELECT count(*) FROM sluice.outbox") > 0
    await asyncio.to_thread(fleet.stack.rabbitmq.restart)
    await fleet.finished(task_id)


@pytest.mark.parametrize(
    ("server", "kill"), [("rabbitmq", False), ("postgres", False), ("postgres", True), ("seaweedfs", False)]
)
async def test_an_import_goes_on_after_a_restart_of_a_server(fleet: Fleet, server: str, kill: bool) -> None:
    scene = fleet.scene
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    await scene.when(task_id, held(after_epoch=0, rows=1))
    restarted: Server = getattr(fleet.stack, server)
    if kill:
        await asyncio.to_thread(restarted.kill)
    await asyncio.to_thread(restarted.restart)
    task = await fleet.finished(task_id)
    assert server != "postgres" or task.claims > 1


async def test_rows_and_checkpoint_agree_after_a_crash_of_postgres(fleet: Fleet) -> None:
    """Batches commit asynchronously: the last of them may be lost, but only whole."""
    scene = fleet.scene
    task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
    for rows in (1, 20_000, 40_000):
        await scene.when(task_id, held(after_epoch=0, rows=rows))
        for worker in fleet.workers:
            worker.pause()  # so that the state right after the crash can be looked at
        await asyncio.to_thread(fleet.stack.postgres.kill)
        await asyncio.to_thread(fleet.stack.postgres.restart)
        await scene.when(task_id, lambda _: True)  # our own connections are new
        after = await scene.fetch(
            f"SELECT rows_done, bytes_done, (SELECT count(*) FROM sluice_loads.load_{task_id}) AS counted"
            " FROM sluice.tasks WHERE task_id = $1",
            task_id,
        )
        for worker in fleet.workers:
            worker.resume()
        assert after[0]["rows_done"] == after[0]["counted"]
        assert after[0]["bytes_done"] == after[0]["counted"] * ROW_BYTES
    task = await fleet.finished(task_id)
    assert task.claims > 1


async def test_an_import_waits_for_a_store_that_died_and_reads_on(fleet: Fleet) -> None:
    """The file is larger than what may be on its way when the store dies."""
    scene = fleet.scene
    rows = 500_000
    task_id = await scene.begin(numbered_csv(rows), max_bytes_per_second=10_000_000)
    await scene.when(task_id, lambda task: task.rows_done > 0)
    await asyncio.to_thread(fleet.stack.seaweedfs.kill)
    task = await scene.when(task_id, lambda task: task.error is not None)
    assert task.error is not None
    assert task.error["code"] == "store-unavailable"
    assert task.rows_done < rows
    await asyncio.to_thread(fleet.stack.seaweedfs.restart)
    await fleet.finished(task_id, rows)


# --- networks


async def test_a_worker_cut_off_from_the_database_is_replaced_and_fenced(fleet: Fleet) -> None:
    """Its connections are open and silent: a batch hangs in the middle of COPY while another worker finishes."""
    scene = fleet.scene
    for worker in fleet.workers:
        worker.kill()
    dsn = urlsplit(fleet.stack.environment()["SLUICE_POSTGRES_DSN"])
    async with Tap(dsn.port or 0) as tap:
        away = asyncio.Event()
        behind = dsn._replace(netloc=f"{dsn.username}:{dsn.password}@{tap.address}").geturl()
        [cut_off] = fleet.stack.spawn("upload-worker", 1, {**QUICK, "SLUICE_POSTGRES_DSN": behind})
        try:
            task_id = await scene.begin(BODY, max_bytes_per_second=SLOWLY)
            await scene.when(task_id, lambda task: task.rows_done > 0)

            async def stall(_: int, chunk: bytes) -> bytes:
                await away.wait()
                return chunk

            tap.up = tap.down = stall
            fleet.workers[0].start()
            await scene.until(task_id, TaskState.SUCCEEDED)
            await assert_loaded(scene, "data", ROWS)
            away.set()
            task = await fleet.finished(task_id)
            assert task.claims == 2
        finally:
            away.set()
            await asyncio.to_thread(cut_off.terminate)
            fleet.stack.services.remove(cut_off)


async def test_a_store_that_falls_silent_delays_an_import_and_loses_nothing(fleet: Fleet) -> None:
    scene = fleet.scene
    for worker in fleet.workers:
        worker.kill()
    rows = 500_000
    endpoint = urlsplit(fleet.stack.environment()["SLUICE_S3_ENDPOINT"])
    async with Tap(endpoint.port or 0) as tap:
        back = asyncio.Event()
        [behind] = fleet.stack.spawn("upload-worker", 1, {**QUICK, "SLUICE_S3_ENDPOINT": f"http://{tap.address}"})
        try:
            task_id = await scene.begin(numbered_csv(rows))
            await scene.when(task_id, lambda task: task.rows_done > 0)

            async def stall(_: int, chunk: bytes) -> bytes:
                await back.wait()
                return chunk

            tap.down = stall
            task = await scene.when(task_id, lambda task: task.error is not None)
            assert task.error is not None
            assert task.error["code"] == "store-unavailable"
            back.set()
            await fleet.finished(task_id, rows)
        finally:
            back.set()
            await asyncio.to_thread(behind.terminate)
            fleet.stack.services.remove(behind)
