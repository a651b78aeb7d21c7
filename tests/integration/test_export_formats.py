"""Parquet and XLSX, as other programs read them: equal to what PostgreSQL says, and never fewer digits."""

import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import duckdb
import openpyxl
import pyarrow.parquet as pq
import pytest

from tests.exports import add_load, add_numbers, content, export, export_fails
from tests.faults.scene import Scene

COLUMNS = {
    "n": "bigint",
    "price": "numeric",
    "long": "numeric",
    "odd": "numeric",
    "share": "double precision",
    "yes": "boolean",
    "day": "date",
    "at": "timestamp",
    "at_zone": "timestamptz",
    "id": "uuid",
    "doc": "jsonb",
    "raw": "bytea",
    'Größe, "x" %s': "text",
}

ROWS = r"""
VALUES
    (1::bigint, 1.50::numeric, 12345678901234567890.5::numeric, 'NaN'::numeric, 0.1::float8, true, '2024-02-29'::date,
     '2024-02-29 23:59:59.999999'::timestamp, '2024-03-31 02:30:00+02'::timestamptz,
     'c0ffee00-0000-4000-8000-000000000000'::uuid, '{"a": [1, "é\n"]}'::jsonb, '\x00ff'::bytea, 'a'),
    (9223372036854775807, -1000000, 0, 1.5, 'NaN', false, '0001-01-01', '0001-01-01', '9999-12-31 23:59:59.999999+00',
     NULL, 'null', '', ''),
    (-5, NULL, NULL, 'Infinity', '-Infinity', NULL, '1900-02-28', NULL, NULL, NULL, '"\u2028"', NULL, NULL),
    (NULL, 0.05, NULL, NULL, 1e300, NULL, NULL, NULL, NULL, NULL, NULL, NULL, E'<&> "x"\n\r\t\x01 _x0041_ 日本語 🎉')
"""


async def test_parquet_keeps_types_and_values(exporting: Scene) -> None:
    await add_load(exporting, COLUMNS, ROWS)
    task = await export(exporting, format="parquet")
    body = await content(exporting, task)
    table = pq.read_table(io.BytesIO(body))
    assert [str(type_) for type_ in table.schema.types] == [
        "int64",
        "decimal128(18, 2)",
        "decimal128(38, 1)",
        "string",
        "double",
        "bool",
        "date32[day]",
        "timestamp[us]",
        "timestamp[us, tz=UTC]",
        "extension<arrow.uuid>",
        "extension<arrow.json>",
        "binary",
        "string",
    ]
    expected = await exporting.fetch(
        f'SELECT n, price, long, odd::text, share, yes, day, at, at_zone, id, doc::text, raw, "Größe, ""x"" %s"'
        f" FROM {exporting.table()} ORDER BY ctid"
    )
    assert comparable(table.to_pylist()) == comparable(expected)


