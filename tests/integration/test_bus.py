"""The bus under bad messages, lost and doubled ones, and an operator at the management console."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import aio_pika
import orjson
import pytest
from structlog.testing import capture_logs

from shared.adapters.rabbit import Delivery, RabbitBus
from shared.adapters.rabbit_topology import QUEUES
from shared.domain.errors import BusUnavailable
from shared.domain.messages import (
    BROADCAST_EXCHANGE,
    COMMANDS_EXCHANGE,
    CONTROL_QUEUE,
    DEAD_QUEUE,
    EVENTS_EXCHANGE,
    IMPORT_QUEUE,
    AbortTask,
    CommandReply,
    PauseTask,
    RollBackTask,
    RunTask,
    decode,
    rollback_queue,
)
from shared.domain.task import Command, Epoch, TaskId, TaskState
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene
from tests.tasks import Console, assert_loaded, numbered_csv, open_console, start, until

ROLLBACK_QUEUE = rollback_queue(IMPORT_QUEUE)
FAR = 2**63

# What a queue may find, and what its dead letter must say.
POISON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "body: Invalid JSON"),
    "not text": (b"\x00\xff\xfe", "body: Invalid JSON"),
    "half": (b'{"type": "RunTask", "task_id": 1', "body: Invalid JSON"),
    "nested": (b"[" * 50_000, "body: Invalid JSON"),
    "a list": (b"[]", "body: "),
    "unknown": (b'{"type": "RunTaks", "task_id": 1}', "unknown or misplaced"),
    "misplaced": (b'{"type": "CommandReply", "task_id": 1, "status": 200, "state": null}', "unknown or misplaced"),
    "no task": (b'{"type": "{type}"}', "task_id: Field required"),
    "another version": (b'{"type": "{type}", "task_id": 1, "version": 2}', "version: "),
    "unknown field": (b'{"type": "{type}", "task_id": 1, "tsak": 2}', "tsak: "),
    "long field": (b'{"type": "{type}", "task_id": 1, "' + b"x" * 300_000 + b'": 2}', "xxx"),
    "huge": (b'{"type": "{type}", "task_id": "' + b"1" * 2_000_000 + b'"}', "task_id: "),
    "beyond bigint": (b'{"type": "{type}", "task_id": 9223372036854775808}', "task_id: "),
}
TYPES = {CONTROL_QUEUE: "PauseTask", IMPORT_QUEUE: "RunTask", ROLLBACK_QUEUE: "RollBackTask"}


@pytest.fixture
async def scene(environment: dict[str, str]) -> AsyncIterator[Scene]:
    async with open_scene(environment) as scene:
        yield scene


@pytest.fixture
async def console(environment: dict[str, str]) -> AsyncIterator[Console]:
    async with open_console(environment) as console:
        yield console


def reason(letter: dict[str, Any]) -> str:
    return str(letter["properties"]["headers"]["x-reason"])


async def test_bad_messages_end_in_the_dead_queue_and_the_services_go_on(
    services: Stack, scene: Scene, console: Console
) -> None:
    processes = await start(services)
    expected: dict[bytes, list[tuple[str, str]]] = {}
    for queue, kind in TYPES.items():
        for body, says in POISON.values():
            typed = body.replace(b"{type}", kind.encode())
            expected.setdefault(typed, []).append((queue, says))
            assert await console.publish(COMMANDS_EXCHANGE, queue, typed)
    letters = await console.dead(sum(len(found) for found in expected.values()))
    for letter in letters:
        headers = letter["properties"]["headers"]
        body = base64.b64decode(letter["payload"])
        assert any(queue == headers["x-queue"] and says in reason(letter) for queue, says in expected[body])
        assert len(reason(letter)) < 2000
    assert sorted(letter["properties"]["headers"]["x-queue"] for letter in letters) == sorted(
        queue for found in expected.values() for queue, _ in found
    )
    await console.publish(BROADCAST_EXCHANGE, "", b"nonsense")
    await console.dead(1)
    await console.publish(EVENTS_EXCHANGE, "task.import.queued", b"nonsense")
    await scene.succeed(numbered_csv(100))
    assert all(service.process.is_running() for service in processes)


async def test_a_valid_command_written_by_hand_is_carried_out(services: Stack, scene: Scene, console: Console) -> None:
    await start(services, workers=0)
    task_id = await scene.begin(numbered_csv(10))
    assert await console.publish(COMMANDS_EXCHANGE, CONTROL_QUEUE, {"type": "PauseTask", "task_id": task_id})
    await scene.until(task_id, TaskState.PAUSED)
    # A task that does not exist, and another account's, change nothing and are no dead letters.
    for wrong in ({"task_id": 10**9}, {"task_id": task_id, "account_id": 10**9}):
        await console.publish(COMMANDS_EXCHANGE, CONTROL_QUEUE, {"type": "AbortTask", **wrong})
    by_hand = {"type": "ResumeTask", "task_id": str(task_id), "actor": "night shift", "reason": "it is time"}
    await console.publish("", CONTROL_QUEUE, by_hand, properties={"content_type": "text/plain", "reply_to": "nobody"})
    await scene.until(task_id, TaskState.QUEUED)
    row = (await scene.fetch("SELECT actor, reason FROM sluice.task_events ORDER BY event_id DESC LIMIT 1"))[0]
    assert tuple(row.values()) == ("night shift", "it is time")
    assert (await scene.command(task_id, Command.PAUSE)).status == 200


async def test_a_command_waits_in_its_queue_for_a_control_service(services: Stack, scene: Scene) -> None:
    task_id = await scene.begin(numbered_csv(10))
    await started_topology(scene)
    assert await scene.bus.ask(PauseTask(task_id=task_id), timeout_seconds=0.1) is None
    await start(services, workers=0)
    await scene.until(task_id, TaskState.PAUSED)


async def started_topology(scene: Scene) -> None:
    """The first session declares the queues; before it nothing could be asked."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await scene.bus.probe()
            except BusUnavailable:
                await asyncio.sleep(0.02)


