"""The runner with a kind that only counts, on a real store."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from shared.adapters.postgres import PgDatabase
from shared.adapters.task_store import PgTaskStore
from shared.controls import Controls
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import DatabaseUnavailable, InvalidData, StoreUnavailable
from shared.domain.task import AccountId, Command, Kind, Task, TaskId, TaskState
from shared.ports.database import Connection
from shared.ports.kinds import Batch, Claim
from shared.ports.tasks import NewTask, Progress
from shared.runner import Runner, RunnerPolicy
from tests.tasks import POLICY as STORE_POLICY
from tests.tasks import SOMEBODY_WAITS, new_account, silent_store, until

POLICY = RunnerPolicy(lanes=3, slice_seconds=60, lease_seconds=60, retry_backoff_seconds=0.01)


async def nothing(*_: object) -> None:
    return


@dataclass
class Counting:
    """A kind whose batch n writes row n. The hooks are called where their names say."""

    batches_total: int = 20
    bytes_per_batch: int = 1
    before_batch: Callable[[int], Awaitable[None]] = nothing
    after_work: Callable[[int], Awaitable[None]] = nothing
    on_finish: Callable[[], Awaitable[None]] = nothing
    on_undo: Callable[[], Awaitable[None]] = nothing
    seals: int = 0
    published: int = 0
    ran: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def open(self, claim: Claim) -> AsyncIterator["CountingJob"]:
        if claim.task.plan is None:

            async def prepare(connection: Connection) -> None:
                await connection.execute(f"CREATE TABLE sluice_loads.load_{claim.task.task_id} (n bigint)")

            await claim.save_plan({}, prepare)
        yield CountingJob(self, claim)

    async def discard(self, task: Task) -> None:
        await self.on_undo()

    async def undo(self, task: Task, connection: Connection) -> None:
        await connection.execute(f"DROP TABLE IF EXISTS sluice_loads.load_{task.task_id}")


@dataclass
class CountingJob:
    kind: Counting
    claim: Claim

    async def batches(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        for start_, end in checkpoint.missing(0, self.kind.batches_total):
            for n in range(start_, end or 0):
                yield Batch(n, n + 1, None, self.kind.bytes_per_batch)

    async def run(self, batch: Batch) -> None:
        await self.kind.before_batch(batch.start)
        async with self.claim.batch() as work:
            self.kind.ran.append(batch.start)
            table = f"sluice_loads.load_{self.claim.task.task_id}"
            await work.connection.execute(f"INSERT INTO {table} VALUES ($1)", batch.start)
            await self.kind.after_work(batch.start)
            work.done(Range(batch.start, batch.end), Progress(bytes=self.kind.bytes_per_batch, rows=1))

    async def seal(self) -> None:
        self.kind.seals += 1

    async def finish(self) -> None:
        await self.kind.on_finish()

    async def publish(self, connection: Connection) -> dict[str, Any]:
        self.kind.published += 1
        return {"published": self.kind.published}


@dataclass
class Bench:
    """One worker in this process."""

    database: PgDatabase
    store: PgTaskStore
    account: AccountId

    def runner(self, kind: Counting, **policy: Any) -> Runner:
        return Runner(
            worker="w",
            store=self.store,
            database=self.database,
            kinds={Kind.IMPORT: kind},
            controls=Controls(),
            policy=RunnerPolicy(**{**{f: getattr(POLICY, f) for f in POLICY.__slots__}, **policy}),
        )

    async def begin(self, **new: Any) -> TaskId:
        task, _ = await self.store.create(NewTask(self.account, Kind.IMPORT, {}, **new), actor="test")
        return task.task_id

    async def get(self, task_id: TaskId) -> Task:
        task = await self.store.get(task_id)
        assert task is not None
        return task

    async def command(self, task_id: TaskId, command: Command) -> None:
        await self.store.command(task_id, command, account_id=None, actor="me", reason=None)

    async def rows(self, task_id: TaskId) -> list[int]:
        async with self.database.connection() as connection:
            return [row["n"] for row in await connection.fetch(f"SELECT n FROM sluice_loads.load_{task_id} ORDER BY n")]


@pytest.fixture
async def bench(database_dsn: str) -> AsyncIterator[Bench]:
    database = PgDatabase(database_dsn, size=8, name="test")
    await database.open()
    yield Bench(database, silent_store(database), await new_account(database))
    await database.close()


async def test_a_task_runs_every_batch_once_and_is_published_once(bench: Bench) -> None:
    kind = Counting()
    task_id = await bench.begin()
    await bench.runner(kind).run(task_id)
    task = await bench.get(task_id)
    assert (task.state, task.result, task.rows_done) == (TaskState.SUCCEEDED, {"published": 1}, 20)
    assert Checkpoint.from_json(task.checkpoint).done == (Range(0, 20),)
    assert await bench.rows(task_id) == sorted(kind.ran) == list(range(20))


async def test_a_task_without_batches_succeeds(bench: Bench) -> None:
    task_id = await bench.begin()
    await bench.runner(Counting(batches_total=0)).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.SUCCEEDED


async def test_a_pause_is_reached_at_a_batch_boundary_and_the_next_run_goes_on_there(bench: Bench) -> None:
    task_id = await bench.begin()

    paused_at_7 = asyncio.Event()

    async def pause_at_7(n: int) -> None:
        if n == 7:
            await bench.command(task_id, Command.PAUSE)
            paused_at_7.set()
        elif n > 7:
            await paused_at_7.wait()

    kind = Counting(before_batch=pause_at_7)
    await bench.runner(kind).run(task_id)
    paused = await bench.get(task_id)
    assert paused.state is TaskState.PAUSED
    assert kind.seals >= 1
    assert 7 in await bench.rows(task_id), "the batches in hand are finished"
    assert await bench.rows(task_id) == sorted(kind.ran), "what was begun was committed"
    await bench.command(task_id, Command.RESUME)
    await bench.runner(Counting()).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.SUCCEEDED
    assert await bench.rows(task_id) == list(range(20))


async def test_a_pause_that_comes_after_the_last_batch_ends_succeeded(bench: Bench) -> None:
    task_id = await bench.begin()

    async def pause() -> None:
        await bench.command(task_id, Command.PAUSE)

    await bench.runner(Counting(on_finish=pause)).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.SUCCEEDED


async def test_a_pause_that_is_withdrawn_before_it_is_reached_changes_nothing(bench: Bench) -> None:
    task_id = await bench.begin()

    async def waver(n: int) -> None:
        if n % 3 == 0:
            await bench.command(task_id, Command.PAUSE)
            await bench.command(task_id, Command.RESUME)

    await bench.runner(Counting(before_batch=waver)).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.SUCCEEDED
    assert await bench.rows(task_id) == list(range(20))


async def test_an_abort_before_publication_is_never_overtaken_by_it(bench: Bench) -> None:
    task_id = await bench.begin()

    async def abort() -> None:
        await bench.command(task_id, Command.ABORT)

    kind = Counting(on_finish=abort)
    runner = bench.runner(kind)
    await runner.run(task_id)
    assert (await bench.get(task_id)).state is TaskState.ABORTING
    assert kind.published == 0
    await runner.roll_back(task_id)
    assert (await bench.get(task_id)).state is TaskState.ABORTED


async def test_an_abort_in_mid_batch_rolls_that_batch_back(bench: Bench) -> None:
    task_id = await bench.begin()

    async def abort(n: int) -> None:
        if n == 5:
            await bench.command(task_id, Command.ABORT)

    await bench.runner(Counting(after_work=abort), lanes=1).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.ABORTING
    assert await bench.rows(task_id) == [0, 1, 2, 3, 4]


async def test_a_slice_that_is_over_hands_the_task_back_with_its_progress(bench: Bench) -> None:
    task_id = await bench.begin()
    claims = 0
    while (await bench.get(task_id)).state is TaskState.QUEUED:
        await bench.runner(Counting(before_batch=lambda _: asyncio.sleep(0.01)), slice_seconds=0.03, lanes=1).run(
            task_id
        )
        claims += 1
    task = await bench.get(task_id)
    assert (task.state, task.claims) == (TaskState.SUCCEEDED, claims)
    assert claims > 1
    assert await bench.rows(task_id) == list(range(20))


async def test_a_worker_that_is_stopped_hands_the_task_back(bench: Bench) -> None:
    task_id = await bench.begin()
    reached = asyncio.Event()

    async def hang(n: int) -> None:
        if n == 10:
            reached.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(bench.runner(Counting(before_batch=hang)).run(task_id))
    await reached.wait()
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert (await bench.get(task_id)).state is TaskState.QUEUED
    await bench.runner(Counting()).run(task_id)
    assert await bench.rows(task_id) == list(range(20))


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (InvalidData("line 3"), TaskState.FAILED, "invalid-data"),
        (StoreUnavailable("away"), TaskState.QUEUED, "store-unavailable"),
        (DatabaseUnavailable("away"), TaskState.QUEUED, "database-unavailable"),
        (ZeroDivisionError("oops"), TaskState.QUEUED, "internal"),
        (TimeoutError(), TaskState.QUEUED, "internal"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
async def test_an_error_fails_the_task_or_gives_it_back_and_is_kept(
    bench: Bench, error: Exception, state: TaskState, code: str
) -> None:
    task_id = await bench.begin()

    async def fail(n: int) -> None:
        if n == 10:
            raise error

    await bench.runner(Counting(after_work=fail), lanes=1).run(task_id)
    task = await bench.get(task_id)
    assert (task.state, task.error and task.error["code"], task.rows_done) == (state, code, 10)
    if state is TaskState.FAILED:
        await bench.command(task_id, Command.RESUME)
    await until(lambda: claimable(bench, task_id))
    await bench.runner(Counting()).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.SUCCEEDED
    assert await bench.rows(task_id) == list(range(20)), "it went on from the checkpoint"


async def claimable(bench: Bench, task_id: TaskId) -> object:
    async with bench.database.connection() as connection:
        return await connection.fetchval(
            "SELECT state = 'queued' AND coalesce(not_before, now()) <= now() FROM sluice.tasks WHERE task_id = $1",
            task_id,
        )


async def test_an_error_on_the_way_to_a_pause_ends_in_the_pause(bench: Bench) -> None:
    task_id = await bench.begin()

    async def fail(n: int) -> None:
        if n == 10:
            await bench.command(task_id, Command.PAUSE)
            raise StoreUnavailable("away")

    await bench.runner(Counting(before_batch=fail), lanes=1).run(task_id)
    assert (await bench.get(task_id)).state is TaskState.PAUSED


async def test_a_task_that_fails_again_and_again_ends_failed(bench: Bench) -> None:
    task_id = await bench.begin()

    async def fail(_: int) -> None:
        raise KeyError("odd")

    async with asyncio.timeout(30):
        while (await bench.get(task_id)).state is not TaskState.FAILED:
            await bench.runner(Counting(before_batch=fail)).run(task_id)
    task = await bench.get(task_id)
    assert task.error is not None
    assert (task.error["code"], task.error["last_error"]["code"]) == ("no-progress", "internal")


@pytest.mark.parametrize("error", [StoreUnavailable("away"), InvalidData("odd"), KeyError("oops")], ids=repr)
async def test_a_rollback_that_fails_is_tried_again_until_it_is_done(bench: Bench, error: Exception) -> None:
    task_id = await bench.begin()
    await bench.command(task_id, Command.ABORT)
    left = [error] * 3

    async def fail() -> None:
        if left:
            raise left.pop()

    runner = bench.runner(Counting(on_undo=fail))
    async with asyncio.timeout(30):
        while left:
            await runner.roll_back(task_id)
            assert (await bench.get(task_id)).worker is None, "nobody holds it between two attempts"
        while (await bench.get(task_id)).state is TaskState.ABORTING:
            await runner.roll_back(task_id)
    assert (await bench.get(task_id)).state is TaskState.ABORTED


async def test_a_rollback_that_takes_long_keeps_its_lease(bench: Bench) -> None:
    quick = Bench(bench.database, silent_store(bench.database, replace(STORE_POLICY, lease_seconds=0.4)), bench.account)
    task_id = await quick.begin()
    await quick.command(task_id, Command.ABORT)
    go_on = asyncio.Event()
    rolling_back = asyncio.create_task(quick.runner(Counting(on_undo=go_on.wait), lease_seconds=0.4).roll_back(task_id))
    await until(lambda: claimed(quick, task_id))
    first_lease = (await quick.get(task_id)).lease_until
    assert first_lease is not None

    async def beyond_it() -> bool:
        async with quick.database.connection() as connection:
            return bool(await connection.fetchval("SELECT now() > $1", first_lease))

    await until(beyond_it)
    assert await quick.store.claim_rollback(task_id, "another") is None
    go_on.set()
    await rolling_back
    task = await quick.get(task_id)
    assert (task.state, task.epoch) == (TaskState.ABORTED, 1)


async def claimed(bench: Bench, task_id: TaskId) -> bool:
    return (await bench.get(task_id)).worker is not None


async def test_a_rollback_that_hangs_is_given_back_before_the_broker_loses_patience(bench: Bench) -> None:
    task_id = await bench.begin()
    await bench.command(task_id, Command.ABORT)
    hangs = bench.runner(Counting(on_undo=asyncio.Event().wait), rollback_seconds=0.1)
    async with asyncio.timeout(30):
        await hangs.roll_back(task_id)
        while (await bench.get(task_id)).state is TaskState.ABORTING:
            await bench.runner(Counting()).roll_back(task_id)


async def test_a_worker_that_is_stopped_gives_its_rollback_back_at_once(bench: Bench) -> None:
    task_id = await bench.begin()
    await bench.command(task_id, Command.ABORT)
    rolling_back = asyncio.create_task(bench.runner(Counting(on_undo=asyncio.Event().wait)).roll_back(task_id))
    await until(lambda: claimed(bench, task_id))
    rolling_back.cancel()
    await asyncio.wait([rolling_back])
    assert rolling_back.cancelled()
    await bench.runner(Counting()).roll_back(task_id)
    assert (await bench.get(task_id)).state is TaskState.ABORTED


@asynccontextmanager
async def locked(bench: Bench) -> AsyncIterator[Callable[[], Awaitable[bool]]]:
    """All rows of tasks locked, and a way to see whether somebody waits for one."""
    async with bench.database.transaction() as connection:
        await connection.execute("SELECT FROM sluice.tasks FOR UPDATE")

        async def somebody_waits() -> bool:
            async with bench.database.connection() as other:
                return bool(await other.fetchval(SOMEBODY_WAITS))

        yield somebody_waits


@pytest.mark.parametrize("aborting", [False, True], ids=["run", "roll back"])
async def test_a_stop_in_the_middle_of_a_claim_leaves_the_task_to_the_next_worker(bench: Bench, aborting: bool) -> None:
    task_id = await bench.begin()
    if aborting:
        await bench.command(task_id, Command.ABORT)
    runner = bench.runner(Counting())
    async with locked(bench) as somebody_waits:
        working = asyncio.create_task((runner.roll_back if aborting else runner.run)(task_id))
        await until(somebody_waits)
        working.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([working])
    assert working.cancelled()
    task = await bench.get(task_id)
    assert (task.state, task.worker) == (TaskState.ABORTING if aborting else TaskState.QUEUED, None)
    assert task.epoch == 1, "it was claimed before the worker knew of the stop"


async def test_a_stop_while_an_error_is_written_down_does_not_keep_it_from_that(bench: Bench) -> None:
    task_id = await bench.begin()
    somebody_waits: asyncio.Future[Callable[[], Awaitable[bool]]] = asyncio.Future()
    async with AsyncExitStack() as lock:

        async def fail(_: int) -> None:
            somebody_waits.set_result(await lock.enter_async_context(locked(bench)))
            raise InvalidData("line 3")

        working = asyncio.create_task(bench.runner(Counting(before_batch=fail), lanes=1).run(task_id))
        await until(await somebody_waits)
        working.cancel()
        await asyncio.sleep(0)
    await asyncio.wait([working])
    task = await bench.get(task_id)
    assert (task.state, task.worker) == (TaskState.FAILED, None)


async def test_a_rate_that_is_raised_is_noticed_while_lanes_wait_for_the_old_one(bench: Bench) -> None:
    task_id = await bench.begin(max_bytes_per_second=1)
    runner = bench.runner(Counting(bytes_per_batch=1_000_000), lease_seconds=0.2)
    running = asyncio.create_task(runner.run(task_id))
    await until(lambda: has_rows(bench, task_id))
    async with bench.database.connection() as connection:
        await connection.execute("UPDATE sluice.tasks SET max_bytes_per_second = NULL")
    async with asyncio.timeout(30):
        await running
    assert (await bench.get(task_id)).state is TaskState.SUCCEEDED


async def has_rows(bench: Bench, task_id: TaskId) -> bool:
    return (await bench.get(task_id)).rows_done > 0


async def test_a_slice_ends_although_the_rate_would_have_it_wait_longer(bench: Bench) -> None:
    task_id = await bench.begin(max_bytes_per_second=1)
    async with asyncio.timeout(30):
        await bench.runner(Counting(bytes_per_batch=1_000_000), slice_seconds=0.2).run(task_id)
    task = await bench.get(task_id)
    assert task.state is TaskState.QUEUED
    assert task.rows_done == 1, "every claim makes progress, whatever the rate"


@pytest.mark.parametrize("command", [Command.PAUSE, Command.ABORT])
async def test_a_command_is_obeyed_while_lanes_wait_for_the_rate(bench: Bench, command: Command) -> None:
    task_id = await bench.begin(max_bytes_per_second=1)
    runner = bench.runner(Counting(bytes_per_batch=1_000_000), lease_seconds=0.2)
    running = asyncio.create_task(runner.run(task_id))
    await until(lambda: has_rows(bench, task_id))
    await bench.command(task_id, command)
    async with asyncio.timeout(30):
        await running
    assert (await bench.get(task_id)).state is (TaskState.PAUSED if command is Command.PAUSE else TaskState.ABORTING)
