"""The control service: applies commands, relays the outbox, notices lost workers, expires tasks, sweeps orphans."""

import asyncio
from contextlib import AsyncExitStack

import structlog

from control_service.commands import CommandHandler
from control_service.duties import every
from control_service.reaper import Reaper
from control_service.sealer import Sealer
from control_service.sweeper import Sweeper
from shared.adapters.catalog import PgCatalog
from shared.adapters.migrations import migrate
from shared.adapters.objects import S3ObjectStore
from shared.adapters.outbox import PgOutbox, relay
from shared.adapters.postgres import PgDatabase
from shared.adapters.rabbit import RabbitBus
from shared.adapters.sessions import end_fenced_sessions
from shared.adapters.task_store import PgTaskStore
from shared.config import Settings
from shared.domain.messages import CONTROL_QUEUE
from shared.service import run_service, serve_health
from shared.worker import store_policy

log = structlog.get_logger()

# Advisory locks of the periodic duties, one each.
RELAY_LOCK, REAPER_LOCK, SWEEPER_LOCK, SEALER_LOCK, SESSIONS_LOCK = range(0x51_0001, 0x51_0006)
COMMANDS_SIDE_BY_SIDE = 10


async def _control(settings: Settings) -> None:
    async with AsyncExitStack() as opened:
        await migrate(settings.postgres_dsn)
        database = PgDatabase(settings.postgres_dsn, size=COMMANDS_SIDE_BY_SIDE + 8, name="sluice control")
        await database.open()
        opened.push_async_callback(database.close)
        objects = S3ObjectStore(settings)
        opened.push_async_callback(objects.aclose)
        await objects.ensure_bucket()
        bus = RabbitBus(settings.amqp_url, name="control")
        store = PgTaskStore(database, PgOutbox(bus), store_policy(settings))
        sweep = Sweeper(database, objects, PgCatalog(database), orphan_age_seconds=settings.orphan_age_seconds)
        reap = Reaper(store, bus)

        async def relay_outbox() -> None:
            while await relay(database, bus, older_than_seconds=settings.relay_interval_seconds):
                log.info("relayed what was left in the outbox")

        async def disconnect() -> None:
            if count := await end_fenced_sessions(database):
                log.warning("disconnected sessions of claims that have ended", sessions=count)

        bus.consume(CONTROL_QUEUE, CommandHandler(store, bus), prefetch=COMMANDS_SIDE_BY_SIDE)
        checks = {"postgres": database.probe, "rabbitmq": bus.probe}
        health = await serve_health(settings, checks)
        if health is not None:
            opened.push_async_callback(health.cleanup)
        async with asyncio.TaskGroup() as group:
            group.create_task(bus.run())
            for seconds, duty, name, lock in (
                (settings.relay_interval_seconds, relay_outbox, "relay", RELAY_LOCK),
                (settings.reap_interval_seconds, reap, "reaper", REAPER_LOCK),
                (settings.reap_interval_seconds, disconnect, "sessions", SESSIONS_LOCK),
                (settings.sweep_interval_seconds, sweep, "sweeper", SWEEPER_LOCK),
                (settings.sweep_interval_seconds, Sealer(database, objects), "sealer", SEALER_LOCK),
            ):
                group.create_task(every(seconds, duty, database, name=name, lock=lock))


def main() -> None:
    run_service("control", _control)


if __name__ == "__main__":
    main()