async def test_lost_hints_are_noticed_and_sent_again(services: Stack, scene: Scene, console: Console) -> None:
    await start(services, workers=0)
    to_run = await scene.begin(numbered_csv(100))
    to_abort = await scene.begin(numbered_csv(100), "other")
    await scene.command(to_abort, Command.ABORT)
    for queue in (IMPORT_QUEUE, ROLLBACK_QUEUE):
        await console.purge(queue)
    services.spawn("upload-worker")
    task = await scene.until(to_run, TaskState.SUCCEEDED)
    await scene.until(to_abort, TaskState.ABORTED)
    assert task.claims == 1
    await assert_loaded(scene, "data", 100)


async def test_doubled_hints_make_one_load(services: Stack, scene: Scene, console: Console) -> None:
    await start(services, workers=2)
    task_id = await scene.begin(numbered_csv(4000), max_bytes_per_second=200_000)
    for message in (RunTask(task_id=task_id), RunTask(task_id=task_id, epoch=Epoch(0)), RollBackTask(task_id=task_id)):
        queue = ROLLBACK_QUEUE if isinstance(message, RollBackTask) else IMPORT_QUEUE
        for _ in range(10):
            await console.publish(COMMANDS_EXCHANGE, queue, message.model_dump(mode="json"))
    task = await scene.until(task_id, TaskState.SUCCEEDED)
    assert task.claims == 1
    await assert_loaded(scene, "data", 4000)


async def test_a_queue_that_an_operator_deleted_comes_back(services: Stack, scene: Scene, console: Console) -> None:
    await start(services)
    for queue in (IMPORT_QUEUE, CONTROL_QUEUE):
        await console.delete(queue)
    task_id = await scene.begin(numbered_csv(100))
    await scene.until(task_id, TaskState.SUCCEEDED)
    async with asyncio.timeout(30):
        while True:
            try:
                reply = await scene.bus.ask(AbortTask(task_id=task_id), timeout_seconds=5)
            except BusUnavailable:
                await asyncio.sleep(0.05)
                continue
            if reply is None:  # it came while the queue was being made again; the command is idempotent
                continue
            assert reply.status == 409
            return


# --- the bus alone


@pytest.fixture
async def bus(amqp_url: str) -> AsyncIterator[RabbitBus]:
    """A bus whose consumers on all queues take only hints, and fail on task 13."""
    bus = RabbitBus(amqp_url, name="test")
    handled: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    async def handle(delivery: Delivery) -> None:
        message = decode(delivery.body, RunTask)
        if message.task_id == 13:
            raise LookupError("y" * 5_000)
        handled.put_nowait((delivery.queue, message.task_id))
        await delivery.ack()

    for queue in QUEUES:
        bus.consume(queue, handle, prefetch=2)
    bus.handled = handled  # type: ignore[attr-defined]
    running = asyncio.create_task(bus.run())
    yield bus
    assert not running.done(), "no message ends the bus"
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.parametrize("queue", QUEUES)
async def test_no_message_ends_a_consumer(bus: RabbitBus, console: Console, queue: str) -> None:
    await bus.publish(COMMANDS_EXCHANGE, queue, RunTask(task_id=TaskId(1)))
    bad = [body.replace(b"{type}", b"RunTask") for body, _ in POISON.values()]
    bad.append(orjson.dumps({"type": "RunTask", "task_id": 13}))
    for body in bad:
        assert await console.publish(COMMANDS_EXCHANGE, queue, body)
    letters = await console.dead(len(bad))
    assert {letter["properties"]["headers"]["x-queue"] for letter in letters} == {queue}
    assert sum("unexpected LookupError: yyy" in reason(letter) for letter in letters) == 1
    await bus.publish(COMMANDS_EXCHANGE, queue, RunTask(task_id=TaskId(2)))
    async with asyncio.timeout(30):
        assert [await bus.handled.get() for _ in range(2)] == [(queue, 1), (queue, 2)]  # type: ignore[attr-defined]


