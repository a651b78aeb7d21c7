"""An account on real servers, and what a test does with it: store files, import them, command tasks, count."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from shared.adapters.catalog import PgCatalog, data_schema
from shared.adapters.migrations import migrate
from shared.adapters.objects import S3ObjectStore
from shared.adapters.outbox import PgOutbox
from shared.adapters.postgres import PgDatabase, quoted
from shared.adapters.rabbit import RabbitBus
from shared.adapters.task_store import PgTaskStore
from shared.config import Settings
from shared.domain.errors import Retryable
from shared.domain.import_params import ImportParams, SourceFile
from shared.domain.messages import CONTROL_COMMANDS, CommandReply
from shared.domain.task import ENDED, AccountId, Command, Kind, Task, TaskId, TaskState
from shared.ports.objects import MIB
from shared.ports.tasks import NewTask
from shared.worker import store_policy

DEADLINE_SECONDS = 60.0
_PART_BYTES = 8 * MIB


def settings_of(environment: Mapping[str, str]) -> Settings:
    """What a service with this environment would read."""
    return Settings(**{name.removeprefix("SLUICE_").lower(): value for name, value in environment.items()})  # type: ignore[arg-type]


@dataclass
class Scene:
    """One account; the services are processes that the test started."""

    settings: Settings
    database: PgDatabase
    objects: S3ObjectStore
    bus: RabbitBus
    store: PgTaskStore
    catalog: PgCatalog
    account_id: AccountId
    username: str

    async def another_account(self) -> "Scene":
        """The same servers, seen by a new account."""
        account_id, username = await _new_account(self.database)
        return replace(self, account_id=account_id, username=username)

    # --- files

    async def file(self, body: bytes, name: str | None = None) -> SourceFile:
        """Store a file as the gateway would have."""
        name = name or f"{uuid.uuid4().hex}.csv"
        key = f"files/{self.account_id}/{uuid.uuid4().hex}"
        if len(body) <= _PART_BYTES:
            etag = await self.objects.put(key, body)
        else:
            upload = await self.objects.create_upload(key)
            pieces = [body[start : start + _PART_BYTES] for start in range(0, len(body), _PART_BYTES)]
            parts = [await self.objects.put_part(key, upload, number, piece) for number, piece in enumerate(pieces, 1)]
            etag = await self.objects.complete_upload(key, upload, parts)
        async with self.database.connection() as connection:
            file_id = await connection.fetchval(
                "INSERT INTO sluice.files (account_id, name, object_key, bytes, etag, content_type)"
                " VALUES ($1, $2, $3, $4, $5, 'text/csv') RETURNING file_id",
                self.account_id,
                name,
                key,
                len(body),
                etag,
            )
        return SourceFile(file_id=file_id, name=name, object_key=key, etag=etag, bytes=len(body))

    # --- tasks

    async def begin(self, source: SourceFile | bytes, dataset: str = "data", **params: Any) -> TaskId:
        """Ask for an import, as the gateway would; `params` are those of the request."""
        if isinstance(source, bytes):
            source = await self.file(source)
        max_bytes_per_second = params.pop("max_bytes_per_second", None)
        wanted = ImportParams.model_validate({"dataset": dataset, "source": source, **params})
        new = NewTask(
            self.account_id,
            Kind.IMPORT,
            wanted.model_dump(mode="json", exclude_none=True),
            max_bytes_per_second=max_bytes_per_second,
        )
        task, _ = await self.store.create(new, actor="test")
        return task.task_id

    async def run(self, source: SourceFile | bytes, dataset: str = "data", **params: Any) -> Task:
        """Import and wait for the end, whatever it is."""
        return await self.until(await self.begin(source, dataset, **params), *ENDED)

    async def succeed(self, source: SourceFile | bytes, dataset: str = "data", **params: Any) -> Task:
        """Import; anything but success is a failure of the test."""
        task = await self.run(source, dataset, **params)
        assert task.state is TaskState.SUCCEEDED, task.error
        return task

    async def fail(self, source: SourceFile | bytes, dataset: str = "data", **params: Any) -> dict[str, Any]:
        """Import; it must fail. Answers the error as the user sees it."""
        task = await self.run(source, dataset, **params)
        assert task.state is TaskState.FAILED, (task.state, task.result)
        assert task.error is not None
        return {"task_id": task.task_id, **task.error}

    async def until(self, task_id: TaskId, *states: TaskState, seconds: float = DEADLINE_SECONDS) -> Task:
        """Wait until the row says one of `states`."""
        return await self.when(task_id, lambda task: task.state in states, seconds=seconds)

    async def when(self, task_id: TaskId, holds: Callable[[Task], bool], *, seconds: float = DEADLINE_SECONDS) -> Task:
        """Wait until something is true of the row; PostgreSQL may be away meanwhile."""
        task: Task | None = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    try:
                        task = await self.store.get(task_id)
                    except Retryable:
                        task = None
                    if task is not None and holds(task):
                        return task
                    # A row tells nobody that it changes; asked more often, a hundred of them fill a processor.
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {task}; {await self.events(task_id)}") from None

    async def command(self, task_id: TaskId, command: Command) -> CommandReply:
        """Ask the control service, through RabbitMQ, and wait for its answer."""
        message = CONTROL_COMMANDS[command](task_id=task_id, account_id=self.account_id, actor="test")
        reply = await self.bus.ask(message, timeout_seconds=DEADLINE_SECONDS)
        assert reply is not None, "the control service did not answer"
        return reply

    async def abort(self, task_id: TaskId) -> None:
        """Abort and wait until it is rolled back."""
        await self.command(task_id, Command.ABORT)
        await self.until(task_id, TaskState.ABORTED)

    async def events(self, task_id: TaskId) -> list[tuple[str, str | None]]:
        """The audit trail: what happened, and why."""
        rows = await self.fetch(
            "SELECT event, reason FROM sluice.task_events WHERE task_id = $1 ORDER BY event_id", task_id
        )
        return [(row["event"], row["reason"]) for row in rows]

    # --- what is there

    def table(self, dataset: str = "data") -> str:
        return f"{quoted(data_schema(self.username))}.{quoted(dataset)}"

    async def rows(self, dataset: str = "data") -> list[tuple[Any, ...]]:
        """The rows of a dataset without `_load`, in the order in which they were loaded."""
        found = await self.fetch(f"SELECT * FROM {self.table(dataset)} ORDER BY _load, ctid")
        return [tuple(row.values())[1:] for row in found]

    async def columns(self, dataset: str = "data") -> dict[str, str]:
        value = await self.value(
            "SELECT columns FROM sluice.datasets WHERE account_id = $1 AND name = $2", self.account_id, dataset
        )
        return {column["name"]: column["type"] for column in value}

    async def rejects(self, task_id: TaskId) -> list[tuple[int, str | None, str, str]]:
        rows = await self.fetch(
            "SELECT line, column_name, reason, raw FROM sluice.rejects WHERE task_id = $1 ORDER BY line", task_id
        )
        return [tuple(row.values()) for row in rows]

    async def fetch(self, sql: str, *args: object) -> Sequence[Mapping[str, Any]]:
        async with self.database.connection() as connection:
            return await connection.fetch(sql, *args)

    async def value(self, sql: str, *args: object) -> Any:
        async with self.database.connection() as connection:
            return await connection.fetchval(sql, *args)

    async def when_value(self, sql: str, expected: object, *args: object) -> None:
        """Wait until a query answers `expected`."""
        found = None
        try:
            async with asyncio.timeout(DEADLINE_SECONDS):
                while (found := await self.value(sql, *args)) != expected:  # noqa: ASYNC110 - it is a row that changes
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{sql}: still {found} after {DEADLINE_SECONDS} s") from None

    async def leftovers(self, task_id: TaskId) -> dict[str, int]:
        """What exists of a task besides its row, its audit trail and the file it read; nothing, after an abort.

        Outbox rows are deleted after they were sent, so this waits for them.
        """
        sources = {
            "tables": "SELECT count(*) FROM pg_class WHERE relname = 'load_' || $1::bigint",
            "rejects": "SELECT count(*) FROM sluice.rejects WHERE task_id = $1",
            "loads": "SELECT count(*) FROM sluice.loads WHERE load_id = $1",
            "ledger": "SELECT count(*) FROM sluice.object_ledger WHERE task_id = $1",
            "pins": "SELECT count(*) FROM sluice.load_pins WHERE task_id = $1",
        }
        found = {what: await self.value(sql, task_id) for what, sql in sources.items()}
        await self.when_value(
            "SELECT count(*) FROM sluice.outbox WHERE body ->> 'task_id' = $1::bigint::text", 0, task_id
        )
        found["uploads"] = len([u async for u in self.objects.list_uploads("")])
        return {what: count for what, count in found.items() if count}


@asynccontextmanager
async def open_scene(environment: Mapping[str, str], *, lock_seconds: float = 5.0) -> AsyncIterator[Scene]:
    """A scene on these servers, with a new account."""
    settings = settings_of(environment)
    async with AsyncExitStack() as opened:
        await migrate(settings.postgres_dsn)
        database = PgDatabase(settings.postgres_dsn, size=6, name="test")
        await database.open()
        opened.push_async_callback(database.close)
        objects = S3ObjectStore(settings)
        await objects.ensure_bucket()
        opened.push_async_callback(objects.aclose)
        bus = RabbitBus(settings.amqp_url, name="test")
        session = asyncio.create_task(bus.run())
        opened.push_async_callback(_cancelled, session)
        store = PgTaskStore(database, PgOutbox(bus), store_policy(settings))
        catalog = PgCatalog(database, lock_seconds=lock_seconds)
        yield Scene(settings, database, objects, bus, store, catalog, *await _new_account(database))


async def _new_account(database: PgDatabase) -> tuple[AccountId, str]:
    username = f"user_{uuid.uuid4().hex[:12]}"
    async with database.connection() as connection:
        account_id = await connection.fetchval(
            "INSERT INTO sluice.accounts (username, password_hash) VALUES ($1, 'none') RETURNING account_id", username
        )
    return account_id, username


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])
