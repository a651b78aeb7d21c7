"""Guesses the columns of a JSONL file from sampled objects: types that lose nothing, `text` or `jsonb` in doubt."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared.domain.csv_options import ColumnType
from shared.domain.errors import InvalidData
from upload_worker.column_names import column_names
from upload_worker.column_types import column_type
from upload_worker.jsonl_rows import Number
from upload_worker.plan import Column

# JSON has no numbers for these; what writes them at all writes them as words, quoted or not.
_NOT_FINITE = frozenset({"NaN", "Infinity", "-Infinity"})
# Of the types of text only these have one form that nothing else takes.
_TIMES = frozenset({ColumnType.DATE, ColumnType.TIMESTAMP, ColumnType.TIMESTAMPTZ})


def guess_columns(
    objects: Sequence[Mapping[str, Any]], given: Mapping[str, ColumnType]
) -> tuple[list[Column], list[dict[str, Any]]]:
    """A column for each key of the objects and of `given`, in the order in which they appear; and notes.

    Raises InvalidData for more columns than a table can have, or none.
    """
    values: dict[str, list[Any]] = {}
    for found in objects:
        for key, value in found.items():
            values.setdefault(key, []).append(value)
    # A key that no sampled line has may still come: its type can be given beforehand.
    legal, _ = column_names(list(values))
    keys = [*values, *(name for name in given if name not in {*values, *legal})]
    if not keys:
        raise InvalidData("The objects of the file have no keys: there is no column to import.")
    names, notes = column_names(keys)
    columns = []
    for name, key in zip(names, keys, strict=True):
        type_ = given.get(name) or given.get(key) or value_type(values.get(key, ()))
        columns.append(Column(name=name, type=type_, source_name=key))
    return columns, notes


def value_type(values: Sequence[Any]) -> ColumnType:
    """The type of a column with these decoded JSON values."""
    present = [value for value in values if value is not None]
    kinds = {type(value) for value in present}
    if kinds & {dict, list}:
        return ColumnType.JSONB
    if kinds == {bool}:
        return ColumnType.BOOLEAN
    if bool in kinds or not present:
        return ColumnType.TEXT
    if Number not in kinds:
        guess = column_type(present)
        return guess if guess in _TIMES else ColumnType.TEXT
    if any(type(value) is str and value not in _NOT_FINITE for value in present):
        return ColumnType.TEXT
    finite = [value for value in present if value not in _NOT_FINITE]
    guess = column_type(finite) if finite else ColumnType.DOUBLE
    if guess is ColumnType.BIGINT and len(finite) == len(present):
        return guess
    # What no double holds is exact in numeric, which also has NaN and infinity.
    return guess if guess is ColumnType.DOUBLE else ColumnType.NUMERIC
