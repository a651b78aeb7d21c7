"""Guesses the type of a column from sampled values: only what every value proves, `text` in doubt."""

import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime

from shared.domain.csv_options import ColumnType

# No plus before: what is written with one may be a telephone number.
_INTEGER = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
_DECIMAL = re.compile(r"-?(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)", re.ASCII)
_FLOAT = re.compile(
    r"-?(?:(?:(?:0|[1-9]\d*)(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?|inf(?:inity)?)|nan",
    re.ASCII | re.IGNORECASE,
)
_DATE = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:[.]\d{1,9})?)?", re.ASCII)
_OFFSET = re.compile(r" ?(?:Z|[+-]\d\d(?::?\d\d)?)\Z", re.ASCII)

# What files write for "no value". One of them becomes COPY's null string when that gives columns a type.
NULL_WORDS = (
    "",
    "NA",
    "N/A",
    "#N/A",
    "n/a",
    "NULL",
    "Null",
    "null",
    "\\N",
    "None",
    "none",
    "nan",
    "NaN",
    "-",
    "?",
)


def _is_bigint(value: str) -> bool:
    return bool(_INTEGER.fullmatch(value)) and len(value) <= 20 and -(2**63) <= int(value) < 2**63


def _is_numeric(value: str) -> bool:
    return len(value) <= 1000 and bool(_DECIMAL.fullmatch(value))


def _is_double(value: str) -> bool:
    if not _FLOAT.fullmatch(value):
        return False
    number = abs(float(value))
    # PostgreSQL refuses what would overflow or vanish.
    if number == float("inf"):
        return "inf" in value.lower()
    return number != 0 or not re.search(r"[1-9]", re.split("[eE]", value)[0])


def _is_date(value: str) -> bool:
    return bool(_DATE.fullmatch(value)) and _parses(date.fromisoformat, value)


def _is_timestamp(value: str) -> bool:
    return bool(_TIMESTAMP.fullmatch(value)) and _parses(datetime.fromisoformat, value)


def _is_timestamptz(value: str) -> bool:
    offset = _OFFSET.search(value)
    if offset is None or not _is_timestamp(value[: offset.start()]):
        return False
    hours = re.search(r"\d\d", offset.group())
    return hours is None or int(hours.group()) < 16


def _parses(parse: Callable[[str], object], value: str) -> bool:
    try:
        parse(value)
    except ValueError:
        return False
    return True


_TESTS: tuple[tuple[ColumnType, Callable[[str], bool]], ...] = (
    (ColumnType.BIGINT, _is_bigint),
    (ColumnType.NUMERIC, _is_numeric),
    (ColumnType.DOUBLE, _is_double),
    (ColumnType.DATE, _is_date),
    (ColumnType.TIMESTAMP, _is_timestamp),
    (ColumnType.TIMESTAMPTZ, _is_timestamptz),
)


def column_type(values: Iterable[str], null: str = "") -> ColumnType:
    """The narrowest type that takes every value except the null string; `text` if there is none."""
    distinct = {value.strip(" ") for value in values if value != null}
    if not distinct or "" in distinct:
        return ColumnType.TEXT
    for type_, accepts in _TESTS:
        if all(accepts(value) for value in distinct):
            return type_
    words = {value.lower() for value in distinct}
    # A lone letter may be the start of many codes; `t` with `f` is how PostgreSQL itself writes booleans.
    if words <= {"true", "false"} or words == {"t", "f"}:
        return ColumnType.BOOLEAN
    return ColumnType.TEXT


def fits(value: str, type_: ColumnType) -> bool:
    """Whether one value alone would let a column be of that type."""
    if type_ is ColumnType.BOOLEAN:
        return value.strip(" ").lower() in ("true", "false", "t", "f")
    return type_ is ColumnType.TEXT or any(accepts(value.strip(" ")) for t, accepts in _TESTS if t is type_)


def best_null(columns: Sequence[Sequence[str]]) -> str:
    """The null string that gives most columns a type; the empty string unless another is better."""

    def typed(null: str) -> int:
        return sum(column_type(values, null) is not ColumnType.TEXT for values in columns)

    seen = {value for values in columns for value in set(values)}
    return max((word for word in NULL_WORDS if word in seen or word == ""), key=typed)
