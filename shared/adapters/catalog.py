"""Datasets and loads in PostgreSQL: stage tables, publishing by ATTACH, reverting by DETACH, and dropping later.

Considerations
- A dataset is a table `data_<username>.<name>`, partitioned by list on `_load`. A load is one partition,
  `sluice_loads.load_<task>`. It is a table of the task's own until it is attached: nobody can find it by accident.
- `CHECK (_load = n)` together with NOT NULL spares ATTACH the scan of the rows. ATTACH takes SHARE UPDATE EXCLUSIVE on
  the dataset and waits for no reader; DETACH takes ACCESS EXCLUSIVE and waits for running queries, at most
  `lock_seconds`.
- A worker that hangs (stopped, or behind a cut network) may hold its COPY transaction open. It is fenced, but its lock
  would hold up the DROP or the ATTACH: whoever holds the stage table without being the caller is disconnected.
- A load that a live export has pinned is only detached; the control service drops it once the pins are gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from shared.adapters.postgres import quoted
from shared.domain.errors import Conflict, LockTimeout, NotFound, Retryable, SchemaMismatch, SluiceError
from shared.domain.task import AccountId, DatasetId, LoadId
from shared.ports.database import Connection, Database

LOADS_SCHEMA = "sluice_loads"
log = structlog.get_logger()


def load_table(load_id: LoadId) -> str:
    return f"load_{load_id}"


def data_schema(username: str) -> str:
    return f"data_{username}"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a dataset: its name as the user sees it, its type as PostgreSQL spells it."""

    name: str
    type: str

    def as_json(self) -> dict[str, str]:
        return {"name": self.name, "type": self.type}


@dataclass(frozen=True, slots=True)
class Dataset:
    dataset_id: DatasetId
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class FinishedLoad:
    load_id: LoadId
    account_id: AccountId
    rows: int
    rejects: int
    bytes: int
    columns: tuple[Column, ...]
    file_id: int | None
    file_name: str | None


_FIND = "SELECT dataset_id, columns FROM sluice.datasets WHERE account_id = $1 AND name = $2"
_FIND_FOR_UPDATE = _FIND + " FOR UPDATE"


async def find_dataset(
    connection: Connection, account_id: AccountId, name: str, *, for_update: bool = False
) -> Dataset | None:
    row = await connection.fetchrow(_FIND_FOR_UPDATE if for_update else _FIND, account_id, name)
    if row is None:
        return None
    return Dataset(row["dataset_id"], tuple(Column(**column) for column in row["columns"]))


async def create_stage(connection: Connection, load_id: LoadId, columns: Sequence[Column]) -> None:
    """Make the load's table: logged, without an index, ready to be attached."""
    definitions = "".join(f", {quoted(column.name)} {column.type}" for column in columns)
    await connection.execute(
        f"CREATE TABLE {LOADS_SCHEMA}.{load_table(load_id)} ("
        f"_load bigint NOT NULL DEFAULT {load_id} CONSTRAINT only_load CHECK (_load = {load_id}){definitions})"
        # Nobody reads it yet: no vacuum shall compete with the load, or hold a lock when it is attached or dropped.
        " WITH (autovacuum_enabled = off)"
    )


async def drop_load_table(connection: Connection, load_id: LoadId) -> None:
    await connection.execute(f"DROP TABLE IF EXISTS {LOADS_SCHEMA}.{load_table(load_id)}")


_DISCONNECT = """
SELECT count(pg_terminate_backend(a.pid)) FROM pg_stat_activity a
WHERE a.pid <> pg_backend_pid() AND a.usename = current_user AND a.backend_type = 'client backend'
  AND EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.granted AND l.locktype = 'relation'
              AND l.relation = to_regclass($1)
              AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()))
"""


async def disconnect_others(connection: Connection, load_id: LoadId) -> int:
    """Disconnect every other session of ours that holds a lock on the load's table; answers how many."""
    return int(await connection.fetchval(_DISCONNECT, f"{LOADS_SCHEMA}.{load_table(load_id)}"))


async def set_lock_timeout(connection: Connection, seconds: float) -> None:
    await connection.execute("SELECT set_config('lock_timeout', $1, true)", f"{int(seconds * 1000)}ms")


