"""A gateway and two accounts that know nothing of each other."""

from collections.abc import AsyncIterator

import pytest

from shared.adapters.objects import S3ObjectStore
from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from tests.gateway_process import Client, running_gateway


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[PgDatabase]:
    """The test's own database."""
    database = PgDatabase(settings.postgres_dsn, size=3, name="test")
    await database.open()
    yield database
    await database.close()


@pytest.fixture
async def object_store(settings: Settings) -> AsyncIterator[S3ObjectStore]:
    """The test's own prefix of the object store."""
    objects = S3ObjectStore(settings)
    await objects.ensure_bucket()
    yield objects
    await objects.aclose()


@pytest.fixture
async def nobody(settings: Settings) -> AsyncIterator[Client]:
    """A client without an account."""
    async with running_gateway(settings) as client:
        yield client


@pytest.fixture
async def alice(nobody: Client) -> Client:
    """An account."""
    return await nobody.with_account("alice")


@pytest.fixture
async def bob(nobody: Client) -> Client:
    """Another account."""
    return await nobody.with_account("bob")
