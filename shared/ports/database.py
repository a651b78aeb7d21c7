"""What the rest of Sluice needs of PostgreSQL: connections, transactions and COPY, with errors of our own."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol


class Connection(Protocol):
    """One connection. JSON columns are read and written as Python values. SQL is static text with `$1`.

    Every call raises DatabaseUnavailable when the server is away, Conflict on a broken unique rule, LockTimeout when
    a lock was not granted in time, and BadRecord when COPY met a record that it cannot load.
    """

    async def execute(self, sql: str, *args: object) -> str: ...

    async def fetch(self, sql: str, *args: object) -> Sequence[Mapping[str, Any]]: ...

    async def fetchrow(self, sql: str, *args: object) -> Mapping[str, Any] | None: ...

    async def fetchval(self, sql: str, *args: object) -> Any: ...

    def transaction(self) -> AbstractAsyncContextManager[None]:
        """BEGIN … COMMIT, or ROLLBACK on any exception; inside a transaction, a savepoint."""
        ...

    async def copy_in(
        self, schema: str, table: str, source: Any, *, columns: Sequence[str] | None = None, **options: Any
    ) -> int:
        """`COPY schema.table FROM STDIN` and the number of rows; `options` are PostgreSQL's: format, delimiter, null …

        `source` is bytes or an async iterable of bytes.
        """
        ...

    async def copy_out(
        self, query: str, *args: object, sink: Callable[[bytes], Coroutine[Any, Any, None]], **options: Any
    ) -> int:
        """`COPY (query) TO STDOUT` and the number of rows; `sink` is awaited with each piece."""
        ...

    async def copy_records(
        self, schema: str, table: str, columns: Sequence[str], records: Sequence[Sequence[object]]
    ) -> None: ...


class Database(Protocol):
    def connection(self) -> AbstractAsyncContextManager[Connection]:
        """A connection from the pool, given back afterwards."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[Connection]:
        """A connection inside a transaction."""
        ...
