"""What each Parquet type becomes in PostgreSQL, and how its values are written for COPY."""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import orjson
import pyarrow as pa

from shared.domain.csv_options import ColumnType
from shared.domain.errors import InvalidData
from upload_worker.column_names import column_names
from upload_worker.plan import Column

_Test = Callable[[pa.DataType], bool]


def _nested(type_: pa.DataType) -> bool:
    return bool(pa.types.is_nested(type_))


def _json(type_: pa.DataType) -> bool:
    return isinstance(type_, pa.JsonType)


def _uuid(type_: pa.DataType) -> bool:
    return isinstance(type_, pa.UuidType)


def _binary(type_: pa.DataType) -> bool:
    return _is_any(type_, "binary", "large_binary", "binary_view", "fixed_size_binary")


def _text(type_: pa.DataType) -> bool:
    return _is_any(type_, "string", "large_string", "string_view", "time", "null")


def _is_any(type_: pa.DataType, *names: str) -> bool:
    return any(getattr(pa.types, f"is_{name}")(type_) for name in names)


_TYPES: tuple[tuple[_Test, ColumnType], ...] = (
    (_json, ColumnType.JSONB),
    (_uuid, ColumnType.UUID),
    (pa.types.is_uint64, ColumnType.NUMERIC),
    (pa.types.is_integer, ColumnType.BIGINT),
    (pa.types.is_floating, ColumnType.DOUBLE),
    (pa.types.is_decimal, ColumnType.NUMERIC),
    (pa.types.is_boolean, ColumnType.BOOLEAN),
    (pa.types.is_date, ColumnType.DATE),
    (lambda type_: pa.types.is_timestamp(type_) and type_.tz is None, ColumnType.TIMESTAMP),
    (pa.types.is_timestamp, ColumnType.TIMESTAMPTZ),
    (_text, ColumnType.TEXT),
    (_binary, ColumnType.BYTEA),
    (_nested, ColumnType.JSONB),
)


def columns_of(schema: pa.Schema, given: Mapping[str, ColumnType]) -> tuple[list[Column], list[dict[str, Any]]]:
    """The columns for a file's schema, and notes.

    Raises InvalidData for types that PostgreSQL has nothing for, and for given columns that are not there.
    """
    names, notes = column_names(schema.names)
    if unknown := sorted(given.keys() - {*names, *schema.names}):
        raise InvalidData(
            f"The options give types for columns that the file does not have: {', '.join(unknown)}. "
            f"It has: {', '.join(names[:50])}.",
            columns=unknown,
        )
    columns = []
    for number, (name, field) in enumerate(zip(names, schema, strict=True), 1):
        type_ = _column_type(field)
        columns.append(
            Column(name=name, type=given.get(name) or given.get(field.name) or type_, source_name=field.name)
        )
        if pa.types.is_timestamp(field.type) and field.type.unit == "ns":
            notes.append({"column": number, "note": "PostgreSQL keeps microseconds: nanoseconds are rounded."})
    return columns, notes


def _column_type(field: pa.Field) -> ColumnType:
    value_type = _value_type(field.type)
    for fits, column_type in _TYPES:
        if fits(value_type):
            return column_type
    raise InvalidData(
        f"Column {field.name!r} is {field.type}, which PostgreSQL has no type for here. "
        "Write it as a number, a text or a timestamp.",
        column=field.name,
    )


def _value_type(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def writable(values: pa.Array) -> pa.Array:
    """The same values in a type that Arrow's CSV writer takes, in PostgreSQL's spelling."""
    type_ = values.type
    if pa.types.is_dictionary(type_):
        return writable(values.cast(type_.value_type))
    if _uuid(type_):
        return _each(values, str)
    if isinstance(type_, pa.ExtensionType | pa.BaseExtensionType):
        return writable(values.storage)
    if _nested(type_):
        return _each(values, _json_text)
    if _binary(type_):
        return _each(values, lambda value: "\\x" + value.hex())
    if pa.types.is_float16(type_):
        return values.cast(pa.float32())
    return values


def _each(values: pa.Array, write: Callable[[Any], str]) -> pa.Array:
    items = values.to_pylist(maps_as_pydicts="strict")
    return pa.array([None if item is None else write(item) for item in items], pa.large_string())


def _json_text(value: object) -> str:
    return orjson.dumps(value, _plain, orjson.OPT_NON_STR_KEYS).decode()


def _plain(value: object) -> object:
    """What JSON has no form for: decimals as numbers, digit by digit, bytes in hexadecimal, the rest as text."""
    if isinstance(value, Decimal):
        return orjson.Fragment(str(value)) if value.is_finite() else str(value)
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    return str(value)
