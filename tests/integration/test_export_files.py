"""What an export writes, compared with PostgreSQL's own COPY and with SQL."""

import csv
import gzip
import io
import re
from typing import Any

import orjson
import pytest

from shared.domain.task import LoadId
from tests.exports import add_load, add_numbers, content, export, reference
from tests.faults.scene import Scene

ODD = {
    "n": "bigint",
    "plain": "text",
    'qu"ote, comma': "text",
    "cost$1": "numeric",
    "Größe %s {x}": "double precision",
    "yes": "boolean",
    "day": "date",
    "at": "timestamp",
    "at_zone": "timestamptz",
    "id": "uuid",
    "doc": "jsonb",
}

ODD_ROWS = r"""
VALUES
    (1::bigint, 'a', 'b', 1.50::numeric, 0.1::float8, true, '2024-02-29'::date, '2024-02-29 23:59:59.999999'::timestamp,
     '2024-03-31 02:30:00+02'::timestamptz, 'c0ffee00-0000-4000-8000-000000000000'::uuid, '{"a": [1, "é\n"]}'::jsonb),
    (2, '', NULL, 'NaN', 'NaN', false, 'infinity', '-infinity', 'infinity', NULL, 'null'),
    (3, NULL, '', '123456789012345678901234567890.123456789', '-Infinity', NULL, '0044-03-15 BC', '0001-01-01',
     '1969-12-31 23:59:59-11', NULL, '"\u2028"'),
    (4, E'line\nbreak', E'carriage\rreturn', NULL, 1e-300, NULL, NULL, NULL, NULL, NULL, NULL),
    (5, '\.', E'tab\t "quoted"', -0.0, '-0', NULL, NULL, NULL, NULL, NULL, '"\u0001\u0002"'),
    (6, '=1+1', '@SUM(A1)', -7, -7, NULL, NULL, NULL, NULL, NULL, NULL),
    (7, E'\x01\x02\x7f', '日本語 🎉', 0, 0, NULL, NULL, NULL, NULL, NULL, '{}'),
    (8, 'NULL', 'a;b', 0, 0, NULL, NULL, NULL, NULL, NULL, NULL)
"""


@pytest.fixture
async def odd(exporting: Scene) -> LoadId:
    """A load of values and names that are hard to write."""
    return await add_load(exporting, ODD, ODD_ROWS)


@pytest.mark.parametrize(
    ("options", "as_copy"),
    [
        ({}, {}),
        ({"header": False}, {"header": False}),
        ({"delimiter": ";", "null": "NULL"}, {"delimiter": ";", "null": "NULL"}),
        ({"delimiter": "\t", "null": "\\N"}, {"delimiter": "\t", "null": "\\N"}),
        ({"delimiter": "'", "quoting": "all"}, {"delimiter": "'", "force_quote": True}),
    ],
)
async def test_csv_is_what_copy_writes(
    exporting: Scene, odd: LoadId, options: dict[str, Any], as_copy: dict[str, Any]
) -> None:
    task = await export(exporting, csv=options)
    assert await content(exporting, task) == await reference(exporting, [odd], list(ODD), **as_copy)
    assert task.result is not None
    assert task.result["file_name"] == f"data-{task.task_id}.csv"


async def test_chosen_columns_come_in_the_chosen_order(exporting: Scene, odd: LoadId) -> None:
    names = ["cost$1", "n", 'qu"ote, comma']
    task = await export(exporting, columns=names)
    assert await content(exporting, task) == await reference(exporting, [odd], names)


async def test_a_single_column_of_nulls_and_end_marks_reads_back(exporting: Scene, odd: LoadId) -> None:
    task = await export(exporting, columns=["plain"])
    assert await content(exporting, task) == await reference(exporting, [odd], ["plain"])


async def test_json_lines_hold_what_row_to_json_says(exporting: Scene, odd: LoadId) -> None:
    task = await export(exporting, format="jsonl")
    lines = (await content(exporting, task)).decode().split("\n")
    async with exporting.database.transaction() as connection:
        await connection.execute("SET LOCAL TimeZone = 'UTC'")
        rows = await connection.fetch(f"SELECT row_to_json(r)::text AS line FROM sluice_loads.load_{odd} r ORDER BY n")
    assert lines == [row["line"].replace(f'"_load":{odd},', "") for row in rows] + [""]
    third = orjson.loads(lines[2])
    assert third["day"] == "0044-03-15 BC"
    assert "123456789012345678901234567890.123456789" in lines[2]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
async def test_gzip_holds_the_same_bytes(exporting: Scene, odd: LoadId, form: str) -> None:
    plain, packed = await export(exporting, format=form), await export(exporting, format=f"{form}.gz")
    assert gzip.decompress(await content(exporting, packed)) == await content(exporting, plain)


