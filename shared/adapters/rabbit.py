"""RabbitMQ through aio-pika: one declared topology, confirmed publishing, consumers that come back, replies.

Considerations
- A session is one connection with everything declared on it. When the connection, a channel or a consumer is lost the
  whole session is thrown away and made anew: exclusive queues get a new name each time, because the broker may still
  hold the old one for a connection that it believes alive.
- Handlers outlive sessions. A task that is being worked on goes on while the broker is away; its message comes back
  as redelivered, and whoever handles it recognises the task.
- A confirm that is lost says nothing about the message: it may be sent again. Consumers are idempotent.
- A message that no contract describes, or whose handler fails unexpectedly, is moved to the dead-letter queue with its
  reason, and never requeued. While that queue cannot take it, it is held, and the log says so.
- RabbitMQ (3.10) does not tell the consumers of a quorum queue that it was deleted if it is declared again within a
  moment: they never hear again. So a process that has been told waits before it declares anything.
- When no session can be made for `give_up_seconds`, `run` raises, and the process ends for its supervisor to restart.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import aio_pika
import aiormq
import orjson
import structlog
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from shared.adapters.rabbit_topology import declare_dead_queue, declare_topology
from shared.domain.errors import BusUnavailable, InvalidMessage
from shared.domain.messages import (
    COMMANDS_EXCHANGE,
    CONTROL_QUEUE,
    DEAD_QUEUE,
    CommandReply,
    ControlCommand,
    Message,
    decode,
)

log = structlog.get_logger()

# A header travels in one frame (128 KiB by default).
_REASON_CHARACTERS = 1000
_LONGEST_BURIAL_PAUSE_SECONDS = 30.0
_REPLY_TO = "amq.rabbitmq.reply-to"
_OTHERS_ARE_TOLD_SECONDS = 1.0
_LOST = (aiormq.exceptions.AMQPError, aio_pika.exceptions.AMQPException, OSError, TimeoutError, RuntimeError)


class Delivery:
    """A message that this process holds until `ack`."""

    def __init__(self, raw: AbstractIncomingMessage, queue: str) -> None:
        self._raw = raw
        self.queue = queue
        self.body = raw.body
        # How often it came back already. Quorum queues count it; any other says no more than that it did, and a first
        # delivery has the header that its sender made up.
        count = raw.headers.get("x-delivery-count")
        self.returns = count if raw.redelivered and isinstance(count, int) else int(bool(raw.redelivered))
        self.reply_to = raw.reply_to
        self.correlation_id = raw.correlation_id

    @property
    def is_held(self) -> bool:
        """False when it was acknowledged, or its session is gone and the broker has it back."""
        try:
            return not self._raw.processed and not self._raw.channel.is_closed
        except _LOST:
            return False

    async def ack(self) -> None:
        """Let the broker forget it; a repeat does nothing.

        If the session is gone the broker has it back already, and it will come again.
        """
        if self._raw.processed:
            return
        try:
            await self._raw.ack()
        except _LOST as error:
            log.info("a message could not be acknowledged and will come again", queue=self.queue, error=str(error))


Handler = Callable[[Delivery], Awaitable[None]]


@dataclass(slots=True)
class _Consumer:
    handler: Handler
    queue: str | None = None
    prefetch: int = 1
    exchange: str | None = None
    pattern: str = ""


@dataclass(slots=True)
class _Session:
    publishing: AbstractChannel
    asking: AbstractChannel
    exchanges: dict[str, aio_pika.abc.AbstractExchange]
    reply_exchange: aio_pika.abc.AbstractExchange
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    deleted: bool = False


class RabbitBus:
    """The bus: implements the ports `Publisher` and `Control`, and runs consumers.

    Register consumers first, then keep `run` going.
    """

    def __init__(self, url: str, *, name: str, confirm_seconds: float = 5.0, give_up_seconds: float = 120.0) -> None:
        self._url = url
        self._name = name
        self._confirm_seconds = confirm_seconds
        self._give_up_seconds = give_up_seconds
        self._consumers: list[_Consumer] = []
        self._session: _Session | None = None
        self._ready = asyncio.Event()
        self._waiting: dict[str, asyncio.Future[CommandReply]] = {}
        self._handlers: asyncio.TaskGroup | None = None
        self._handling: set[asyncio.Task[None]] = set()
        self._stopping = False

    # --- consuming

    def consume(self, queue: str, handler: Handler, *, prefetch: int) -> None:
        """Hand each message of a shared queue to `handler`, at most `prefetch` at a time; the handler acks."""
        self._consumers.append(_Consumer(handler, queue=queue, prefetch=prefetch))

    def subscribe(self, exchange: str, handler: Handler, *, pattern: str = "") -> None:
        """Hand each message of an exchange to `handler` through a queue that lives as long as the session."""
        self._consumers.append(_Consumer(handler, exchange=exchange, pattern=pattern, prefetch=200))

    async def probe(self) -> None:
        """Return when there is a session. Raises BusUnavailable."""
        if not self._ready.is_set():
            raise BusUnavailable("no session with RabbitMQ")

    async def run(self) -> None:
        """Keep a session until cancelled. Raises BusUnavailable when none could be made for `give_up_seconds`."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._handlers:
            away_since = loop.time()
            pause = 0.1
            while True:
                try:
                    async with self._open() as session:
                        _raise_if_cancelled()
                        pause = 0.1
                        try:
                            await session.lost.wait()
                        except asyncio.CancelledError:
                            # Handlers hand over what they hold while there is still a session to say so on.
                            await self._stop_handlers()
                            raise
                    away_since = loop.time()
                    log.warning("the broker session is lost; making a new one")
                    if session.deleted:
                        await asyncio.sleep(_OTHERS_ARE_TOLD_SECONDS)
                except _LOST as error:
                    _raise_if_cancelled()
                    if loop.time() - away_since > self._give_up_seconds:
                        raise BusUnavailable(
                            f"RabbitMQ could not be reached for {self._give_up_seconds:.0f} s"
                        ) from error
                    log.warning("no session with the broker yet", error=str(error) or type(error).__name__)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, 2.0)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[_Session]:
        connection = await aio_pika.connect(
            self._url, timeout=10, client_properties={"connection_name": f"sluice {self._name}"}
        )
        try:
            async with asyncio.timeout(30):
                session = await self._set_up(connection)
            self._session = session
            self._ready.set()
            log.info("broker session ready")
            yield session
        finally:
            self._ready.clear()
            self._session = None
            for waiting in self._waiting.values():
                if not waiting.done():
                    waiting.set_exception(BusUnavailable("RabbitMQ went away while the answer was awaited"))
            try:
                async with asyncio.timeout(5):
                    await connection.close()
            except _LOST as error:
                log.debug("the old connection was gone already", error=str(error))

    async def _set_up(self, connection: aio_pika.abc.AbstractConnection) -> _Session:
        publishing = await connection.channel(publisher_confirms=True, on_return_raises=True)
        exchanges = await declare_topology(publishing)
        asking = await connection.channel(publisher_confirms=True, on_return_raises=True)
        session = _Session(publishing, asking, exchanges, await asking.get_exchange(COMMANDS_EXCHANGE, ensure=False))

        def on_lost(*_: Any) -> None:
            session.lost.set()

        def on_cancel(*_: Any) -> None:
            session.deleted = True
            session.lost.set()

        connection.close_callbacks.add(on_lost)
        publishing.close_callbacks.add(on_lost)
        asking.close_callbacks.add(on_lost)
        replies = await asking.get_queue(_REPLY_TO, ensure=False)
        await replies.consume(self._on_reply, no_ack=True)
        for consumer in self._consumers:
            channel = await connection.channel()
            channel.close_callbacks.add(on_lost)
            (await channel.get_underlay_channel()).on_consumer_cancel_callbacks.add(on_cancel)
            await channel.set_qos(prefetch_count=consumer.prefetch)
            if consumer.queue is not None:
                queue = await channel.get_queue(consumer.queue)
            else:
                own_name = f"sluice.{self._name}.{socket.gethostname()}.{uuid4().hex[:12]}"
                queue = await channel.declare_queue(own_name, exclusive=True, auto_delete=True)
                await queue.bind(str(consumer.exchange), consumer.pattern)
            await queue.consume(self._receiver(consumer, queue.name))
        return session

    def _receiver(self, consumer: _Consumer, queue: str) -> Callable[[AbstractIncomingMessage], Awaitable[None]]:
        async def receive(raw: AbstractIncomingMessage) -> None:
            if self._stopping:
                return  # the broker gives it to another process when this session ends
            assert self._handlers is not None
            # In a task group of run(), not of the session: the handler outlives a broken connection.
            task = self._handlers.create_task(self._handle(consumer.handler, Delivery(raw, queue)))
            self._handling.add(task)
            task.add_done_callback(self._handling.discard)

        return receive

    async def _stop_handlers(self) -> None:
        self._stopping = True
        handling = list(self._handling)
        for task in handling:
            task.cancel()
        if handling:
            await asyncio.wait(handling)

    async def _handle(self, handler: Handler, delivery: Delivery) -> None:
        try:
            await handler(delivery)
        except InvalidMessage as error:
            await self._bury(delivery, error.detail)
        except Exception as error:
            # One message must not end the process and everything else that it does, nor come back to end the next one.
            log.error("a message could not be handled", queue=delivery.queue, exc_info=error)
            await self._bury(delivery, f"unexpected {type(error).__name__}: {error}"[:_REASON_CHARACTERS])

    async def _bury(self, delivery: Delivery, reason: str) -> None:
        buried = aio_pika.Message(
            delivery.body,
            content_type="application/octet-stream",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            headers={"x-reason": reason, "x-queue": delivery.queue},
            timestamp=datetime.now(UTC),
        )
        pause = 0.5
        while delivery.is_held:
            try:
                async with asyncio.timeout(self._confirm_seconds):
                    session = await self._current()
                    try:
                        await session.publishing.default_exchange.publish(buried, DEAD_QUEUE)
                    except aio_pika.exceptions.PublishError:
                        await declare_dead_queue(session.publishing)  # somebody has deleted it
                        continue
            except (*_LOST, BusUnavailable) as error:
                log.error(
                    "a message is held because the dead-letter queue does not take it",
                    queue=delivery.queue,
                    reason=reason,
                    error=str(error) or type(error).__name__,
                )
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_BURIAL_PAUSE_SECONDS)
            else:
                log.warning("message moved to the dead-letter queue", queue=delivery.queue, reason=reason)
                await delivery.ack()

    # --- publishing

    async def publish(self, exchange: str, routing_key: str, message: Message) -> None:
        await self.publish_json(exchange, routing_key, message.model_dump(mode="json"))

    async def publish_json(self, exchange: str, routing_key: str, body: dict[str, Any]) -> None:
        # A command that no queue takes is a fault; an event that nobody listens to is not.
        mandatory = exchange == COMMANDS_EXCHANGE
        try:
            async with asyncio.timeout(self._confirm_seconds):
                session = await self._current()
                await session.exchanges[exchange].publish(_encoded(body), routing_key, mandatory=mandatory)
        except _LOST as error:
            raise BusUnavailable(f"RabbitMQ did not confirm: {str(error) or 'timeout'}") from error

    async def ask(self, command: ControlCommand, *, timeout_seconds: float) -> CommandReply | None:
        correlation_id = uuid4().hex
        answer: asyncio.Future[CommandReply] = asyncio.get_running_loop().create_future()
        self._waiting[correlation_id] = answer
        message = _encoded(command.model_dump(mode="json"), reply_to=_REPLY_TO, correlation_id=correlation_id)
        try:
            try:
                async with asyncio.timeout(self._confirm_seconds):
                    session = await self._current()
                    await session.reply_exchange.publish(message, CONTROL_QUEUE, mandatory=True)
            except _LOST as error:
                raise BusUnavailable(f"RabbitMQ did not confirm: {str(error) or 'timeout'}") from error
            try:
                async with asyncio.timeout(timeout_seconds):
                    return await answer
            except (TimeoutError, BusUnavailable):
                return None
        finally:
            del self._waiting[correlation_id]
            answer.cancel()

    async def reply(self, delivery: Delivery, reply: CommandReply) -> None:
        """Answer a command, if its sender waits for an answer."""
        if delivery.reply_to is None:
            return
        message = _encoded(reply.model_dump(mode="json"), correlation_id=delivery.correlation_id)
        try:
            async with asyncio.timeout(self._confirm_seconds):
                session = await self._current()
                # Whoever waited may be gone by now: unroutable is fine.
                await session.publishing.default_exchange.publish(message, delivery.reply_to, mandatory=False)
        except _LOST as error:
            log.info("the answer to a command could not be sent", error=str(error))

    async def ready_messages(self, queue: str) -> int:
        """Messages that wait in `queue` for a consumer. Raises BusUnavailable."""
        try:
            async with asyncio.timeout(self._confirm_seconds):
                session = await self._current()
                declared = await session.asking.declare_queue(queue, passive=True)
                return declared.declaration_result.message_count or 0
        except _LOST as error:
            raise BusUnavailable(f"RabbitMQ did not answer: {error}") from error

    async def _current(self) -> _Session:
        if self._session is None:
            async with asyncio.timeout(1.0):
                await self._ready.wait()
        assert self._session is not None
        return self._session

    async def _on_reply(self, raw: AbstractIncomingMessage) -> None:
        waiting = self._waiting.get(raw.correlation_id or "")
        if waiting is not None and not waiting.done():
            waiting.set_result(decode(raw.body, CommandReply))


def _raise_if_cancelled() -> None:
    # aio-pika connects under `asyncio.wait_for`, which before Python 3.12 forgets a cancel that comes just as the
    # connection is made (python/cpython#86296); aiormq may answer one with an error of its own.
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _encoded(
    body: dict[str, Any], *, reply_to: str | None = None, correlation_id: str | None = None
) -> aio_pika.Message:
    kind = str(body["type"])
    # `type` first and indented: people read these in the management console.
    text = orjson.dumps({"type": kind, **body}, option=orjson.OPT_INDENT_2)
    return aio_pika.Message(
        text,
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=str(body["message_id"]),
        type=kind,
        app_id="sluice",
        timestamp=datetime.now(UTC),
        headers={"version": body["version"]},
        reply_to=reply_to,
        correlation_id=correlation_id,
    )