async def publish_load(
    connection: Connection,
    load: FinishedLoad,
    dataset: str,
    *,
    mode: str,
    evolve: bool,
    lock_seconds: float,
) -> dict[str, Any]:
    """Attach the load to its dataset, in the caller's transaction; answers where it can be found.

    Raises Conflict when `create` finds the dataset there, NotFound when `append` does not, SchemaMismatch when the
    columns do not fit, LockTimeout when a query holds up a `replace` for too long.
    """
    await set_lock_timeout(connection, lock_seconds)
    username = await connection.fetchval(
        "SELECT username FROM sluice.accounts WHERE account_id = $1 FOR SHARE", load.account_id
    )
    schema = quoted(data_schema(username))
    parent = f"{schema}.{quoted(dataset)}"
    found = await find_dataset(connection, load.account_id, dataset, for_update=True)
    if mode == "create" and found is not None:
        raise Conflict(f"there is a dataset {dataset!r} by now; import with mode append or replace")
    if mode == "append" and found is None:
        raise NotFound(f"there is no dataset {dataset!r} to append to; import with mode create")
    replaced: list[int] = []
    if found is None:
        dataset_id = await _create_dataset(connection, load, dataset, schema, parent, mode)
    else:
        dataset_id = found.dataset_id
        if mode == "replace":
            replaced = await _empty_dataset(connection, load, dataset_id, parent)
        else:
            await _fit_columns(connection, found, load, parent, evolve=evolve)
    table = f"{LOADS_SCHEMA}.{load_table(load.load_id)}"
    await connection.execute(f"ALTER TABLE {table} RESET (autovacuum_enabled)")
    await connection.execute(f"ALTER TABLE {parent} ATTACH PARTITION {table} FOR VALUES IN ({load.load_id})")
    await connection.execute(
        "INSERT INTO sluice.loads (load_id, dataset_id, account_id, rows, rejects, bytes, columns, file_id, file_name)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        load.load_id,
        dataset_id,
        load.account_id,
        load.rows,
        load.rejects,
        load.bytes,
        [column.as_json() for column in load.columns],
        load.file_id,
        load.file_name,
    )
    await connection.execute("UPDATE sluice.datasets SET updated_at = now() WHERE dataset_id = $1", dataset_id)
    return {
        "dataset": dataset,
        "table": f"{data_schema(username)}.{dataset}",
        "load": load.load_id,
        "rows": load.rows,
        "rejects": load.rejects,
        "bytes": load.bytes,
        "replaced_loads": replaced,
    }


async def _create_dataset(
    connection: Connection, load: FinishedLoad, dataset: str, schema: str, parent: str, mode: str
) -> DatasetId:
    # Two first imports of an account meet here: CREATE SCHEMA IF NOT EXISTS alone may fail for the second.
    await connection.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", schema)
    await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    definitions = "".join(f", {quoted(column.name)} {column.type}" for column in load.columns)
    dataset_id = await connection.fetchval(
        "INSERT INTO sluice.datasets (account_id, name, columns) VALUES ($1, $2, $3)"
        " ON CONFLICT (account_id, name) DO NOTHING RETURNING dataset_id",
        load.account_id,
        dataset,
        [column.as_json() for column in load.columns],
    )
    if dataset_id is None:
        if mode == "replace":
            raise LockTimeout(
                f"another import has just made the dataset {dataset!r}; it is replaced at the next attempt"
            )
        raise Conflict(f"another import has just made the dataset {dataset!r}; import with mode append or replace")
    await connection.execute(f"CREATE TABLE {parent} (_load bigint NOT NULL{definitions}) PARTITION BY LIST (_load)")
    return DatasetId(dataset_id)


async def _empty_dataset(connection: Connection, load: FinishedLoad, dataset_id: DatasetId, parent: str) -> list[int]:
    """Swap out all loads and take over the new load's columns: the rows of before are gone when this commits."""
    rows = await connection.fetch("SELECT load_id FROM sluice.loads WHERE dataset_id = $1 FOR UPDATE", dataset_id)
    replaced = [row["load_id"] for row in rows]
    for load_id in replaced:
        await _detach(connection, parent, LoadId(load_id))
    # Dropping and making it anew would lose grants and views of the users' own: change the columns in place.
    old = await connection.fetchval("SELECT columns FROM sluice.datasets WHERE dataset_id = $1", dataset_id)
    new = [column.as_json() for column in load.columns]
    if old != new:
        kept = {column["name"] for column in new if column in old}
        for column in old:
            if column["name"] not in kept:
                await connection.execute(f"ALTER TABLE {parent} DROP COLUMN {quoted(column['name'])}")
        for column in load.columns:
            if column.name not in kept:
                await connection.execute(f"ALTER TABLE {parent} ADD COLUMN {quoted(column.name)} {column.type}")
        await connection.execute("UPDATE sluice.datasets SET columns = $2 WHERE dataset_id = $1", dataset_id, new)
    return replaced


async def _fit_columns(
    connection: Connection, dataset: Dataset, load: FinishedLoad, parent: str, *, evolve: bool
) -> None:
    """Check the load's columns against the dataset's; with `evolve` add what is new, on both sides."""
    missing, new = compare_columns(dataset.columns, load.columns, evolve=evolve)
    table = f"{LOADS_SCHEMA}.{load_table(load.load_id)}"
    for column in missing:
        await connection.execute(f"ALTER TABLE {table} ADD COLUMN {quoted(column.name)} {column.type}")
    for column in new:
        await connection.execute(f"ALTER TABLE {parent} ADD COLUMN {quoted(column.name)} {column.type}")
    if new:
        await connection.execute(
            "UPDATE sluice.datasets SET columns = $2 WHERE dataset_id = $1",
            dataset.dataset_id,
            [column.as_json() for column in (*dataset.columns, *new)],
        )


