"""Which rows an export wants, as SQL. Values travel as one setting of the session and never become a part of it.

COPY takes no parameters. Texts could be quoted into the query, but what a user wrote has no business there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson

from shared.adapters.postgres import quoted
from shared.domain.errors import InvalidData, InvalidRequest
from shared.domain.export_params import Condition, ExportRequest, Operator, Value
from shared.ports.database import Connection

VALUES_SETTING = "sluice.export_values"
_VALUES = f"current_setting('{VALUES_SETTING}')::jsonb"

_SQL = {
    Operator.EQ: "=",
    Operator.NE: "<>",
    Operator.LT: "<",
    Operator.LE: "<=",
    Operator.GT: ">",
    Operator.GE: ">=",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """`where` begins with AND, or is empty; `values` is what VALUES_SETTING must hold when it runs."""

    where: str
    values: str


def select(params: ExportRequest, types: Mapping[str, str]) -> Selection:
    """The conditions and the time range of a request that was checked against these columns."""
    sql: list[str] = []
    values: list[str | list[str]] = []

    def value(kind: str, written: str) -> str:
        values.append(written)
        # A subquery is computed once; the cast alone would be computed for each row.
        return f"(SELECT ({_VALUES} ->> {len(values) - 1})::{kind})"

    for condition in params.conditions:
        name, kind = quoted(condition.column), types[condition.column]
        match condition.op:
            case Operator.IS_NULL:
                sql.append(f"{name} IS {'NOT ' if condition.value is False else ''}NULL")
            case Operator.IN:
                values.append([_written(item) for item in condition.values])
                array = f"jsonb_array_elements_text({_VALUES} -> {len(values) - 1})"
                items = f"SELECT item::{kind} FROM {array} item"  # noqa: S608 - a column's type
                # IS TRUE keeps the planner from joining the list, which might change the order of the rows.
                sql.append(f"({name} IN ({items})) IS TRUE")
            case comparison:
                sql.append(f"{name} {_SQL[comparison]} {value(kind, _written(condition.values[0]))}")
    if params.time_column is not None:
        name = quoted(params.time_column)
        # A date compares with a timestamp; as a date the bound would lose its time of day.
        kind = "timestamptz" if types[params.time_column] == "timestamptz" else "timestamp"
        if params.from_date is not None:
            sql.append(f"{name} >= {value(kind, params.from_date.isoformat())}")
        if params.to_date is not None:
            sql.append(f"{name} < {value(kind, params.to_date.isoformat())}")
    return Selection("".join(f" AND {each}" for each in sql), orjson.dumps(values).decode())


async def check_values(connection: Connection, conditions: Sequence[Condition], types: Mapping[str, str]) -> None:
    """Ask the server whether each value is one of its column's type. Raises InvalidRequest."""
    for number, condition in enumerate(conditions):
        kind = types[condition.column]
        try:
            await connection.fetchval(
                f"SELECT count(item::{kind}) FROM unnest($1::text[]) item",  # noqa: S608 - a column's type
                [_written(item) for item in condition.values],
            )
        except InvalidData as error:
            raise InvalidRequest(
                f"condition {number + 1}: the column {condition.column!r} is {kind}: {error.detail}",
                errors=[{"in": "body", "field": f"conditions.{number}.value", "fault": error.detail}],
            ) from error


def utc(time: datetime | None) -> datetime | None:
    """A time without a zone is UTC."""
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time


def _written(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