async def test_a_message_is_buried_although_somebody_has_deleted_the_dead_letter_queue(
    bus: RabbitBus, console: Console
) -> None:
    await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)))
    await bus.handled.get()  # type: ignore[attr-defined]
    await console.delete(DEAD_QUEUE)
    await console.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, b"nonsense")

    letters: list[dict[str, Any]] = []

    async def is_back() -> bool:
        try:
            letters.extend(await console.take(DEAD_QUEUE))
        except AssertionError:  # no such queue
            return False
        return bool(letters)

    await until(is_back)
    [letter] = letters
    assert base64.b64decode(letter["payload"]) == b"nonsense"


async def test_a_message_that_the_dead_letter_queue_does_not_take_is_held_visibly_until_it_does(
    bus: RabbitBus, console: Console
) -> None:
    await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)))
    await bus.handled.get()  # type: ignore[attr-defined]
    await console.limit(DEAD_QUEUE, 0)
    with capture_logs() as logs:
        sent = 0

        async def one_is_held() -> bool:
            nonlocal sent
            sent += 1
            await console.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, b"%d" % sent)
            return any("is held" in str(entry["event"]) for entry in logs)

        await until(one_is_held)
    await console.limit(DEAD_QUEUE, 1000)
    letters = await console.dead(sent)
    assert {int(base64.b64decode(letter["payload"])) for letter in letters} == set(range(1, sent + 1))


async def test_a_count_of_returns_that_the_sender_made_up_does_not_stop_a_message(
    bus: RabbitBus, console: Console
) -> None:
    body = RunTask(task_id=TaskId(1)).model_dump(mode="json")
    for count in (7, "many"):
        await console.publish(
            COMMANDS_EXCHANGE, IMPORT_QUEUE, body, properties={"headers": {"x-delivery-count": count}}
        )
        async with asyncio.timeout(30):
            await bus.handled.get()  # type: ignore[attr-defined]


async def test_messages_can_be_read_by_a_person(bus: RabbitBus, console: Console, amqp_url: str) -> None:
    await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)))
    connection = await aio_pika.connect(amqp_url)
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(EVENTS_EXCHANGE, "#")
        message = RunTask(task_id=TaskId(5))
        await bus.publish(EVENTS_EXCHANGE, "task.import.queued", message)
        async with asyncio.timeout(30), queue.iterator() as messages:
            raw = await anext(messages)
        assert raw.body.startswith(b'{\n  "type": "RunTask",\n')
        assert (raw.content_type, raw.type, raw.message_id) == ("application/json", "RunTask", str(message.message_id))
        assert raw.headers == {"version": 1}
        assert raw.timestamp is not None
        assert raw.delivery_mode is aio_pika.DeliveryMode.PERSISTENT


async def test_an_event_that_nobody_hears_is_no_fault_but_a_command_that_no_queue_takes_is(bus: RabbitBus) -> None:
    await bus.publish(EVENTS_EXCHANGE, "task.import.queued", RunTask(task_id=TaskId(1)))
    with pytest.raises(BusUnavailable):
        await bus.publish(COMMANDS_EXCHANGE, "no.such.queue", RunTask(task_id=TaskId(1)))
    await bus.publish(COMMANDS_EXCHANGE, IMPORT_QUEUE, RunTask(task_id=TaskId(1)))


async def test_answers_find_the_one_who_asked(amqp_url: str) -> None:
    answering = RabbitBus(amqp_url, name="answering")

    async def answer(delivery: Delivery) -> None:
        message = decode(delivery.body, PauseTask, AbortTask)
        await answering.reply(delivery, CommandReply(task_id=message.task_id, status=200, state=None))
        await delivery.ack()

    answering.consume(CONTROL_QUEUE, answer, prefetch=50)
    asking = [RabbitBus(amqp_url, name=f"asking {n}") for n in range(3)]
    running = [asyncio.create_task(bus.run()) for bus in [answering, *asking]]
    replies = await asyncio.gather(
        *(asking[n % 3].ask(PauseTask(task_id=TaskId(n)), timeout_seconds=30) for n in range(1, 100))
    )
    assert [reply.task_id for reply in replies if reply] == list(range(1, 100))
    for task in running:
        task.cancel()
    await asyncio.wait(running)
