"""What an export reads, decided once: loads never change, so the list of loads is the snapshot, for days.

Positions count item pointers: those of all blocks of all loads in order, one before them for the file's head and one
behind them for its tail. So a range of positions is a range of TIDs, and can be as small as one row.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from export_worker import session
from export_worker.selection import check_values, utc
from shared.adapters.catalog import LOADS_SCHEMA, Column, find_dataset, load_table
from shared.domain.errors import LockTimeout, NotFound
from shared.domain.export_params import ExportFormat, ExportRequest
from shared.domain.task import DatasetId, LoadId, Task
from shared.ports.database import Connection

# More than fit into a block of 32 KiB, PostgreSQL's largest (MaxHeapTuplesPerPage).
PLACES_PER_BLOCK = 2048
HEAD = 1
TAIL = 1
_WITH_NAMES = (ExportFormat.JSONL, ExportFormat.JSONL_GZ)


class ReadRange(NamedTuple):
    """Positions `start` to `end` of the file, all in one load, which begins at position `base`."""

    load_id: LoadId
    base: int
    start: int
    end: int

    def tid(self, position: int) -> str:
        block, place = divmod(position - self.base, PLACES_PER_BLOCK)
        return f"({block},{place})"

    def source(self, where: str) -> str:
        """Its rows as SQL, from FROM on; `where` begins with AND or is empty."""
        table = f"{LOADS_SCHEMA}.{load_table(self.load_id)}"
        return f"FROM {table} WHERE ctid >= '{self.tid(self.start)}'::tid AND ctid < '{self.tid(self.end)}'::tid{where}"

    def half(self) -> "ReadRange":
        """The first half, cut at the roundest position inside: a multiple of the largest power of two."""
        first, last = self.start - self.base, self.end - self.base - 1
        unit = 1 << ((first ^ last).bit_length() - 1)
        return self._replace(end=self.base + last - last % unit)

    def after(self, position: int) -> "ReadRange":
        """What to read at a cut: as much as was cut off there, whoever comes to it and whatever was read before."""
        offset = position - self.base
        return self._replace(start=position, end=min(self.end, position + (offset & -offset)))


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SnapshotLoad(_Frozen):
    load_id: LoadId
    blocks: int
    blocks_per_read: int


class Plan(_Frozen):
    """Everything that must be the same at every claim, so that a part done again has the same bytes."""

    dataset: str
    columns: tuple[Column, ...]
    loads: tuple[SnapshotLoad, ...]
    part_bytes: int
    file_name: str
    rows_known: int | None

    types: dict[str, str]
    surveyed: int = Field(
        default=HEAD, description="The position up to which all rows were looked at, where the format asks for it."
    )
    surveyed_rows: int = 0
    extent: dict[str, tuple[int, int] | None] = Field(
        default_factory=dict,
        description="The most digits behind and before the point in each numeric column so far, None once it has NaN.",
    )
    digits: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="Precision and scale of numeric columns, where the format asks for them."
    )

    @property
    def data_end(self) -> int:
        return HEAD + sum(load.blocks for load in self.loads) * PLACES_PER_BLOCK

    @property
    def end(self) -> int:
        return self.data_end + TAIL

    def ranges(self, position: int) -> Iterator[ReadRange]:
        """What is read in one go, from `position` on, in order; the same wherever one starts."""
        base = HEAD
        for load in self.loads:
            end = base + load.blocks * PLACES_PER_BLOCK
            step = load.blocks_per_read * PLACES_PER_BLOCK
            while (position := max(position, base)) < end:
                cell = (position - base) // step
                what = ReadRange(load.load_id, base, base + cell * step, min(end, base + (cell + 1) * step))
                if position > what.start:
                    what = what.after(position)
                yield what
                position = what.end
            base = end


_LOADS = f"""
SELECT load_id, rows, bytes, pg_relation_size(t) / current_setting('block_size')::bigint AS blocks,
    pg_table_size(t) AS table_bytes
