"""Tasks brought into any state without a worker, and numbered rows whose every loss or double shows."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
import orjson

from shared.adapters.outbox import PgOutbox
from shared.adapters.postgres import PgDatabase
from shared.adapters.task_store import PgTaskStore
from shared.adapters.task_transitions import StorePolicy
from shared.domain.errors import InvalidData
from shared.domain.messages import DEAD_QUEUE
from shared.domain.task import AccountId, Command, Kind, Task, TaskId, TaskState, Trigger
from shared.ports.database import Connection
from shared.ports.tasks import NewTask
from sluice.stack import Stack
from sluice.stack.services import Service
from tests.faults.scene import Scene

DEADLINE_SECONDS = 60.0
ROW_BYTES = 64

POLICY = StorePolicy(lease_seconds=300, max_attempts=3, paused_expiry_seconds=3600, failed_expiry_seconds=7200)


def numbered_csv(rows: int) -> bytes:
    """`n,padding` with a header; each row of `ROW_BYTES` bytes."""
    return b"n,padding\n" + b"".join((b"%d," % n).ljust(ROW_BYTES - 1, b"x") + b"\n" for n in range(rows))


async def assert_loaded(scene: Scene, dataset: str, rows: int) -> None:
    """The dataset holds the rows of `numbered_csv(rows)`, each once."""
    found = await scene.fetch(f"SELECT count(*), count(DISTINCT n) AS kinds, sum(n) FROM {scene.table(dataset)}")
    assert tuple(found[0].values()) == (rows, rows, rows * (rows - 1) // 2)


# In this database, as others use the same server. Who waits for a row names no database, but holds the row's table.
SOMEBODY_WAITS = """
SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND pid IN (
    SELECT pid FROM pg_locks WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database())
)
"""


async def until(holds: Callable[[], Awaitable[object]], *, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(seconds):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.02)


# --- without any process: the store alone


@asynccontextmanager
async def open_database(dsn: str, *, size: int = 4, **options: Any) -> AsyncIterator[PgDatabase]:
    database = PgDatabase(dsn, size=size, name="test", **options)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


def silent_store(database: PgDatabase, policy: StorePolicy = POLICY) -> PgTaskStore:
    """A store whose announcements stay in the outbox, where a test can read them."""
    return PgTaskStore(database, PgOutbox(None), policy)


async def new_account(database: PgDatabase, username: str = "tester") -> AccountId:
    async with database.connection() as connection:
        return AccountId(
            await connection.fetchval(
                "INSERT INTO sluice.accounts (username, password_hash) VALUES ($1, 'none') RETURNING account_id",
                username,
            )
        )


async def publish_nothing(_: Connection) -> dict[str, Any]:
    return {}


async def undo_nothing(_: Connection) -> None:
    return


async def task_in(store: PgTaskStore, account_id: AccountId, state: TaskState, *, kind: Kind = Kind.IMPORT) -> Task:
    """A new task, brought into `state` on the ways that the design names, with the worker `w`."""
    task, _ = await store.create(NewTask(account_id, kind, {}), actor="test")

    async def command(command: Command) -> None:
        await store.command(task.task_id, command, account_id=account_id, actor="test", reason=None)

    async def claimed() -> Task:
        held = await store.claim(task.task_id, "w")
        assert held is not None
        return held

    match state:
        case TaskState.RUNNING:
            await claimed()
        case TaskState.PAUSING:
            await claimed()
            await command(Command.PAUSE)
        case TaskState.PAUSED:
            await command(Command.PAUSE)
        case TaskState.FAILED:
            held = await claimed()
            await store.move(task.task_id, Trigger.FAIL, actor="w", epoch=held.epoch, error=InvalidData("broken"))
        case TaskState.SUCCEEDED:
            held = await claimed()
            await store.succeed(task.task_id, held.epoch, publish_nothing, actor="w")
        case TaskState.ABORTING:
            await command(Command.ABORT)
        case TaskState.ABORTED:
            await command(Command.ABORT)
            rollback = await store.claim_rollback(task.task_id, "w")
            assert rollback is not None
            await store.rolled_back(task.task_id, rollback.epoch, undo_nothing, actor="w")
    found = await store.get(task.task_id)
    assert found is not None
    assert found.state is state
    return found


@dataclass(frozen=True)
class Told:
    """What one transition left behind: its audit rows and what the outbox would say."""

    events: list[dict[str, Any]] = field(default_factory=list)
    posted: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def to(self, exchange: str) -> list[tuple[str, dict[str, Any]]]:
        return [(key, body) for where, key, body in self.posted if where == exchange]


@asynccontextmanager
async def listening(database: PgDatabase, task_id: TaskId) -> AsyncIterator[Told]:
    """What is written down of a task inside the block; filled when it ends."""
    told = Told()
    async with database.connection() as connection:
        last_event = await connection.fetchval("SELECT coalesce(max(event_id), 0) FROM sluice.task_events")
        last_post = await connection.fetchval("SELECT coalesce(max(outbox_id), 0) FROM sluice.outbox")
    yield told
    async with database.connection() as connection:
        events = await connection.fetch(
            "SELECT * FROM sluice.task_events WHERE task_id = $1 AND event_id > $2 ORDER BY event_id",
            task_id,
            last_event,
        )
        posts = await connection.fetch(
            "SELECT * FROM sluice.outbox WHERE (body ->> 'task_id')::bigint = $1 AND outbox_id > $2 ORDER BY outbox_id",
            task_id,
            last_post,
        )
    told.events.extend(dict(row) for row in events)
    told.posted.extend((row["exchange"], row["routing_key"], row["body"]) for row in posts)


# --- the broker, by hand


class Console:
    """RabbitMQ's management API on one virtual host: what an operator sees and does."""

    def __init__(self, session: aiohttp.ClientSession, base: str, vhost: str) -> None:
        self._session = session
        self._base = base
        self._vhost = quote(vhost, safe="")

    async def publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes | dict[str, Any],
        *,
        properties: Mapping[str, Any] | None = None,
    ) -> bool:
        """Publish by hand; answers whether a queue took it."""
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        answer = await self._call(
            "POST",
            f"exchanges/{self._vhost}/{exchange or 'amq.default'}/publish",
            {
                "properties": dict(properties or {}),
                "routing_key": routing_key,
                "payload": base64.b64encode(raw).decode(),
                "payload_encoding": "base64",
            },
        )
        return bool(answer["routed"])

    async def take(self, queue: str, count: int = 100) -> list[dict[str, Any]]:
        """Take the messages that wait in a queue."""
        found = await self._call(
            "POST",
            f"queues/{self._vhost}/{queue}/get",
            {"count": count, "ackmode": "ack_requeue_false", "encoding": "base64"},
        )
        return list(found)

    async def purge(self, queue: str) -> None:
        await self._call("DELETE", f"queues/{self._vhost}/{queue}/contents")

    async def delete(self, queue: str) -> None:
        await self._call("DELETE", f"queues/{self._vhost}/{queue}")

    async def limit(self, queue: str, messages: int) -> None:
        """Let a queue refuse what goes beyond so many messages."""
        rule = {"pattern": f"^{queue}$", "definition": {"max-length": messages, "overflow": "reject-publish"}}
        await self._call("PUT", f"policies/{self._vhost}/limit", rule)

    async def dead(self, count: int) -> list[dict[str, Any]]:
        """Wait for `count` dead letters and take them."""
        letters: list[dict[str, Any]] = []
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(letters) < count:
                letters += await self.take(DEAD_QUEUE)
                await asyncio.sleep(0.02)
        return letters

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        async with self._session.request(method, f"{self._base}/{path}", json=body) as answer:
            text = await answer.read()
            assert answer.status < 300, text
            return orjson.loads(text) if text else None


