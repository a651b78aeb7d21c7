"""What some formats must know of all rows before the first is written: how many there are, the digits of numbers.

Considerations
- A look at all rows takes as long as their export. So it goes by the same ranges, each in a transaction of its own
  that holds up nobody; the plan keeps how far it came, and it runs where a job's batches would: pauses, aborts and the
  ends of slices stop it at once, and the next claim goes on.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from decimal import Decimal
from time import monotonic
from typing import Any

from export_worker import session
from export_worker.selection import Selection, select
from export_worker.snapshot import Plan, ReadRange
from shared.adapters.postgres import quoted
from shared.domain.checkpoint import Checkpoint
from shared.domain.errors import InvalidRequest
from shared.domain.export_params import ExportFormat, ExportRequest
from shared.ports.database import Connection, Database
from shared.ports.kinds import Batch, Job

# Excel's own limit, the header included ("Excel specifications and limits").
MAX_ROWS = 1_048_576
# Decimals of 18 digits are stored as 64-bit numbers, those of 38 are the longest that all readers know.
_DECIMAL_DIGITS = (18, 38)
# Two answers for each: a query has 1,664 at most (MaxTupleAttributeNumber).
_COLUMNS_AT_ONCE = 800
_KEEP_SECONDS = 2.0


def numeric_columns(params: ExportRequest, plan: Plan) -> list[str]:
    """Those whose digits the format must know."""
    wanted = params.format is ExportFormat.PARQUET
    return [column.name for column in plan.columns if wanted and column.type == "numeric"]


def is_needed(params: ExportRequest, plan: Plan) -> bool:
    """Whether there are rows that must be looked at before the first is written."""
    counts = params.format is ExportFormat.XLSX and plan.rows_known is None
    return plan.surveyed < plan.end and (counts or bool(numeric_columns(params, plan)))


def check_rows(params: ExportRequest, rows: int | None) -> None:
    """Raises InvalidRequest for more than the format can hold."""
    if params.format is ExportFormat.XLSX and rows is not None and rows >= MAX_ROWS:
        raise InvalidRequest(
            f"a workbook holds {MAX_ROWS - 1} rows below its header, and {rows} are to be exported; choose fewer "
            "with conditions or limit, or export as csv or parquet",
            rows=rows,
        )


async def survey(
    database: Database, params: ExportRequest, plan: Plan, keep: Callable[[Plan], Awaitable[None]]
) -> Plan:
    """The plan with what the format needs besides; what is found out is given to `keep` now and then, and at the end.

    Raises InvalidRequest for rows that the format cannot hold.
    """
    selection, names = select(params, plan.types), numeric_columns(params, plan)
    nothing: tuple[int, int] | None = (0, 0)
    extent = {name: plan.extent.get(name, nothing) for name in names}
    rows, kept = plan.surveyed_rows, monotonic()
    for what in plan.ranges(plan.surveyed):
        async with database.transaction() as connection:
            await session.prepare(connection, selection.values)
            if names:
                async for name, digits in _digits(connection, what, selection, names):
                    extent[name] = _widest(extent[name], digits)
            else:
                [count] = await _asked(connection, what, selection, ["count(*)"])
                rows += count
        if what.end < plan.data_end and monotonic() - kept > _KEEP_SECONDS:
            await keep(plan.model_copy(update={"surveyed": what.end, "extent": extent, "surveyed_rows": rows}))
            kept = monotonic()
    found: dict[str, Any] = {"surveyed": plan.end, "extent": {}}
    if names:
        found["digits"] = dict(_decimals(extent))
    else:
        found["rows_known"] = rows if params.limit is None else min(rows, params.limit)
        check_rows(params, found["rows_known"])
    plan = plan.model_copy(update=found)
    await keep(plan)
    return plan


async def _digits(
    connection: Connection, what: ReadRange, selection: Selection, names: Sequence[str]
) -> AsyncIterator[tuple[str, tuple[int, int] | None]]:
    """The most digits behind and before the point; None for what is not finite."""
    for start in range(0, len(names), _COLUMNS_AT_ONCE):
        some = names[start : start + _COLUMNS_AT_ONCE]
        wanted = [f"{function}({quoted(name)}))" for name in some for function in ("max(scale", "max(abs")]
        found = await _asked(connection, what, selection, wanted)
        for name, scale, largest in zip(some, found[::2], found[1::2], strict=True):
            if largest is not None:
                yield name, (scale, _whole_digits(largest)) if largest.is_finite() else None


def _whole_digits(value: Decimal) -> int:
    return max(0, value.adjusted() + 1) if value else 0


def _widest(one: tuple[int, int] | None, other: tuple[int, int] | None) -> tuple[int, int] | None:
    return None if one is None or other is None else (max(one[0], other[0]), max(one[1], other[1]))


def _decimals(extent: dict[str, tuple[int, int] | None]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Precision and scale that hold all values, for the columns where that is possible."""
    for name, (scale, whole) in ((name, digits) for name, digits in extent.items() if digits is not None):
        precision = next((digits for digits in _DECIMAL_DIGITS if digits >= whole + scale), None)
        if precision is not None:
            yield name, (precision, scale)


async def _asked(
    connection: Connection, what: ReadRange, selection: Selection, aggregates: Sequence[str]
) -> tuple[Any, ...]:
    query = f"SELECT {', '.join(aggregates)} {what.source(selection.where)}"
    row = await connection.fetchrow(query)
    assert row is not None, "aggregates always answer"
    return tuple(row.values())


class SurveyedJob:
    """The `Job` of an export that begins with a survey: what `make` answers once its rows are looked at."""

    def __init__(self, make: Callable[[], Awaitable[Job]]) -> None:
        self._make = make
        self._job: Job | None = None

    async def batches(self, checkpoint: Checkpoint) -> AsyncIterator[Batch]:
        if self._job is None:
            self._job = await self._make()
        async with aclosing(self._job.batches(checkpoint)) as batches:  # type: ignore[type-var]
            async for batch in batches:
                yield batch

    async def run(self, batch: Batch) -> None:
        await self._made.run(batch)

    async def seal(self) -> None:
        if self._job is not None:
            await self._job.seal()

    async def finish(self) -> None:
        await self._made.finish()

    async def publish(self, connection: Connection) -> dict[str, Any]:
        return await self._made.publish(connection)

    @property
    def _made(self) -> Job:
        assert self._job is not None, "batches() comes first"
        return self._job
