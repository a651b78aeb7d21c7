"""PostgreSQL through asyncpg: the pool, connections with our errors, and the one function that quotes identifiers.

Considerations
- A broken connection in the middle of COMMIT leaves it unknown whether the transaction was committed. Callers must
  then read the truth again before they go on: DatabaseUnavailable ends a claim, and the next claim reads the row.
- `synchronous_commit` stays on, except in transactions that switch it off for themselves (see the runner's batches).
- Cancelling a COPY FROM makes asyncpg send a cancel request; the connection is given back only when the server has
  answered, so a cancelled batch holds no lock afterwards. A COPY TO that is cancelled, or whose sink fails, closes its
  connection: when that meets data that has just come, asyncpg (0.32) forgets to tell the server, or waits for ever.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, cast

import asyncpg
import orjson
import structlog
from asyncpg import exceptions as pg

from shared.domain.errors import (
    BadRecord,
    Conflict,
    DatabaseUnavailable,
    InvalidData,
    LockTimeout,
    SchemaChanged,
    StatementTimeout,
)

log = structlog.get_logger()

_COPY_LINE = re.compile(r"COPY .*?, line (\d+)(?:, column ([^\n]*?))?(?::|$)", re.MULTILINE)


def quoted(identifier: str) -> str:
    """`identifier` as SQL. Raises InvalidData for what no identifier can be: empty, or with a NUL byte."""
    if not identifier or "\x00" in identifier:
        raise InvalidData(f"{identifier!r} cannot be a name in PostgreSQL")
    return '"' + identifier.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as an SQL string, for the few places that take no parameter (COPY options, DEFAULT)."""
    if "\x00" in text:
        raise InvalidData("a NUL character cannot be part of an SQL text")
    if "\\" in text:
        return " E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def translated() -> Iterator[None]:
    """Driver errors become ours; a programming error stays what it is."""
    try:
        yield
    except (
        pg.BadCopyFileFormatError,
        pg.DataError,
        pg.IntegrityConstraintViolationError,
        pg.ProgramLimitExceededError,
    ) as error:
        raise _data_error(cast(asyncpg.PostgresError, error)) from error
    except pg.DependentObjectsStillExistError as error:
        raise Conflict(f"something of yours depends on it: {error.detail or error}; drop that first") from error
    except (pg.UndefinedTableError, pg.UndefinedColumnError) as error:
        raise SchemaChanged("the dataset was changed or dropped meanwhile; try again") from error
    except pg.LockNotAvailableError as error:
        raise LockTimeout(
            "the table is being read or changed by somebody else for too long; try again later"
        ) from error
    except pg.QueryCanceledError as error:
        raise StatementTimeout("the statement took longer than allowed") from error
    except (pg.DeadlockDetectedError, pg.SerializationError) as error:
        raise LockTimeout("two changes met each other; try again") from error
    except (
        OSError,
        pg.PostgresConnectionError,
        pg.OperatorInterventionError,
        pg.InsufficientResourcesError,
        pg.CannotConnectNowError,
        pg.InternalClientError,
        TimeoutError,
    ) as error:
        raise DatabaseUnavailable(f"PostgreSQL does not answer: {error or type(error).__name__}") from error
    except pg.InterfaceError as error:
        # "connection is closed", "connection was closed in the middle of operation", "pool is closing"; and "connection
        # has been released back to the pool", which a connection does that is lost while nobody waits for its answer
        if "clos" in str(error) or "terminat" in str(error) or "released back" in str(error):
            raise DatabaseUnavailable(f"PostgreSQL does not answer: {error}") from error
        raise


def _data_error(error: asyncpg.PostgresError) -> Exception:
    where = _COPY_LINE.search(getattr(error, "context", None) or "")
    message = str(error)
    if where is not None:
        return BadRecord(message, line=int(where[1]), column=where[2], sqlstate=error.sqlstate)
    if isinstance(error, pg.UniqueViolationError):
        return Conflict(message, constraint=getattr(error, "constraint_name", None))
    return InvalidData(message, sqlstate=error.sqlstate)


class _SinkFailed(Exception):
    """What took the bytes of a COPY failed; the cause says how."""


