"""The gateway: HTTP, authentication, validation and the data plane. The only place here that wires things together."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import structlog
from aiohttp import web

from gateway.accounts import Accounts
from gateway.app import build_app, build_runner
from gateway.auth import Authenticator
from gateway.context import Gateway
from gateway.datasets import Datasets
from gateway.files import Files
from gateway.metrics import Metrics
from gateway.passwords import Passwords
from gateway.task_queries import TaskQueries
from gateway.uploads import Uploads
from gateway.watch import TaskWatch
from shared.adapters.catalog import PgCatalog
from shared.adapters.migrations import migrate
from shared.adapters.objects import S3ObjectStore
from shared.adapters.outbox import PgOutbox
from shared.adapters.postgres import PgDatabase
from shared.adapters.rabbit import Delivery, RabbitBus
from shared.adapters.task_store import PgTaskStore
from shared.config import Settings
from shared.domain.messages import EVENTS_EXCHANGE, TaskEvent, decode
from shared.service import run_service
from shared.worker import store_policy

log = structlog.get_logger()

DATABASE_CONNECTIONS = 20
# aiohttp waits for requests in flight, then for the cancelled ones; then leftovers of uploads are cleaned away.
DRAIN_STEPS = 3
# Many times as long as any silence that an upload survives: of the client, and of the store.
LEASES_PER_SILENCE = 5
STORE_SILENCE_SECONDS = 120.0


async def serve(settings: Settings, *, on_started: Callable[[str], None] = lambda _: None) -> None:
    """Serve until cancelled; `on_started` is told the address. Port 0 takes a free one.

    Raises BusUnavailable when the broker stays away, and what opening the servers raises.
    """
    async with AsyncExitStack() as opened:
        await migrate(settings.postgres_dsn)
        database = PgDatabase(settings.postgres_dsn, size=DATABASE_CONNECTIONS, name="sluice gateway")
        await database.open()
        opened.push_async_callback(database.close)
        objects = S3ObjectStore(settings)
        opened.push_async_callback(objects.aclose)
        await objects.ensure_bucket()
        passwords = Passwords(concurrency=settings.password_hash_concurrency)
        opened.callback(passwords.close)
        bus = RabbitBus(settings.amqp_url, name="gateway")
        gateway = wire(settings, database, objects, bus, passwords)

        async def on_event(delivery: Delivery) -> None:
            await gateway.watch.on_event(decode(delivery.body, TaskEvent))
            await delivery.ack()

        bus.subscribe(EVENTS_EXCHANGE, on_event, pattern="task.#")
        await put_admin(settings, gateway)
        runner = build_runner(build_app(gateway), drain_seconds=settings.drain_seconds / DRAIN_STEPS)
        await runner.setup()
        async with asyncio.TaskGroup() as group:
            # The bus goes on while the requests in flight are drained: they may need it.
            group.create_task(bus.run())
            try:
                await web.TCPSite(runner, settings.gateway_host, settings.gateway_port).start()
                host, port = runner.addresses[0][:2]
                log.info("ready", host=host, port=port)
                on_started(f"http://{host}:{port}")
                await asyncio.Event().wait()
            finally:
                await runner.cleanup()


def wire(
    settings: Settings, database: PgDatabase, objects: S3ObjectStore, bus: RabbitBus, passwords: Passwords
) -> Gateway:
    accounts, files = Accounts(database), Files(database)
    tasks = PgTaskStore(database, PgOutbox(bus), store_policy(settings))
    return Gateway(
        settings=settings,
        accounts=accounts,
        passwords=passwords,
        authenticator=Authenticator(accounts, passwords),
        files=files,
        uploads=Uploads(
            database,
            files,
            objects,
            part_bytes=settings.part_bytes,
            lease_seconds=LEASES_PER_SILENCE * max(STORE_SILENCE_SECONDS, settings.body_idle_seconds),
        ),
        objects=objects,
        tasks=tasks,
        task_queries=TaskQueries(database),
        watch=TaskWatch(tasks),
        control=bus,
        catalog=PgCatalog(database),
        datasets=Datasets(database),
        metrics=Metrics(),
        checks={"postgres": database.probe, "rabbitmq": bus.probe, "object_store": objects.probe},
    )


async def put_admin(settings: Settings, gateway: Gateway) -> None:
    """Create or update the administrator that the settings name."""
    username, secret = settings.admin_username, settings.admin_password
    if username is None or secret is None:
        if username is not None or secret is not None:
            log.warning("no administrator was made: set both SLUICE_ADMIN_USERNAME and SLUICE_ADMIN_PASSWORD")
        return
    password = secret.get_secret_value()
    found = await gateway.accounts.with_password_hash(username)
    if found is not None and found[0].is_admin and await gateway.passwords.matches(password, found[1]):
        return
    await gateway.accounts.put_admin(username, await gateway.passwords.hash(password))


def main() -> None:
    run_service("gateway", serve)


if __name__ == "__main__":
    main()
