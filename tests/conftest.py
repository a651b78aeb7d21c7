"""Fixtures that every test may ask for: servers, settings of its own on them, and service processes."""

import uuid
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from shared.config import Settings
from sluice.stack import Stack
from tests.faults.scene import settings_of
from tests.servers import make_template, own_database, own_vhost, started

FAILED = pytest.StashKey[bool]()


@pytest.fixture(scope="session")
def shared_stack() -> Iterator[Stack]:
    """Servers for all tests of this process: those that the environment names, and others of its own."""
    with started(Stack.temporary(fast=True)) as stack:
        yield stack


@pytest.fixture(scope="session")
async def template(shared_stack: Stack) -> str:
    """Name of the migrated database that the tests' databases are cloned from."""
    return await make_template(shared_stack.environment()["SLUICE_POSTGRES_DSN"])


@pytest.fixture
async def database_dsn(shared_stack: Stack, template: str) -> AsyncIterator[str]:
    """DSN of a migrated database that this test alone uses."""
    async with own_database(shared_stack.environment()["SLUICE_POSTGRES_DSN"], template) as dsn:
        yield dsn


@pytest.fixture
async def amqp_url(shared_stack: Stack) -> AsyncIterator[str]:
    """URL of a virtual host that this test alone uses."""
    servers = shared_stack.environment()
    if "SLUICE_RABBITMQ_MANAGEMENT_URL" not in servers:
        pytest.fail("SLUICE_AMQP_URL is set: set SLUICE_RABBITMQ_MANAGEMENT_URL too (http://user:password@host:15672)")
    async with own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as url:
        yield url


@pytest.fixture
def store_environment(shared_stack: Stack) -> dict[str, str]:
    """SLUICE_* variables for a test that uses no more of its own than keys in the object store."""
    return {**shared_stack.environment(), "SLUICE_S3_PREFIX": f"{uuid.uuid4().hex}/"}


@pytest.fixture
def environment(store_environment: dict[str, str], database_dsn: str, amqp_url: str) -> dict[str, str]:
    """SLUICE_* variables for service processes of this test."""
    return {**store_environment, "SLUICE_POSTGRES_DSN": database_dsn, "SLUICE_AMQP_URL": amqp_url}


@pytest.fixture
def settings(environment: dict[str, str]) -> Settings:
    """The same as `environment`, for code that runs in the test's own process."""
    return settings_of(environment)


@pytest.fixture
def services(environment: dict[str, str], request: pytest.FixtureRequest) -> Iterator[Stack]:
    """`services.spawn("upload-worker", 2, {...})` starts real processes on this test's settings."""
    stack = Stack.temporary(given=environment)
    try:
        stack.start()
        yield stack
        show_logs_of_a_failure(stack, request)
    finally:
        stack.purge()


@pytest.fixture
def shows_logs(request: pytest.FixtureRequest) -> Callable[[Stack], None]:
    """Shows the logs of a stack that several tests use, if this one has failed; call it at the end."""
    return lambda stack: show_logs_of_a_failure(stack, request)


def show_logs_of_a_failure(stack: Stack, request: pytest.FixtureRequest) -> None:
    if request.node.stash.get(FAILED, False):
        for log in sorted(stack.home.logs.glob("*.log")):
            print(f"--- the end of {log.name}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-40:]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        item.stash[FAILED] = True
    return report