async def test_formulas_are_written_as_text_when_asked(exporting: Scene) -> None:
    texts = ["=1", "+1", "-1", "@a", "\ta", "\ra", "a=1", "'", "", "ok"]
    values = ", ".join("(E'" + text.replace("'", "''").encode("unicode_escape").decode() + "', -1)" for text in texts)
    await add_load(exporting, {"=name": "text", "minus": "bigint"}, f"VALUES {values}, (NULL, -1)")
    task = await export(exporting, csv={"escape_formulas": True})
    body = (await content(exporting, task)).decode()
    rows = list(csv.reader(io.StringIO(body, newline="")))
    assert rows[0] == ["'=name", "minus"]
    assert [row[0] for row in rows[1:]] == [f"'{t}" if re.match(r"[=+\-@\t\r]", t) else t for t in texts] + [""]
    assert all(line.startswith('"') for line in body.split("\n")[1:6])
    assert {row[1] for row in rows[1:]} == {"-1"}
    untouched = await export(exporting)
    assert [r[0] for r in csv.reader(io.StringIO((await content(exporting, untouched)).decode(), newline=""))][1:] == [
        *texts,
        "",
    ]


async def test_formulas_are_looked_for_where_there_is_no_text(exporting: Scene) -> None:
    load = await add_load(exporting, {"n": "bigint"}, "VALUES (-1)")
    task = await export(exporting, csv={"escape_formulas": True})
    assert await content(exporting, task) == await reference(exporting, [load], ["n"])


CONDITIONS: list[tuple[list[dict[str, Any]], str]] = [
    ([{"column": "n", "op": "=", "value": 3}], "n = 3"),
    ([{"column": "n", "op": "!=", "value": "3"}], "n <> 3"),
    ([{"column": "n", "op": ">=", "value": 3}, {"column": "n", "op": "<", "value": 6}], "n >= 3 AND n < 6"),
    ([{"column": "n", "op": "in", "value": [1, 8, 99]}], "n IN (1, 8)"),
    ([{"column": "plain", "op": "in", "value": ["\\.", "a", "x'); DROP TABLE sluice.tasks; --"]}], "n IN (1, 5)"),
    ([{"column": "plain", "op": "=", "value": "' OR true --"}], "false"),
    ([{"column": "plain", "op": "is_null"}], "n = 3"),
    ([{"column": "plain", "op": "is_null", "value": False}], "n <> 3"),
    ([{"column": "cost$1", "op": ">", "value": "123456789012345678901234567890.1"}], "n IN (2, 3)"),
    ([{"column": "cost$1", "op": "=", "value": 1.5}], "n = 1"),
    ([{"column": "cost$1", "op": "=", "value": 'x" OR "n" = "n'}], "error"),
    ([{"column": "Größe %s {x}", "op": "=", "value": "NaN"}], "n = 2"),
    ([{"column": "yes", "op": "=", "value": False}], "n = 2"),
    ([{"column": "day", "op": "=", "value": "2024-02-29"}], "n = 1"),
    ([{"column": "at_zone", "op": "=", "value": "2024-03-31T00:30:00Z"}], "n = 1"),
    ([{"column": "at_zone", "op": "=", "value": "2024-03-31 00:30:00"}], "n = 1"),
    ([{"column": "id", "op": "=", "value": "C0FFEE00-0000-4000-8000-000000000000"}], "n = 1"),
    ([{"column": "doc", "op": "is_null"}], "doc IS NULL"),
    ([{"column": "plain", "op": "=", "value": "=1+1"}, {"column": "n", "op": "is_null"}], "false"),
]


@pytest.mark.parametrize(("conditions", "where"), [case for case in CONDITIONS if case[1] != "error"])
async def test_conditions_select_what_sql_selects(
    exporting: Scene, odd: LoadId, conditions: list[dict[str, Any]], where: str
) -> None:
    task = await export(exporting, conditions=conditions)
    assert await content(exporting, task) == await reference(exporting, [odd], list(ODD), where)


@pytest.mark.parametrize(
    ("asked", "where"),
    [
        ({"time_column": "day", "from_date": "2024-02-29"}, "n IN (1, 2)"),
        ({"time_column": "day", "from_date": "2024-02-29T10:00:00"}, "n = 2"),
        ({"time_column": "day", "to_date": "2024-02-29"}, "n = 3"),
        ({"time_column": "at", "from_date": "0001-01-01", "to_date": "2024-03-01"}, "n IN (1, 3)"),
        ({"time_column": "at_zone", "from_date": "2024-03-31T02:30:00+02:00"}, "n IN (1, 2)"),
        ({"time_column": "at_zone", "from_date": "2024-03-31", "to_date": "2024-03-31T00:30:00"}, "false"),
    ],
)
async def test_a_time_range_is_from_and_before(
    exporting: Scene, odd: LoadId, asked: dict[str, Any], where: str
) -> None:
    task = await export(exporting, **asked)
    assert await content(exporting, task) == await reference(exporting, [odd], list(ODD), where)


