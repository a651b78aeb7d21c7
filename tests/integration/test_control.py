"""The control service as a process: what it answers, what it tells, and commands that race the work."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable

import aio_pika
import orjson
import pytest

from shared.domain.messages import EVENTS_EXCHANGE, PauseTask
from shared.domain.task import Command, Event, TaskId, TaskState, allowed_commands, answer
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene
from tests.tasks import assert_loaded, numbered_csv, silent_store, start, task_in, until

ROWS = 1000
CSV = numbered_csv(ROWS)


@pytest.fixture
async def scene(environment: dict[str, str]) -> AsyncIterator[Scene]:
    async with open_scene(environment) as scene:
        yield scene


async def side_by_side(count: int, attempt: Callable[[int], Awaitable[None]], *, lanes: int = 4) -> None:
    """Make `count` attempts, `lanes` at a time."""
    room = asyncio.Semaphore(lanes)

    async def one(number: int) -> None:
        async with room:
            await attempt(number)

    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))


async def assert_as_if_never_run(scene: Scene, task_id: TaskId, dataset: str) -> None:
    assert await scene.leftovers(task_id) == {}
    assert await scene.value("SELECT count(*) FROM sluice.datasets WHERE name = $1", dataset) == 0
    assert await scene.value("SELECT count(*) FROM pg_class WHERE relname = $1", dataset) == 0


# --- answers


async def test_every_command_in_every_state_is_answered_from_the_truth(services: Stack, scene: Scene) -> None:
    await start(services, workers=0)
    store = silent_store(scene.database)
    stranger = await scene.another_account()
    for command in Command:
        for state in TaskState:
            task = await task_in(store, scene.account_id, state)
            refused = await stranger.command(task.task_id, command)
            assert (refused.status, refused.state, refused.allowed) == (404, None, [])
            reply = await scene.command(task.task_id, command)
            expected = answer(state, command)
            assert (reply.status, reply.state) == (expected.status, expected.state), (state, command)
            assert reply.allowed == allowed_commands(expected.state)
            found = await store.get(task.task_id)
            assert found is not None
            assert found.state is expected.state
    assert (await scene.command(TaskId(10**9), Command.ABORT)).status == 404


async def test_a_command_that_the_broker_sends_again_does_not_undo_what_came_after_it(
    services: Stack, scene: Scene
) -> None:
    await start(services, control=2, workers=0)
    task_id = await scene.begin(CSV)
    pause = PauseTask(task_id=task_id)
    replies = [await scene.bus.ask(pause, timeout_seconds=60)]
    assert (await scene.command(task_id, Command.RESUME)).status == 202
    replies += [await scene.bus.ask(pause, timeout_seconds=60) for _ in range(4)]
    assert [(reply.status, reply.state) for reply in replies if reply] == [
        (200, TaskState.PAUSED),
        *[(200, TaskState.QUEUED)] * 4,
    ]
    assert [event for event, _ in await scene.events(task_id)] == ["TaskQueued", "TaskPaused", "TaskResumed"]


async def test_every_step_is_announced_once_and_in_the_words_of_the_audit_trail(
    services: Stack, scene: Scene, amqp_url: str
) -> None:
    await start(services)
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(EVENTS_EXCHANGE, "task.import.#")
        paused = await scene.begin(CSV, "one", max_bytes_per_second=20_000)
        await scene.until(paused, TaskState.RUNNING)
        await scene.command(paused, Command.PAUSE)
        await scene.until(paused, TaskState.PAUSED)
        await scene.command(paused, Command.RESUME)
        await scene.abort(paused)
        await scene.fail(b"a,b\n1,2\n3\n", "two")
        await scene.succeed(CSV, "three")
        await until(lambda: scene.value("SELECT count(*) = 0 FROM sluice.outbox"))
        rows = await scene.fetch("SELECT event, task_id, to_state, epoch, actor FROM sluice.task_events")
        written = sorted(str(tuple(row.values())) for row in rows)
        told: list[str] = []
        async with asyncio.timeout(30):
            while len(told) < len(written):
                raw = await queue.get(fail=False)
                if raw is None:
                    await asyncio.sleep(0.02)
                    continue
                body = orjson.loads(raw.body)
                assert raw.routing_key == f"task.import.{Event(body['type']).routing_word}"
                told.append(str(tuple(body[key] for key in ("type", "task_id", "state", "epoch", "actor"))))
        assert sorted(told) == written
        assert await queue.get(fail=False) is None


# --- races with the work


async def test_a_pause_that_races_the_last_batch_ends_paused_or_succeeded_and_never_loses_a_row(
    services: Stack, scene: Scene
) -> None:
    await start(services, workers=2)
    outcomes: set[tuple[int, TaskState]] = set()

    async def attempt(number: int) -> None:
        task_id = await scene.begin(CSV, f"data{number}")
        if number % 3 == 0:
            await scene.when(task_id, lambda task: task.rows_done > 0)
        await asyncio.sleep(random.uniform(0, 0.1))
        reply = await scene.command(task_id, Command.PAUSE)
        task = await scene.until(task_id, TaskState.PAUSED, TaskState.SUCCEEDED)
        outcomes.add((reply.status, task.state))
        assert reply.status != 409 or task.state is TaskState.SUCCEEDED
        if task.state is TaskState.PAUSED:
            assert (task.worker, task.lease_until) == (None, None)
            assert (await scene.command(task_id, Command.RESUME)).status == 202
            await scene.until(task_id, TaskState.SUCCEEDED)
        await assert_loaded(scene, f"data{number}", ROWS)

    await side_by_side(30, attempt)
    assert len(outcomes) > 1, "the delays do not reach the race"


async def test_an_abort_that_races_the_publication_ends_with_nothing_or_with_everything(
    services: Stack, scene: Scene
) -> None:
    await start(services, workers=2)
    outcomes: set[tuple[int, TaskState]] = set()

    async def attempt(number: int) -> None:
        task_id = await scene.begin(CSV, f"data{number}")
        if number % 3:
            await scene.when(task_id, lambda task: task.rows_done >= ROWS * (number % 3) // 2)
        await asyncio.sleep(random.uniform(0, 0.02))
        reply = await scene.command(task_id, Command.ABORT)
        task = await scene.until(task_id, TaskState.ABORTED, TaskState.SUCCEEDED)
        outcomes.add((reply.status, task.state))
        if reply.status == 409:
            assert task.state is TaskState.SUCCEEDED
            await assert_loaded(scene, f"data{number}", ROWS)
        else:
            assert (reply.status, task.state) == (202, TaskState.ABORTED)
            await assert_as_if_never_run(scene, task_id, f"data{number}")

    await side_by_side(30, attempt)
    assert {(202, TaskState.ABORTED)} <= outcomes


async def test_resumes_at_once_are_one_resume(services: Stack, scene: Scene) -> None:
    await start(services, control=2, workers=2)
    task_id = await scene.begin(CSV, max_bytes_per_second=20_000)
    await scene.until(task_id, TaskState.RUNNING)
    await scene.command(task_id, Command.PAUSE)
    await scene.until(task_id, TaskState.PAUSED)
    replies = await asyncio.gather(*(scene.command(task_id, Command.RESUME) for _ in range(10)))
    assert sorted(reply.status for reply in replies) == [200] * 9 + [202]
    await scene.until(task_id, TaskState.SUCCEEDED)
    events = [event for event, _ in await scene.events(task_id)]
    assert events.count("TaskResumed") == 1
    assert events.count("TaskStarted") == 2
    await assert_loaded(scene, "data", ROWS)


@pytest.mark.parametrize("finally_", [Command.RESUME, Command.ABORT])
async def test_a_storm_of_commands_ends_as_the_last_one_says(services: Stack, scene: Scene, finally_: Command) -> None:
    await start(services, control=2, workers=2)
    task_id = await scene.begin(numbered_csv(5000), max_bytes_per_second=60_000)

    async def commander() -> None:
        for _ in range(25):
            await scene.command(task_id, random.choice([Command.PAUSE, Command.RESUME]))
            await asyncio.sleep(random.uniform(0, 0.05))

    await asyncio.gather(*(commander() for _ in range(3)))
    # A pause that comes just before may still be on its way to `paused`; a resume after it ends that too.
    if finally_ is Command.ABORT:
        assert (await scene.command(task_id, finally_)).status == 202
        await scene.until(task_id, TaskState.ABORTED)
        await assert_as_if_never_run(scene, task_id, "data")
        return
    await scene.command(task_id, finally_)
    await scene.until(task_id, TaskState.SUCCEEDED)
    await assert_loaded(scene, "data", 5000)


# --- time


async def test_what_stays_paused_or_failed_too_long_is_aborted_with_nothing_left(services: Stack, scene: Scene) -> None:
    await start(services, paused_expiry_seconds=0.5, failed_expiry_seconds=0.5)
    paused = await scene.begin(CSV, "one", max_bytes_per_second=20_000)
    await scene.when(paused, lambda task: task.rows_done > 0)
    await scene.command(paused, Command.PAUSE)
    failed = await scene.begin(b"n\n" + b"1\n" * 5000 + b"x\n", "two", csv={"columns": {"n": "bigint"}})
    for task_id, dataset, was in ((paused, "one", "TaskPaused"), (failed, "two", "TaskFailed")):
        await scene.until(task_id, TaskState.ABORTED)
        events = [event for event, _ in await scene.events(task_id)]
        assert events[-3:] == [was, "TaskExpired", "TaskAborted"]
        await assert_as_if_never_run(scene, task_id, dataset)
