"""What a process still does on the bus while it stops."""

import asyncio
from collections.abc import Callable

import pytest
import yarl

from shared.adapters.postgres import PgDatabase
from shared.adapters.rabbit import Delivery, RabbitBus
from shared.config import Settings
from shared.controls import Controls
from shared.domain.errors import BusUnavailable
from shared.domain.messages import COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask, decode
from shared.domain.task import TaskId
from shared.runner import Runner, RunnerPolicy
from shared.worker import Turns
from tests.faults.tap import Tap
from tests.tasks import open_database, silent_store, until


async def test_a_stopping_process_hands_over_on_its_session_and_takes_nothing_new(settings: Settings) -> None:
    bus = RabbitBus(settings.amqp_url, name="stopping")
    taken: list[TaskId] = []
    begun, handed_over = asyncio.Event(), asyncio.Event()

    async def hand_over_when_cancelled(delivery: Delivery) -> None:
        taken.append(decode(delivery.body, RunTask).task_id)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            # Confirmed by the broker, which by then has sent it to the only consumer that there is: this one.
            await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(2)))
            await delivery.ack()
            handed_over.set()

    bus.consume(IMPORT_QUEUE, hand_over_when_cancelled, prefetch=2)
    running = asyncio.create_task(bus.run())
    try:
        await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)))
        await begun.wait()
    finally:
        running.cancel()
        await asyncio.wait([running])
    assert handed_over.is_set()
    assert taken == [1]

    successor = RabbitBus(settings.amqp_url, name="successor")
    found: asyncio.Queue[TaskId] = asyncio.Queue()

    async def take(delivery: Delivery) -> None:
        await delivery.ack()
        found.put_nowait(decode(delivery.body, RunTask).task_id)

    successor.consume(IMPORT_QUEUE, take, prefetch=2)
    async with asyncio.TaskGroup() as group:
        working = group.create_task(successor.run())
        assert await found.get() == 2
        working.cancel()


@pytest.mark.parametrize("answer", range(1, 7))
async def test_a_process_that_is_stopped_while_it_makes_its_session_stops(settings: Settings, answer: int) -> None:
    url = yarl.URL(settings.amqp_url)
    async with Tap(url.port or 0) as tap:
        tapped = str(url.with_host("127.0.0.1").with_port(int(tap.address.rpartition(":")[2])))
        # Turns of the loop after an answer of the broker: one of them is between a step and whoever waits for it.
        for turns in range(1, 10):
            running = asyncio.create_task(RabbitBus(tapped, name="stopped at once").run())
            answers = 0

            async def stop_then(
                _: int, chunk: bytes, running: asyncio.Task[None] = running, turns: int = turns
            ) -> bytes:
                nonlocal answers
                answers += 1
                if answers == answer:
                    asyncio.get_running_loop().call_soon(_after, turns, running.cancel)
                return chunk

            tap.reset()
            tap.down = stop_then
            _, waiting = await asyncio.wait([running], timeout=10)
            assert not waiting, f"not stopped when cancelled {turns} turns after answer {answer}"


def _after(turns: int, call: Callable[[], object]) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(_after, turns - 1, call)
    else:
        call()


async def test_a_message_that_a_stopping_worker_could_not_begin_on_comes_to_another(settings: Settings) -> None:
    nowhere = settings.postgres_dsn.replace(settings.postgres_dsn.rpartition("/")[0], "postgresql://x:x@127.0.0.1:1")
    bus = RabbitBus(settings.amqp_url, name="stopping")
    async with open_database(nowhere) as away:
        turns = Turns(runner(away).run)
        tried = asyncio.Event()

        async def on_run(delivery: Delivery) -> None:
            tried.set()
            await turns.take(decode(delivery.body, RunTask), delivery)

        bus.consume(IMPORT_QUEUE, on_run, prefetch=2)
        running = asyncio.create_task(bus.run())
        try:
            await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)))
            await tried.wait()
        finally:
            running.cancel()
            await asyncio.wait([running])

    successor = RabbitBus(settings.amqp_url, name="successor")
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        working = group.create_task(successor.run())

        async def is_back() -> bool:
            try:
                return await successor.ready_messages(IMPORT_QUEUE) == 1
            except BusUnavailable:  # no session yet
                return False

        await until(is_back)
        working.cancel()


def runner(database: PgDatabase) -> Runner:
    policy = RunnerPolicy(lanes=1, slice_seconds=60, lease_seconds=60, retry_backoff_seconds=60)
    return Runner(
        worker="w", store=silent_store(database), database=database, kinds={}, controls=Controls(), policy=policy
    )