async def test_a_range_of_load_time_chooses_loads(exporting: Scene) -> None:
    loads = [await add_numbers(exporting, 10) for _ in range(3)]
    times = [
        await exporting.value("SELECT attached_at FROM sluice.loads WHERE load_id = $1", load_id) for load_id in loads
    ]
    task = await export(exporting, from_date=times[1].isoformat(), to_date=times[2].isoformat())
    assert await content(exporting, task) == await reference(exporting, loads[1:2], ["n", "filling"])


async def test_loads_come_in_order_and_one_can_be_chosen(exporting: Scene) -> None:
    loads = [await add_numbers(exporting, rows) for rows in (30_000, 1, 0, 30_000)]
    task = await export(exporting)
    assert await content(exporting, task) == await reference(exporting, loads, ["n", "filling"])
    one = await export(exporting, load_id=loads[1])
    assert await content(exporting, one) == await reference(exporting, loads[1:2], ["n", "filling"])


async def test_a_column_that_came_later_is_empty_in_older_loads(exporting: Scene) -> None:
    first = await add_load(exporting, {"a": "bigint"}, "VALUES (1), (2)")
    second = await add_load(exporting, {"b": "text", "a": "bigint"}, "VALUES ('x', 3)")
    third = await add_load(exporting, {"c": "text"}, "VALUES ('y')")
    task = await export(exporting)
    assert await content(exporting, task) == await reference(exporting, [first, second, third], ["a", "b", "c"])


@pytest.mark.parametrize("limit", [0, 1, 29_999, 30_000, 30_001, 59_999, 10**9])
async def test_a_limit_ends_the_file_after_so_many_rows(exporting: Scene, limit: int) -> None:
    loads = [await add_numbers(exporting, 30_000), await add_numbers(exporting, 30_000)]
    task = await export(exporting, limit=limit)
    whole = (await reference(exporting, loads, ["n", "filling"])).splitlines(keepends=True)
    assert await content(exporting, task) == b"".join(whole[: limit + 1])


async def test_a_limit_counts_rows_that_meet_the_conditions(exporting: Scene) -> None:
    load = await add_numbers(exporting, 100_000)
    task = await export(exporting, limit=10_000, conditions=[{"column": "n", "op": ">", "value": 50_000}])
    lines = (await reference(exporting, [load], ["n", "filling"], "n > 50000")).splitlines(keepends=True)
    assert await content(exporting, task) == b"".join(lines[:10_001])


@pytest.mark.parametrize(("form", "expected"), [("csv", b"a\n"), ("csv.gz", b"a\n"), ("jsonl", b""), ("jsonl.gz", b"")])
async def test_an_empty_result_is_a_valid_file(exporting: Scene, form: str, expected: bytes) -> None:
    load = await add_load(exporting, {"a": "bigint"}, "VALUES (1)")
    none = [{"column": "a", "op": "=", "value": 2}]
    body = await content(exporting, await export(exporting, format=form, conditions=none))
    assert (gzip.decompress(body) if form.endswith("gz") else body) == expected
    await exporting.catalog.revert(exporting.account_id, "data", load)
    body = await content(exporting, await export(exporting, format=form))
    assert (gzip.decompress(body) if form.endswith("gz") else body) == expected


async def test_a_column_may_be_called_like_anything_in_the_query(exporting: Scene) -> None:
    await add_load(exporting, {"r": "text", "row": "text"}, "VALUES ('a', 'b')")
    assert await content(exporting, await export(exporting, format="jsonl")) == b'{"r":"a","row":"b"}\n'


async def test_sixteen_hundred_columns_fit_less_the_one_that_loads_have(exporting: Scene) -> None:
    columns = {f"c{number}": "boolean" for number in range(1599)}
    load = await add_load(exporting, columns, f"SELECT {', '.join(['true'] * 1599)} FROM generate_series(1, 3)")
    task = await export(exporting)
    assert await content(exporting, task) == await reference(exporting, [load], list(columns))
    lines = (await content(exporting, await export(exporting, format="jsonl"))).splitlines()
    assert [len(orjson.loads(line)) for line in lines] == [1599] * 3


async def test_long_texts_in_few_blocks_are_read_a_few_rows_at_a_time(exporting: Scene) -> None:
    load = await add_load(
        exporting,
        {"n": "bigint", "long": "text"},
        # Compressed, 40 rows of 3 MB lie in one block.
        "SELECT n, repeat(n::text, 3000000 / length(n::text)) FROM generate_series(10, 49) n",
    )
    task = await export(exporting)
    assert await content(exporting, task) == await reference(exporting, [load], ["n", "long"])
