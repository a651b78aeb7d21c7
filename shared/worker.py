"""The skeleton of a worker service: it consumes a work queue and its rollback queue, and runs tasks of its kinds."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import structlog

from shared.adapters.migrations import migrate
from shared.adapters.objects import S3ObjectStore
from shared.adapters.outbox import PgOutbox
from shared.adapters.postgres import PgDatabase
from shared.adapters.rabbit import Delivery, RabbitBus
from shared.adapters.task_store import PgTaskStore
from shared.adapters.task_transitions import StorePolicy
from shared.config import Settings
from shared.controls import Controls
from shared.domain.messages import BROADCAST_EXCHANGE, RollBackTask, RunTask, TaskEvent, decode, rollback_queue
from shared.domain.task import Epoch, Kind, TaskId
from shared.ports.database import Database
from shared.ports.kinds import TaskKind
from shared.ports.objects import ObjectStore
from shared.runner import Runner, RunnerPolicy
from shared.service import run_service, serve_health

log = structlog.get_logger()

# Rollbacks side by side in one worker; each is short and holds little.
ROLLBACK_SLOTS = 4


@dataclass(frozen=True, slots=True)
class Tools:
    """What a worker gives to its kinds of task."""

    settings: Settings
    database: Database
    objects: ObjectStore


def run_worker(name: str, queue: str, kinds: Callable[[Tools], Mapping[Kind, TaskKind]]) -> None:
    """Be a worker process until told to stop."""
    # Read when Arrow is loaded, which is when a task needs it. Its own allocator keeps more of what was freed.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

    async def body(settings: Settings) -> None:
        await _work(name, queue, kinds, settings)

    run_service(name, body)


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    deliveries: int = 0


class Turns:
    """Deliveries about the same task are handled one after the other; the row says what the second one finds."""

    def __init__(self, handle: Callable[..., Awaitable[None]]) -> None:
        self._handle = handle
        self._busy: dict[TaskId, _Turn] = {}

    async def take(self, message: RunTask | RollBackTask, delivery: Delivery) -> None:
        """Handle the message, then acknowledge it: by then the row says where the task stands.

        Cancelled, it is not: a task that was given back tells of itself, and one that was never claimed would not.
        """
        turn = self._busy.setdefault(message.task_id, _Turn())
        turn.deliveries += 1
        steal_from: Epoch | None = None
        # When this process has the task itself, a message that comes back tells of a lost session, not a lost worker.
        if delivery.returns and message.epoch is not None and turn.deliveries == 1:
            # Each time it came back a worker was lost, and with each one claim more.
            steal_from = Epoch(message.epoch + delivery.returns - 1)
        try:
            async with turn.lock:
                await self._handle(message.task_id, steal_from=steal_from)
        finally:
            # By count, not by the lock: between a release and the next turn it is free, and would be forgotten.
            turn.deliveries -= 1
            if not turn.deliveries:
                del self._busy[message.task_id]
        await delivery.ack()


def store_policy(settings: Settings) -> StorePolicy:
    return StorePolicy(
        lease_seconds=settings.lease_seconds,
        max_attempts=settings.max_attempts,
        paused_expiry_seconds=settings.paused_expiry_seconds,
        failed_expiry_seconds=settings.failed_expiry_seconds,
    )


async def _work(name: str, queue: str, kinds: Callable[[Tools], Mapping[Kind, TaskKind]], settings: Settings) -> None:
    worker = f"{name}@{socket.gethostname()}:{os.getpid()}"
    async with AsyncExitStack() as opened:
        await migrate(settings.postgres_dsn)
        connections = settings.slots * (settings.lanes + 2) + ROLLBACK_SLOTS * 2 + 2
        database = PgDatabase(settings.postgres_dsn, size=connections, name=worker)
        await database.open()
        opened.push_async_callback(database.close)
        objects = S3ObjectStore(settings)
        opened.push_async_callback(objects.aclose)
        await objects.ensure_bucket()
        bus = RabbitBus(settings.amqp_url, name=name)
        controls = Controls()
        runner = Runner(
            worker=worker,
            store=PgTaskStore(database, PgOutbox(bus), store_policy(settings)),
            database=database,
            kinds=kinds(Tools(settings, database, objects)),
            controls=controls,
            policy=RunnerPolicy(
                lanes=settings.lanes,
                slice_seconds=settings.slice_seconds,
                lease_seconds=settings.lease_seconds,
                retry_backoff_seconds=settings.retry_backoff_seconds,
            ),
        )
        runs, rollbacks = Turns(runner.run), Turns(runner.roll_back)

        async def on_run(delivery: Delivery) -> None:
            await runs.take(decode(delivery.body, RunTask), delivery)

        async def on_roll_back(delivery: Delivery) -> None:
            await rollbacks.take(decode(delivery.body, RollBackTask), delivery)

        async def on_broadcast(delivery: Delivery) -> None:
            controls.heard(decode(delivery.body, TaskEvent))
            await delivery.ack()

        bus.subscribe(BROADCAST_EXCHANGE, on_broadcast)
        bus.consume(rollback_queue(queue), on_roll_back, prefetch=ROLLBACK_SLOTS)
        bus.consume(queue, on_run, prefetch=settings.slots)

        checks = {"postgres": database.probe, "rabbitmq": bus.probe, "object_store": objects.probe}
        health = await serve_health(settings, checks)
        if health is not None:
            opened.push_async_callback(health.cleanup)
        log.info("ready", worker=worker, slots=settings.slots, lanes=settings.lanes)
        await bus.run()
