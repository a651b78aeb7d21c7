"""A database, a virtual host and a key prefix of its own for each test, on servers that all tests share."""

import hashlib
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from urllib.parse import urlsplit

import aiohttp
import asyncpg

from shared.adapters.migrations import migrate
from sluice.stack import Stack

_TEMPLATE_LOCK = 0x51_01CF


@contextmanager
def started(stack: Stack) -> Iterator[Stack]:
    """Start it; stop it afterwards and remove what it has written."""
    try:
        stack.start()
        yield stack
    finally:
        stack.purge()


def with_path(url: str, path: str) -> str:
    """Return the same URL with another path: another database, another virtual host."""
    return urlsplit(url)._replace(path=f"/{path}").geturl()


async def make_template(dsn: str) -> str:
    """Return the name of a migrated database; the first test process makes it, the others wait for it."""
    migrations = sorted((entry.name, entry.read_bytes()) for entry in files("shared").joinpath("sql").iterdir())
    name = f"sluice_template_{hashlib.sha256(repr(migrations).encode()).hexdigest()[:16]}"
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", _TEMPLATE_LOCK)
        ready = await connection.fetchval("SELECT datistemplate FROM pg_database WHERE datname = $1", name)
        if not ready:
            await connection.execute(f"DROP DATABASE IF EXISTS {name}")
            await connection.execute(f"CREATE DATABASE {name}")
            await migrate(with_path(dsn, name))
            await connection.execute(f"ALTER DATABASE {name} IS_TEMPLATE true ALLOW_CONNECTIONS false")
    finally:
        await connection.close()
    return name


@asynccontextmanager
async def own_database(dsn: str, template: str) -> AsyncIterator[str]:
    """Clone the template; yields the clone's DSN and drops it afterwards."""
    name = f"sluice_test_{uuid.uuid4().hex}"
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield with_path(dsn, name)
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()


@asynccontextmanager
async def own_vhost(amqp_url: str, management_url: str) -> AsyncIterator[str]:
    """Make a virtual host; yields its AMQP URL and deletes it afterwards."""
    name = f"test-{uuid.uuid4().hex}"
    console = urlsplit(management_url)
    user = urlsplit(amqp_url).username
    assert console.username
    assert console.password
    base = f"{console.scheme}://{console.hostname}:{console.port}/api"
    login = {"Authorization": aiohttp.encode_basic_auth(console.username, console.password)}
    everything = {"configure": ".*", "write": ".*", "read": ".*"}
    async with aiohttp.ClientSession(headers=login, raise_for_status=True) as session:
        await session.put(f"{base}/vhosts/{name}")
        await session.put(f"{base}/permissions/{name}/{user}", json=everything)
        yield with_path(amqp_url, name)
        await session.delete(f"{base}/vhosts/{name}")
