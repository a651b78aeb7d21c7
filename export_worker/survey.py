"""What some formats must know of all rows before the first is written: how many there are, the digits of numbers."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from export_worker.selection import VALUES_SETTING, select
from export_worker.snapshot import Plan
from shared.adapters.catalog import LOADS_SCHEMA, load_table
from shared.adapters.postgres import quoted
from shared.domain.errors import InvalidRequest
from shared.domain.export_params import ExportFormat, ExportRequest
from shared.ports.database import Database

# Excel's own limit, the header included ("Excel specifications and limits").
MAX_ROWS = 1_048_576
# Decimals of 18 digits are stored as 64-bit numbers, those of 38 are the longest that all readers know.
_DECIMAL_DIGITS = (18, 38)


async def survey(database: Database, params: ExportRequest, plan: Plan) -> Plan:
    """The plan with what the format needs besides. Raises InvalidRequest for rows that the format cannot hold."""
    if params.format is ExportFormat.PARQUET:
        return plan.model_copy(update={"digits": await _digits(database, params, plan)})
    if params.format is ExportFormat.XLSX:
        rows = plan.rows_known
        if rows is None:
            rows = sum(count for (count,) in await _asked(database, params, plan, ["count(*)"]))
            rows = min(rows, params.limit or rows)
        if rows >= MAX_ROWS:
            raise InvalidRequest(
                f"a workbook holds {MAX_ROWS - 1} rows below its header, and {rows} are to be exported; choose fewer "
                "with conditions or limit, or export as csv or parquet",
                rows=rows,
            )
    return plan


async def _digits(database: Database, params: ExportRequest, plan: Plan) -> dict[str, tuple[int, int]]:
    """Precision and scale that hold all values of each numeric column, for those where that is possible."""
    names = [column.name for column in plan.columns if column.type == "numeric"]
    wanted = [f"{function}({quoted(name)}))" for name in names for function in ("max(scale", "max(abs")]
    answers = await _asked(database, params, plan, wanted) if names else []
    digits = {}
    for number, name in enumerate(names):
        found = [row[2 * number : 2 * number + 2] for row in answers if row[2 * number + 1] is not None]
        if not all(largest.is_finite() for _, largest in found):
            continue
        # What is not finite has no scale; nor has a column without values.
        scale = max((scale for scale, _ in found), default=0)
        whole = max((_whole_digits(largest) for _, largest in found), default=0)
        precision = next((digits for digits in _DECIMAL_DIGITS if digits >= whole + scale), None)
        if precision is not None:
            digits[name] = precision, scale
    return digits


def _whole_digits(value: Decimal) -> int:
    return len(str(int(value))) if value >= 1 else 0


async def _asked(
    database: Database, params: ExportRequest, plan: Plan, aggregates: Sequence[str]
) -> list[tuple[Any, ...]]:
    """The aggregates of each load's rows."""
    selection = select(params, plan.types)
    answers = []
    async with database.transaction() as connection:
        await connection.execute("SELECT set_config($1, $2, true)", VALUES_SETTING, selection.values)
        for load in plan.loads:
            table = f"{LOADS_SCHEMA}.{load_table(load.load_id)}"
            query = f"SELECT {', '.join(aggregates)} FROM {table} WHERE true{selection.where}"  # noqa: S608 - quoted names
            row = await connection.fetchrow(query)
            assert row is not None, "aggregates always answer"
            answers.append(tuple(row.values()))
    return answers