FROM sluice.loads, to_regclass('{LOADS_SCHEMA}.load_' || load_id) t
WHERE dataset_id = $1 AND detached_at IS NULL AND ($2::bigint IS NULL OR load_id = $2)
    AND ($3::timestamptz IS NULL OR attached_at >= $3) AND ($4::timestamptz IS NULL OR attached_at < $4)
ORDER BY load_id
"""  # noqa: S608 - a constant

_PIN = """
INSERT INTO sluice.load_pins (load_id, task_id)
SELECT load_id, $2 FROM sluice.loads WHERE load_id = ANY($1) AND detached_at IS NULL FOR KEY SHARE
"""


async def take(connection: Connection, task: Task, params: ExportRequest, *, part_bytes: int) -> Plan:
    """Look at the dataset as it is at one moment. Raises NotFound, InvalidRequest and LockTimeout."""
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await session.prepare(connection, "[]")
        return await _taken(connection, task, params, part_bytes)


async def _taken(connection: Connection, task: Task, params: ExportRequest, part_bytes: int) -> Plan:
    dataset = await find_dataset(connection, task.account_id, params.dataset)
    if dataset is None:
        raise NotFound(f"there is no dataset {params.dataset!r} any more")
    types = {column.name: column.type for column in dataset.columns}
    params.check(types)
    await check_values(connection, params.conditions, types)
    by_load_time = params.time_column is None
    rows = await connection.fetch(
        _LOADS,
        dataset.dataset_id,
        params.load_id,
        utc(params.from_date) if by_load_time else None,
        utc(params.to_date) if by_load_time else None,
    )
    if params.load_id is not None and not rows and not await _has_load(connection, dataset.dataset_id, params.load_id):
        raise NotFound(f"the dataset {params.dataset!r} has no load {params.load_id}")
    columns = _chosen(dataset.columns, params.columns)
    # JSON repeats the names, which may well be longer than the values.
    name_bytes = sum(len(f'"{column.name}":'.encode()) for column in columns) if params.format in _WITH_NAMES else 0
    loads = []
    for row in rows:
        if row["blocks"] is None:
            raise LockTimeout(f"a load of {params.dataset!r} was being dropped; look again")
        size = max(row["bytes"], row["table_bytes"]) + row["rows"] * name_bytes
        bytes_per_block = size / max(1, row["blocks"])
        # A little more than a part, so that one read mostly fills one.
        aim = round(1.1 * part_bytes / max(1.0, bytes_per_block))
        loads.append(SnapshotLoad(load_id=LoadId(row["load_id"]), blocks=row["blocks"], blocks_per_read=max(1, aim)))
    filtered = params.conditions or params.time_column
    rows_known = None if filtered else sum(row["rows"] for row in rows)
    if rows_known is not None and params.limit is not None:
        rows_known = min(rows_known, params.limit)
    return Plan(
        dataset=params.dataset,
        columns=columns,
        loads=tuple(loads),
        part_bytes=part_bytes,
        file_name=params.file_name or f"{params.dataset}-{task.task_id}.{params.format}",
        rows_known=rows_known,
        types=types,
    )


async def pin(connection: Connection, task: Task, plan: Plan) -> None:
    """Keep the loads' tables until the export has ended. Raises LockTimeout when one was taken away meanwhile."""
    load_ids = [load.load_id for load in plan.loads]
    status = await connection.execute(_PIN, load_ids, task.task_id)
    if status != f"INSERT 0 {len(load_ids)}":
        raise LockTimeout(f"the dataset {plan.dataset!r} was being changed; look again")


def _chosen(columns: Sequence[Column], names: Sequence[str] | None) -> tuple[Column, ...]:
    by_name = {column.name: column for column in columns}
    return tuple(columns) if names is None else tuple(by_name[name] for name in names)


async def _has_load(connection: Connection, dataset_id: DatasetId, load_id: int) -> bool:
    found = await connection.fetchval(
        "SELECT true FROM sluice.loads WHERE dataset_id = $1 AND load_id = $2", dataset_id, load_id
    )
    return bool(found)
