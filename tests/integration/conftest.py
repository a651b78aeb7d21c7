"""A gateway and two accounts that know nothing of each other."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from argon2 import PasswordHasher

from gateway.accounts import Accounts
from gateway.auth import new_token
from shared.adapters.objects import S3ObjectStore
from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from shared.ports.objects import MIN_PART_BYTES
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene, settings_of
from tests.gateway_process import PASSWORD, Client, bearer, running_gateway
from tests.servers import own_database, own_vhost
from tests.tasks import open_database


@pytest.fixture
async def database(database_dsn: str) -> AsyncIterator[PgDatabase]:
    """The test's own database."""
    async with open_database(database_dsn, size=3) as database:
        yield database


@pytest.fixture
async def object_store(store_environment: dict[str, str]) -> AsyncIterator[S3ObjectStore]:
    """The test's own prefix of the object store."""
    objects = S3ObjectStore(settings_of(store_environment))
    await objects.ensure_bucket()
    yield objects
    await objects.aclose()


@pytest.fixture
async def nobody(settings: Settings) -> AsyncIterator[Client]:
    """A client without an account."""
    async with running_gateway(settings) as client:
        yield client


@pytest.fixture(scope="session")
def password_hash() -> str:
    """Of PASSWORD, and made once: it is slow on purpose."""
    return PasswordHasher().hash(PASSWORD)


@pytest.fixture
async def sign_up(nobody: Client, database_dsn: str, password_hash: str) -> Callable[[str], Awaitable[Client]]:
    """Leave what a registration and the request of a token would; tests of accounts make these over HTTP."""

    async def account(username: str) -> Client:
        token, token_hash = new_token()
        async with open_database(database_dsn, size=1) as database:
            accounts = Accounts(database)
            made = await accounts.create(username, password_hash)
            await accounts.add_token(made.account_id, "test", token_hash, expires_in_seconds=3600)
        return Client(nobody.url, nobody.session, username, bearer(token))

    return account


@pytest.fixture
async def alice(sign_up: Callable[[str], Awaitable[Client]]) -> Client:
    """An account."""
    return await sign_up("alice")


@pytest.fixture
async def bob(sign_up: Callable[[str], Awaitable[Client]]) -> Client:
    """Another account."""
    return await sign_up("bob")


@pytest.fixture(scope="session")
async def importers(shared_stack: Stack, template: str) -> AsyncIterator[Scene]:
    """A control service and an import worker with tiny batches, for all tests that only import."""
    servers = shared_stack.environment()
    async with (
        own_database(servers["SLUICE_POSTGRES_DSN"], template) as dsn,
        own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as amqp_url,
    ):
        environment = {
            **servers,
            "SLUICE_POSTGRES_DSN": dsn,
            "SLUICE_AMQP_URL": amqp_url,
            "SLUICE_S3_PREFIX": f"{uuid.uuid4().hex}/",
            "SLUICE_BATCH_BYTES": "64",
            "SLUICE_SLOTS": "4",
            "SLUICE_RETRY_BACKOFF_SECONDS": "0.05",
        }
        services = Stack.temporary(given=environment)
        try:
            services.start()
            spawned = [*services.spawn("control"), *services.spawn("upload-worker")]
            for service in spawned:
                await asyncio.to_thread(service.wait_ready)
            async with open_scene(environment, lock_seconds=0.2) as scene:
                yield scene
        finally:
            await asyncio.to_thread(services.purge)


@pytest.fixture(scope="session")
async def exporters(shared_stack: Stack, template: str) -> AsyncIterator[Scene]:
    """A control service and an export worker with the smallest parts that S3 allows, for all tests that export."""
    servers = shared_stack.environment()
    async with (
        own_database(servers["SLUICE_POSTGRES_DSN"], template) as dsn,
        own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as amqp_url,
    ):
        environment = {
            **servers,
            "SLUICE_POSTGRES_DSN": dsn,
            "SLUICE_AMQP_URL": amqp_url,
            "SLUICE_S3_PREFIX": f"{uuid.uuid4().hex}/",
            "SLUICE_PART_BYTES": str(MIN_PART_BYTES),
            "SLUICE_SLOTS": "4",
            "SLUICE_RETRY_BACKOFF_SECONDS": "0.05",
        }
        services = Stack.temporary(given=environment)
        try:
            services.start()
            spawned = [*services.spawn("control"), *services.spawn("export-worker")]
            for service in spawned:
                await asyncio.to_thread(service.wait_ready)
            async with open_scene(environment, lock_seconds=5) as scene:
                yield scene
        finally:
            await asyncio.to_thread(services.purge)


@pytest.fixture
async def exporting(exporters: Scene) -> Scene:
    """An account of the test's own, on services that take its exports."""
    return await exporters.another_account()


@pytest.fixture
async def scene(importers: Scene) -> Scene:
    """An account of the test's own, beside others, on services that take its imports."""
    return await importers.another_account()