@asynccontextmanager
async def open_console(environment: Mapping[str, str]) -> AsyncIterator[Console]:
    management = urlsplit(environment["SLUICE_RABBITMQ_MANAGEMENT_URL"])
    assert management.username
    assert management.password
    login = {"Authorization": aiohttp.encode_basic_auth(management.username, management.password)}
    async with aiohttp.ClientSession(headers=login) as session:
        vhost = urlsplit(environment["SLUICE_AMQP_URL"]).path.removeprefix("/")
        yield Console(session, f"http://{management.hostname}:{management.port}/api", vhost)


# --- the processes

# Small batches and short times: much happens between two commands, and a lost worker is noticed at once.
QUICK = {
    "SLUICE_BATCH_BYTES": "8192",
    "SLUICE_LEASE_SECONDS": "2",
    "SLUICE_RELAY_INTERVAL_SECONDS": "0.2",
    "SLUICE_REAP_INTERVAL_SECONDS": "0.2",
    "SLUICE_RETRY_BACKOFF_SECONDS": "0.1",
}


async def start(services: Stack, *, control: int = 1, workers: int = 1, **changed: object) -> list[Service]:
    """Start control services and import workers and wait until they are ready, the control services first."""
    environment = QUICK | {f"SLUICE_{name.upper()}": str(value) for name, value in changed.items()}
    started = services.spawn("control", control, environment) + services.spawn("upload-worker", workers, environment)
    for service in started:
        await asyncio.to_thread(service.wait_ready)
    return started