def compare_columns(
    dataset: Sequence[Column], load: Sequence[Column], *, evolve: bool
) -> tuple[list[Column], list[Column]]:
    """What the load lacks and what it has besides the dataset. Raises SchemaMismatch where they cannot be joined."""
    theirs = {column.name: column.type for column in dataset}
    ours = {column.name: column.type for column in load}
    if changed := [f"{n!r}: {theirs[n]} there, {t} here" for n, t in ours.items() if n in theirs and theirs[n] != t]:
        raise SchemaMismatch(
            f"columns have another type than in the dataset: {'; '.join(changed)}; name the types in columns"
        )
    missing = [column for column in dataset if column.name not in ours]
    new = [column for column in load if column.name not in theirs]
    if not evolve and (missing or new):
        faults = [f"missing {column.name!r}" for column in missing] + [f"unknown {column.name!r}" for column in new]
        raise SchemaMismatch(
            f"the file's columns are not those of the dataset: {', '.join(faults)}; "
            "schema_mode evolve adds new columns and leaves missing ones null"
        )
    return missing, new


async def _detach(connection: Connection, parent: str, load_id: LoadId) -> None:
    await connection.execute(f"ALTER TABLE {parent} DETACH PARTITION {LOADS_SCHEMA}.{load_table(load_id)}")
    await connection.execute(
        "UPDATE sluice.loads SET dataset_id = NULL, detached_at = now() WHERE load_id = $1", load_id
    )


_PURGEABLE = """
SELECT load_id FROM sluice.loads l
WHERE detached_at IS NOT NULL AND load_id > $1
  AND NOT EXISTS (SELECT FROM sluice.load_pins p WHERE p.load_id = l.load_id)
ORDER BY load_id LIMIT 1 FOR UPDATE SKIP LOCKED
"""


class PgCatalog:
    """The `Catalog` port on PostgreSQL."""

    def __init__(self, database: Database, *, lock_seconds: float = 5.0) -> None:
        self._database = database
        self._lock_seconds = lock_seconds

    async def revert(self, account_id: AccountId, dataset: str, load_id: LoadId) -> None:
        async with self._database.transaction() as connection:
            found, parent = await self._locked(connection, account_id, dataset)
            if not await connection.fetchval(
                "SELECT true FROM sluice.loads WHERE load_id = $1 AND dataset_id = $2 FOR UPDATE",
                load_id,
                found.dataset_id,
            ):
                raise NotFound(f"the dataset {dataset!r} has no load {load_id}")
            await _detach(connection, parent, load_id)
            await connection.execute(
                "UPDATE sluice.datasets SET updated_at = now() WHERE dataset_id = $1", found.dataset_id
            )
        await self._purge_now()

    async def drop(self, account_id: AccountId, dataset: str) -> None:
        async with self._database.transaction() as connection:
            found, parent = await self._locked(connection, account_id, dataset)
            loads = await connection.fetch(
                "SELECT load_id FROM sluice.loads WHERE dataset_id = $1 FOR UPDATE", found.dataset_id
            )
            for row in loads:
                await _detach(connection, parent, LoadId(row["load_id"]))
            await connection.execute(f"DROP TABLE {parent}")
            await connection.execute("DELETE FROM sluice.datasets WHERE dataset_id = $1", found.dataset_id)
        await self._purge_now()

    async def _purge_now(self) -> None:
        """The user's change is committed: what cannot be dropped now is dropped by the control service."""
        try:
            await self.purge()
        except (Retryable, Conflict) as error:
            log.info("a detached load is dropped later", error=error.detail)

    async def purge(self) -> int:
        """Drop the tables of detached loads that nobody reads any more; answers how many.

        One that cannot be dropped now does not keep the others: its error is raised at the end.
        """
        purged, load_id = 0, 0
        trouble: SluiceError | None = None
        while True:
            try:
                async with self._database.transaction() as connection:
                    await set_lock_timeout(connection, self._lock_seconds)
                    load_id = await connection.fetchval(_PURGEABLE, load_id)
                    if load_id is None:
                        break
                    await drop_load_table(connection, LoadId(load_id))
                    await connection.execute("DELETE FROM sluice.loads WHERE load_id = $1", load_id)
                purged += 1
            except (LockTimeout, Conflict) as error:
                trouble = error
        if trouble is not None:
            raise trouble
        return purged

    async def _locked(self, connection: Connection, account_id: AccountId, dataset: str) -> tuple[Dataset, str]:
        await set_lock_timeout(connection, self._lock_seconds)
        found = await find_dataset(connection, account_id, dataset, for_update=True)
        if found is None:
            raise NotFound(f"there is no dataset {dataset!r}")
        username = await connection.fetchval("SELECT username FROM sluice.accounts WHERE account_id = $1", account_id)
        return found, f"{quoted(data_schema(username))}.{quoted(dataset)}"