def comparable(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """NaN equals itself."""
    return [tuple("NaN" if value != value else value for value in row.values()) for row in rows]


async def test_parquet_of_many_parts_is_one_file(exporting: Scene) -> None:
    await add_numbers(exporting, 100_000)
    # Texts that do not compress, so that there is more than one part.
    await add_load(
        exporting,
        {"n": "bigint", "filling": "text"},
        "SELECT n, string_agg(md5(n::text || k), '') FROM generate_series(100001, 160000) n, generate_series(1, 12) k"
        " GROUP BY n ORDER BY n",
    )
    task = await export(exporting, format="parquet")
    body = await content(exporting, task)
    assert len(body) > 2 * 5 * 2**20
    file = pq.ParquetFile(io.BytesIO(body))
    assert file.metadata.num_row_groups > 3
    assert file.read(["n"]).column(0).to_pylist() == list(range(1, 160_001))
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        assert file.read_row_group(number).num_rows == group.num_rows


async def test_duckdb_reads_parquet(exporting: Scene, tmp_path: Any) -> None:
    await add_load(exporting, COLUMNS, ROWS)
    path = tmp_path / "x.parquet"
    path.write_bytes(await content(exporting, await export(exporting, format="parquet")))
    relation = duckdb.sql(f"SELECT count(*), sum(price), epoch_us(max(at_zone)), max(day), max(id)::text FROM '{path}'")
    assert relation.fetchall() == [
        (
            4,
            Decimal("-999998.45"),
            253402300799999999,
            date(2024, 2, 29),
            "c0ffee00-0000-4000-8000-000000000000",
        )
    ]


@pytest.mark.parametrize("form", ["parquet", "xlsx"])
async def test_nothing_to_export_is_a_file_without_rows(exporting: Scene, form: str) -> None:
    load = await add_numbers(exporting, 10)
    none: list[dict[str, Any]] = [{"limit": 0}, {"conditions": [{"column": "n", "op": ">", "value": 10}]}, {}]
    for params in none:
        if not params:
            await exporting.catalog.revert(exporting.account_id, "data", load)
        body = await content(exporting, await export(exporting, format=form, **params))
        if form == "parquet":
            table = pq.read_table(io.BytesIO(body))
            assert (table.column_names, table.num_rows) == (["n", "filling"], 0)
        else:
            assert sheet(body) == [("n", "filling")]


@pytest.mark.parametrize("form", ["parquet", "xlsx"])
async def test_sixteen_hundred_numbers_fit_less_the_column_that_loads_have(exporting: Scene, form: str) -> None:
    numbers = [Decimal(number % 2) / 2 for number in range(1599)]
    columns = {f"c{number}": "numeric" for number in range(1599)}
    await add_load(exporting, columns, f"SELECT {', '.join(map(str, numbers))} FROM generate_series(1, 3)")
    body = await content(exporting, await export(exporting, format=form))
    if form == "parquet":
        table = pq.read_table(io.BytesIO(body))
        assert {str(type_) for type_ in table.schema.types} == {"decimal128(18, 0)", "decimal128(18, 1)"}
        assert [list(row.values()) for row in table.to_pylist()] == [numbers] * 3
    else:
        assert sheet(body) == [tuple(columns)] + [tuple(numbers)] * 3


@pytest.mark.parametrize("value", ["'infinity'", "'-infinity'", "'0044-03-15 BC'", "'10000-01-01'"])
async def test_times_that_parquet_cannot_hold_are_named(exporting: Scene, value: str) -> None:
    await add_load(exporting, {"day": "date"}, f"VALUES ({value}::date)")
    said = await export_fails(exporting, format="parquet")
    assert "column 'day' (date)" in said
    assert "csv" in said


async def test_digits_are_those_of_the_chosen_rows(exporting: Scene) -> None:
    await add_load(exporting, {"k": "bigint", "n": "numeric"}, "VALUES (1, 1.5), (2, 1e-20), (3, 1e40)")
    types = {}
    for most in (1, 2, 3):
        chosen = [{"column": "k", "op": "<=", "value": most}]
        body = await content(exporting, await export(exporting, format="parquet", conditions=chosen))
        table = pq.read_table(io.BytesIO(body))
        types[most] = str(table.schema.field("n").type)
        assert Decimal(str(table.column("n")[0])) == Decimal("1.5")
    assert types == {1: "decimal128(18, 1)", 2: "decimal128(38, 20)", 3: "string"}


# --- XLSX


def sheet(body: bytes) -> list[tuple[Any, ...]]:
    assert zipfile.ZipFile(io.BytesIO(body)).testzip() is None
    book = openpyxl.load_workbook(io.BytesIO(body))
    return list(book.active.iter_rows(values_only=True))


async def test_a_workbook_shows_what_the_dataset_holds(exporting: Scene) -> None:
    await add_load(exporting, COLUMNS, ROWS)
    header, first, second, third, fourth = sheet(await content(exporting, await export(exporting, format="xlsx")))
    assert header == tuple(COLUMNS)
    at = datetime(2024, 3, 1, 0, 0)  # noqa: DTZ001 - openpyxl rounds to milliseconds
    assert first == (
        1,
        1.5,
        "12345678901234567890.5",
        "NaN",
        0.1,
        True,
        datetime(2024, 2, 29),  # noqa: DTZ001 - cells have no zone
        at,
        datetime(2024, 3, 31, 0, 30),  # noqa: DTZ001
        "c0ffee00-0000-4000-8000-000000000000",
        '{"a": [1, "é\\n"]}',
        "\\x00ff",
        "a",
    )
    assert second[:8] == ("9223372036854775807", -1000000, 0, 1.5, "NaN", False, "0001-01-01", "0001-01-01 00:00:00")
    assert third[:8] == (-5, None, None, "Infinity", "-Infinity", None, "1900-02-28", None)
    assert fourth[0] is None
    assert fourth[4] == 1e300
    assert re.sub(r"_x([0-9A-F]{4})_", lambda found: chr(int(found[1], 16)), fourth[12]) == (
        '<&> "x"\n\r\t\x01 _x0041_ 日本語 🎉'
    )


async def test_a_workbook_of_many_parts_is_one_sheet(exporting: Scene) -> None:
    await add_load(
        exporting,
        {"n": "bigint", "filling": "text"},
        "SELECT n, string_agg(md5(n::text || k), '') FROM generate_series(1, 60000) n, generate_series(1, 12) k"
        " GROUP BY n ORDER BY n",
    )
    body = await content(exporting, await export(exporting, format="xlsx"))
    assert len(body) > 2 * 5 * 2**20
    assert zipfile.ZipFile(io.BytesIO(body)).testzip() is None
    book = openpyxl.load_workbook(io.BytesIO(body), read_only=True)
    numbers = [row[0] for row in book.active.iter_rows(min_row=2, max_col=1, values_only=True)]
    assert numbers == list(range(1, 60_001))


async def test_more_rows_than_a_workbook_holds_are_refused_before_anything_is_written(exporting: Scene) -> None:
    await add_load(exporting, {"n": "bigint"}, "SELECT n FROM generate_series(1, 1048576) n")
    said = await export_fails(exporting, format="xlsx")
    assert "1048575 rows" in said
    assert "1048576" in said
    said = await export_fails(exporting, format="xlsx", conditions=[{"column": "n", "op": ">", "value": 0}])
    assert "1048575 rows" in said


async def test_a_text_longer_than_a_cell_is_named(exporting: Scene) -> None:
    await add_load(exporting, {"long": "text"}, "VALUES (repeat('x', 32768))")
    assert "column 'long': a text has 32768 characters" in await export_fails(exporting, format="xlsx")