class PgConnection:
    """An asyncpg connection behind the `Connection` port."""

    def __init__(self, raw: "asyncpg.Connection[Any]") -> None:
        self._raw = raw
        self._ended = False

    async def execute(self, sql: str, *args: object) -> str:
        with translated():
            return await self._raw.execute(sql, *args)

    async def fetch(self, sql: str, *args: object) -> Sequence[Mapping[str, Any]]:
        with translated():
            return cast(Sequence[Mapping[str, Any]], await self._raw.fetch(sql, *args))

    async def fetchrow(self, sql: str, *args: object) -> Mapping[str, Any] | None:
        with translated():
            return cast(Mapping[str, Any] | None, await self._raw.fetchrow(sql, *args))

    async def fetchval(self, sql: str, *args: object) -> Any:
        with translated():
            return await self._raw.fetchval(sql, *args)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        transaction = self._raw.transaction()
        try:
            with translated():
                await transaction.start()
        except asyncio.CancelledError:
            self._end()  # nobody knows whether it has begun
            raise
        try:
            yield
        except BaseException:
            if not self._is_lost():
                try:
                    await transaction.rollback()
                except Exception:  # must not hide what led here, a cancel least of all
                    self._end()
            raise
        with translated():
            await transaction.commit()

    async def copy_in(
        self, schema: str, table: str, source: Any, *, columns: Sequence[str] | None = None, **options: Any
    ) -> int:
        if isinstance(source, bytes):
            source = memoryview(source)  # asyncpg takes bytes for the name of a file
        with translated():
            status = await self._raw.copy_to_table(table, schema_name=schema, columns=columns, source=source, **options)
        return int(status.rpartition(" ")[2])

    async def copy_out(
        self, query: str, *args: object, sink: Callable[[bytes], Coroutine[Any, Any, None]], **options: Any
    ) -> int:
        async def hand_over(piece: bytes) -> None:
            try:
                await sink(piece)
            except Exception as error:
                raise _SinkFailed from error

        try:
            with translated():
                status = await self._raw.copy_from_query(query, *args, output=hand_over, **options)
        except asyncio.CancelledError:
            self._end()
            raise
        except _SinkFailed as failed:
            self._end()
            # A client that went away is no fault of the server's, though both are an OSError.
            raise failed.__cause__ or failed from None
        return int(status.rpartition(" ")[2])

    async def copy_records(
        self, schema: str, table: str, columns: Sequence[str], records: Sequence[Sequence[object]]
    ) -> None:
        with translated():
            await self._raw.copy_records_to_table(table, schema_name=schema, columns=list(columns), records=records)

    def _end(self) -> None:
        """Close it at once; the pool gives out another one."""
        self._ended = True
        with suppress(pg.InterfaceError):  # the pool has it back
            self._raw.terminate()

    def _is_lost(self) -> bool:
        try:
            return self._ended or self._raw.is_closed()
        except pg.InterfaceError:  # the pool has it back
            return True

    @property
    def backend_pid(self) -> int:
        return self._raw.get_server_pid()


async def _set_up(raw: "asyncpg.Connection[Any]") -> None:
    def decode(text: str) -> Any:
        return orjson.loads(text)

    def encode(value: object) -> str:
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()

    for name in ("json", "jsonb"):
        await raw.set_type_codec(name, schema="pg_catalog", encoder=encode, decoder=decode)


class PgDatabase:
    """A pool of connections behind the `Database` port.

    `size` is the most connections that are open at a time. Idle ones are closed after a minute, so that paused tasks
    hold none. A session that says nothing for `idle_in_transaction_seconds` in the middle of a transaction is ended by
    the server: its process hangs, and must not hold up others by the rows that it has locked.
    """

    def __init__(
        self,
        dsn: str,
        *,
        size: int,
        name: str,
        connect_seconds: float = 10.0,
        idle_in_transaction_seconds: float = 60.0,
    ) -> None:
        self._dsn = dsn
        self._size = size
        self._name = name
        self._connect_seconds = connect_seconds
        self._idle_in_transaction = f"{round(idle_in_transaction_seconds * 1000)}ms"
        self._pool: asyncpg.Pool[Any] | None = None

    async def open(self) -> None:
        """Raises DatabaseUnavailable."""
        with translated():
            self._pool = await asyncpg.create_pool(
                self._dsn,
                min_size=0,
                max_size=self._size,
                max_inactive_connection_lifetime=60,
                timeout=self._connect_seconds,
                init=_set_up,
                server_settings={
                    "application_name": self._name,
                    "jit": "off",
                    "idle_in_transaction_session_timeout": self._idle_in_transaction,
                },
            )

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()

    async def probe(self) -> None:
        """Return when PostgreSQL answers. Raises DatabaseUnavailable."""
        async with self.connection() as connection:
            await connection.fetchval("SELECT true")

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[PgConnection]:
        assert self._pool is not None, "open() first"
        with translated():
            raw = await self._pool.acquire(timeout=self._connect_seconds)
        try:
            yield PgConnection(cast("asyncpg.Connection[Any]", raw))
        finally:
            await self._give_back(raw)

    async def _give_back(self, raw: Any) -> None:
        """One that is lost just then says nothing of what was done on it, and must not hide how that ended."""
        assert self._pool is not None
        try:
            await self._pool.release(raw)
        except Exception as error:  # asyncpg has closed it
            log.info("a connection was lost when it was given back", error=str(error) or type(error).__name__)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[PgConnection]:
        async with self.connection() as connection, connection.transaction():
            yield connection
