"""Datasets and their loads in PostgreSQL, and a first look at their rows."""

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from shared.adapters.catalog import data_schema
from shared.adapters.postgres import quoted
from shared.adapters.value_settings import VALUE_SETTINGS
from shared.domain.errors import NotFound, StatementTimeout, TooLarge, TooManyRequests
from shared.domain.task import AccountId
from shared.ports.database import Database

PREVIEW_MILLISECONDS = 5000
PREVIEW_BYTES = 8 * 1024 * 1024
# What one request may stream; more is work for an export task, which can be paused and resumed.
STREAM_ROWS = 100_000
STREAM_SECONDS = 30.0
# Each holds a connection for as long as its client reads; the others are for everybody else.
STREAMS_AT_ONCE = 4
_INSTEAD = 'make an export task of it: POST /v1/tasks {"kind": "export", ...}'
StreamForm = Literal["csv", "jsonl"]
MOST_LOADS_SHOWN = 1000


@dataclass(frozen=True, slots=True)
class Dataset:
    dataset_id: int
    name: str
    schema: str
    columns: list[dict[str, Any]]
    rows: int
    loads: int
    bytes: int
    created_at: datetime
    updated_at: datetime

    @property
    def sql_table(self) -> str:
        return f"{self.schema}.{self.name}"


@dataclass(frozen=True, slots=True)
class Load:
    load_id: int
    rows: int
    rejects: int
    bytes: int
    file_id: int | None
    file_name: str | None
    attached_at: datetime


_DATASETS = """
SELECT d.dataset_id, d.name, a.username, d.columns, d.created_at, d.updated_at,
    coalesce(sum(l.rows), 0)::bigint AS rows, count(l.load_id) AS loads, coalesce(sum(l.bytes), 0)::bigint AS bytes
FROM sluice.datasets d JOIN sluice.accounts a USING (account_id)
    LEFT JOIN sluice.loads l ON l.dataset_id = d.dataset_id AND l.detached_at IS NULL
WHERE d.account_id = $1 AND ($2::text IS NULL OR d.name = $2) AND ($3::bigint IS NULL OR d.dataset_id < $3)
GROUP BY d.dataset_id, a.username
ORDER BY d.dataset_id DESC LIMIT $4
"""


def _dataset(row: Mapping[str, Any]) -> Dataset:
    fields = dict(row)
    return Dataset(schema=data_schema(fields.pop("username")), **fields)


class Datasets:
    def __init__(self, database: Database) -> None:
        self._database = database
        self._streaming = asyncio.Semaphore(STREAMS_AT_ONCE)

    async def page(self, account_id: AccountId, *, before: int | None, limit: int) -> Sequence[Dataset]:
        """Newest first, those with a number below `before`."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(_DATASETS, account_id, None, before, limit)
        return [_dataset(row) for row in rows]

    async def get(self, account_id: AccountId, name: str) -> Dataset:
        """Raises NotFound."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(_DATASETS, account_id, name, None, 1)
        if row is None:
            raise NotFound(f"there is no dataset {name}")
        return _dataset(row)

    async def exists(self, account_id: AccountId, name: str) -> bool:
        async with self._database.connection() as connection:
            found = await connection.fetchval(
                "SELECT true FROM sluice.datasets WHERE account_id = $1 AND name = $2", account_id, name
            )
        return bool(found)

    async def loads(self, dataset: Dataset) -> Sequence[Load]:
        """Newest first, `MOST_LOADS_SHOWN` at most."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT load_id, rows, rejects, bytes, file_id, file_name, attached_at FROM sluice.loads"
                " WHERE dataset_id = $1 AND detached_at IS NULL ORDER BY load_id DESC LIMIT $2",
                dataset.dataset_id,
                MOST_LOADS_SHOWN,
            )
        return [Load(**row) for row in rows]

    async def has_load(self, dataset: Dataset, load_id: int) -> bool:
        async with self._database.connection() as connection:
            found = await connection.fetchval(
                "SELECT true FROM sluice.loads WHERE dataset_id = $1 AND load_id = $2 AND detached_at IS NULL",
                dataset.dataset_id,
                load_id,
            )
        return bool(found)

    async def preview(self, dataset: Dataset, *, load_id: int | None, limit: int) -> Sequence[str]:
        """Some rows, each as the text of a JSON object: numbers keep every digit. `PREVIEW_BYTES` at most.

        Raises StatementTimeout.
        """
        columns = ", ".join(quoted(column["name"]) for column in dataset.columns)
        table = f"{quoted(dataset.schema)}.{quoted(dataset.name)}"
        async with self._database.transaction() as connection:
            await connection.execute(
                f"SELECT {VALUE_SETTINGS}, set_config('statement_timeout', $1, true),"
                " set_config('transaction_read_only', 'on', true)",
                str(PREVIEW_MILLISECONDS),
            )
            rows = await connection.fetch(
                f"""
                SELECT row FROM (
                    SELECT row, sum(octet_length(row)) OVER (ROWS UNBOUNDED PRECEDING) AS bytes
                    FROM (
                        SELECT row_to_json(r.*)::text AS row -- r alone could be a column
                        FROM (SELECT {columns} FROM {table} WHERE $1::bigint IS NULL OR _load = $1 LIMIT $2) r
                    ) written
                ) counted WHERE bytes <= $3
                """,  # noqa: S608 - the names are quoted
                load_id,
                limit,
                PREVIEW_BYTES,
            )
        return [row["row"] for row in rows]

    async def stream(
        self, dataset: Dataset, form: StreamForm, sink: Callable[[bytes], Coroutine[Any, Any, None]]
    ) -> int:
        """All rows to `sink`, as PostgreSQL writes them; answers how many.

        Raises TooLarge before the first piece when there are more than `STREAM_ROWS`, StatementTimeout after
        `STREAM_SECONDS`, however slowly it is read, and TooManyRequests.
        """
        if dataset.rows > STREAM_ROWS:
            raise TooLarge(
                f"the dataset has {dataset.rows:,} rows, and up to {STREAM_ROWS:,} are streamed; {_INSTEAD}",
                rows=dataset.rows,
                max_rows=STREAM_ROWS,
            )
        columns = ", ".join(quoted(column["name"]) for column in dataset.columns)
        source = f"SELECT {columns} FROM {quoted(dataset.schema)}.{quoted(dataset.name)}"  # noqa: S608 - quoted names
        options: dict[str, Any] = {"format": "csv", "header": True}
        if form == "jsonl":
            source = f"SELECT row_to_json(r.*)::text FROM ({source}) r"  # noqa: S608 - made of quoted names
            # JSON has no raw control characters, so that nothing is ever quoted.
            options = {"format": "csv", "delimiter": "\x02", "quote": "\x01"}
        if self._streaming.locked():
            raise TooManyRequests(
                f"{STREAMS_AT_ONCE} datasets are being streamed at this moment; try again, or make an export task"
            )
        async with self._streaming, self._database.transaction() as connection:
            await connection.execute(f"SELECT {VALUE_SETTINGS}, set_config('transaction_read_only', 'on', true)")
            try:
                # PostgreSQL's own statement_timeout does not count while it waits for its client to read.
                async with asyncio.timeout(STREAM_SECONDS):
                    return await connection.copy_out(source, sink=sink, **options)
            except TimeoutError as error:
                raise StatementTimeout(
                    f"the dataset was not read within {STREAM_SECONDS:g} seconds; {_INSTEAD}"
                ) from error
