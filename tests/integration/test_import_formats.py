"""Imports of JSONL and Parquet: rows and types as they are in the file, whatever is in it."""

import gzip
import io
import json
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.faults.scene import Scene


def jsonl(*objects: Mapping[str, Any] | str) -> bytes:
    return "".join(f"{o if isinstance(o, str) else json.dumps(o)}\n" for o in objects).encode()


def parquet(columns: Mapping[str, Any], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, **options)
    return out.getvalue()


JSONL = jsonl(
    '{"i": 1, "n": 1.10, "d": 1e300, "b": true, "day": "2024-02-29", "at": "2024-02-29T01:02:03.5Z", "s": "00123"}',
    {"i": None, "s": 'tab\t, back\\slash, "quote", \n, \\N, \\., ünï\U0001f600'},
    "",
    '{"s": "", "n": 123456789012345678901234567890.12345678901234567890, "j": {"k": [1.50, 9007199254740993, "\\\\"]}}',
    '  {"d": 0.1, "i": -9223372036854775808, "j": [], "at": "1999-12-31T23:59:59+05:30"}  \r',
)
JSONL_ROWS = [
    (1, Decimal("1.10"), 1e300, True, date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3, 500000, UTC), "00123", None),
    (None, None, None, None, None, None, 'tab\t, back\\slash, "quote", \n, \\N, \\., ünï\U0001f600', None),
    (
        None,
        Decimal("123456789012345678901234567890.12345678901234567890"),
        None,
        None,
        None,
        None,
        "",
        {"k": [1.5, 9007199254740993, "\\"]},
    ),
    (-(2**63), None, 0.1, None, None, datetime(1999, 12, 31, 18, 29, 59, tzinfo=UTC), None, []),
]
JSONL_TYPES = {
    "i": "bigint",
    "n": "numeric",
    "d": "double precision",
    "b": "boolean",
    "day": "date",
    "at": "timestamptz",
    "s": "text",
    "j": "jsonb",
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["", "byte order mark"])
async def test_jsonl_is_told_by_its_first_byte_and_keeps_types_and_digits(
    scene: Scene, packed: bool, bom: bytes
) -> None:
    content = bom + JSONL
    task = await scene.succeed(gzip.compress(content) if packed else content)
    assert await scene.columns() == JSONL_TYPES
    assert await scene.rows() == JSONL_ROWS
    assert await scene.value(f"SELECT j #>> '{{k,0}}' FROM {scene.table()} WHERE j ? 'k'") == "1.50"
    assert (task.rows_done, task.bytes_done) == (4, len(JSONL))


async def test_parquet_keeps_types_and_values(scene: Scene) -> None:
    uuid = UUID(int=2**127 + 5)
    columns = {
        "i8": pa.array([1, None], pa.int8()),
        "u64": pa.array([2**64 - 1, None], pa.uint64()),
        "f": pa.array([0.1, float("nan")], pa.float32()),
        "d": pa.array([float("-inf"), 5e-324]),
        "n": pa.array([Decimal("1.10"), None], pa.decimal128(38, 10)),
        "b": pa.array([True, None]),
        "day": pa.array([date(1, 1, 1), date(9999, 12, 31)]),
        "at": pa.array([datetime(2024, 1, 1, 1, 2, 3, 4), None], pa.timestamp("us")),  # noqa: DTZ001
        "tz": pa.array([datetime(2024, 1, 1, 1, 2, 3, 4, UTC), None], pa.timestamp("us", "Asia/Kolkata")),
        "s": pa.array(["", None]),
        "lines": pa.array(['a"b,c\nd\re\\.', "\\."]),
        "dict": pa.array(["x", None]).dictionary_encode(),
        "raw": pa.array([b"\x00\xff", b""]),
        "uuid": pa.array([uuid.bytes, None], pa.uuid()),
        "json": pa.array(['{"a": [1.50, null]}', None], pa.json_()),
        "list": pa.array([[1, None], []]),
        "struct": pa.array([{"a": Decimal("1.50"), "b": b"x"}, None]),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int64())),
        "null": pa.nulls(2),
    }
    task = await scene.succeed(parquet(columns))
    assert await scene.columns() == {
        "i8": "bigint",
        "u64": "numeric",
        "f": "double precision",
        "d": "double precision",
        "n": "numeric",
        "b": "boolean",
        "day": "date",
        "at": "timestamp",
        "tz": "timestamptz",
        "s": "text",
        "lines": "text",
        "dict": "text",
        "raw": "bytea",
        "uuid": "uuid",
        "json": "jsonb",
        "list": "jsonb",
        "struct": "jsonb",
        "map": "jsonb",
        "null": "text",
    }
    first, second = await scene.rows()
    assert first == (
        1,
        Decimal(2**64 - 1),
        0.1,
        float("-inf"),
        Decimal("1.1"),
        True,
        date(1, 1, 1),
        datetime(2024, 1, 1, 1, 2, 3, 4),  # noqa: DTZ001 - without a zone on purpose
        datetime(2024, 1, 1, 1, 2, 3, 4, UTC),
        "",
        'a"b,c\nd\re\\.',
        "x",
        b"\x00\xff",
        uuid,
        {"a": [1.5, None]},
        [1, None],
        {"a": 1.5, "b": "\\x78"},
        {"k": 1},
        None,
    )
    assert repr(second[2]) == "nan"
    assert second[3] == 5e-324
    assert second[9:13] == (None, "\\.", None, b"")
    assert (task.rows_done, task.rows_total) == (2, 2)
    assert task.bytes_done == task.bytes_total


async def test_one_column_of_nulls_is_as_many_rows(scene: Scene) -> None:
    await scene.succeed(parquet({"a": pa.array([None, "", None, "x"])}))
    assert await scene.rows() == [(None,), ("",), (None,), ("x",)]
    await scene.succeed(jsonl({"a": None}, {"a": ""}, {}, {"a": "x"}), "lines")
    assert await scene.rows("lines") == [(None,), ("",), (None,), ("x",)]


async def test_many_row_groups_and_empty_ones(scene: Scene) -> None:
    out = io.BytesIO()
    schema = pa.schema([("n", pa.int64()), ("s", pa.string())])
    with pq.ParquetWriter(out, schema) as writer:
        for start in range(0, 1000, 100):
            writer.write_table(pa.table({"n": range(start, start + 100), "s": ["x" * 50] * 100}, schema))
            writer.write_table(schema.empty_table())
    await scene.succeed(out.getvalue())
    assert sorted(row[0] for row in await scene.rows()) == list(range(1000))


async def test_a_parquet_file_without_rows_makes_an_empty_dataset(scene: Scene) -> None:
    out = io.BytesIO()
    pq.ParquetWriter(out, pa.schema([("n", pa.int64())])).close()
    await scene.succeed(out.getvalue())
    assert (await scene.columns(), await scene.rows()) == ({"n": "bigint"}, [])


async def test_types_that_are_given_win(scene: Scene) -> None:
    await scene.succeed(jsonl({"n": 1, "s": "2"}), columns={"n": "text", "s": "bigint", "later": "uuid"})
    assert await scene.columns() == {"n": "text", "s": "bigint", "later": "uuid"}
    await scene.succeed(parquet({"n": [1], "s": ["2"]}), "parquet", columns={"n": "text", "s": "numeric"})
    assert await scene.rows("parquet") == [("1", Decimal(2))]


async def test_appended_lines_take_the_columns_of_the_dataset(scene: Scene) -> None:
    await scene.succeed(b"a,b,c\n1,x,1.5\n")
    await scene.succeed(jsonl({"b": 7}, {"a": 2, "c": "3.25"}), mode="append")
    await scene.succeed(parquet({"c": [4], "b": ["y"], "a": [3]}), mode="append")
    assert await scene.rows() == [
        (1, "x", Decimal("1.5")),
        (None, "7", None),
        (2, None, Decimal("3.25")),
        (3, "y", Decimal(4)),
    ]


@pytest.mark.parametrize(
    ("content", "name", "told"),
    [
        pytest.param(b"n,a\x00b\n1,x\n2,y\n", "a b", "a\\x00b", id="NUL in CSV"),
        pytest.param(parquet({"n": [1, 2], "a\x00b": ["x", "y"]}), "a b", "a\\x00b", id="NUL in Parquet"),
        pytest.param(jsonl({"n": 1, "a\x00b": "x"}, {"n": 2, "a\x00b": "y"}), "a b", "a\\x00b", id="NUL in JSONL"),
        pytest.param(b'{"n":1,"\\ud800":"x"}\n{"n":2,"\\ud800":"y"}\n', "column_2", "\\ud800", id="lone surrogate"),
    ],
)
async def test_a_name_that_cannot_be_stored_is_told_escaped(scene: Scene, content: bytes, name: str, told: str) -> None:
    task = await scene.succeed(content)
    assert list(await scene.columns()) == ["n", name]
    assert await scene.rows() == [(1, "x"), (2, "y")]
    assert task.result is not None
    assert task.result["notes"] == [{"column": 2, "from": told, "to": name}]


GOOD = parquet({"n": list(range(5000)), "s": [f"{n}" * 20 for n in range(5000)]})


def damaged() -> bytes:
    """Pages that do not decompress behind a footer that is whole."""
    return GOOD[:2000] + bytes(b ^ 0xFF for b in GOOD[2000:6000]) + GOOD[6000:]


@pytest.mark.parametrize(
    ("content", "params", "code", "line", "column", "said"),
    [
        pytest.param(GOOD[:-10], {}, "invalid-data", None, None, "upload it again", id="parquet cut off"),
        pytest.param(GOOD[:4], {}, "invalid-data", None, None, "upload it again", id="nothing but magic"),
        pytest.param(damaged(), {}, "invalid-data", None, None, "upload it again", id="damaged pages"),
        pytest.param(b"a,b\n1,2\n", {"format": "parquet"}, "invalid-data", None, None, "Parquet", id="no parquet"),
        pytest.param(GOOD, {"format": "csv"}, "invalid-data", None, None, "Parquet", id="parquet called csv"),
        pytest.param(
            parquet({"t": pa.array([1], pa.duration("s"))}), {}, "invalid-data", None, "t", "duration", id="duration"
        ),
        pytest.param(
            GOOD, {"columns": {"nope": "text"}}, "invalid-data", None, None, "nope", id="no such column in parquet"
        ),
        pytest.param(parquet({"s": ["a", "b\x00"]}), {}, "bad-record", 2, None, "0x00", id="NUL in a text of parquet"),
        pytest.param(
            parquet({"s": ["1", "x"]}), {"columns": {"s": "bigint"}}, "bad-record", 2, "s", "bigint", id="no number"
        ),
        pytest.param(b"[{}]", {}, "invalid-data", None, None, "JSON array", id="a JSON array"),
        pytest.param(b"{}\n{}\n", {}, "invalid-data", None, None, "no keys", id="objects without keys"),
        pytest.param(b"{", {}, "invalid-data", None, None, "line 1", id="one broken line"),
        pytest.param(b"", {"format": "jsonl"}, "invalid-data", None, None, "no line", id="empty JSONL"),
        pytest.param(jsonl({"a": 1}, "[1]"), {}, "bad-record", 2, None, "no JSON object", id="an array on a line"),
        pytest.param(jsonl({"a": 1}, '{"a": 1'), {}, "bad-record", 2, None, "character 8", id="a line cut off"),
        pytest.param(jsonl({"a": 1}, '{"a": 1, "a": 2}'), {}, "bad-record", 2, None, "twice", id="a key twice"),
        pytest.param(jsonl({"a": 1}) + b'{"a": "\xff"}', {}, "bad-record", 2, None, "UTF-8", id="no UTF-8"),
        pytest.param(jsonl({"a": "x"}, '{"a": "\\u0000"}'), {}, "bad-record", 2, None, "0x00", id="NUL"),
        pytest.param(jsonl({"a": "x"}, '{"a": "\\ud800"}'), {}, "bad-record", 2, None, "UTF8", id="lone surrogate"),
        pytest.param(
            jsonl({"a": 1}, '{"a": %s}' % ("[" * 5000 + "]" * 5000)), {}, "bad-record", 2, None, "deep", id="deep"
        ),
        pytest.param(
            jsonl({"a": [1]}, '{"a": %s}' % ("[" * 500 + "]" * 500)),
            {},
            "bad-record",
            2,
            "a",
            "nested",
            id="deep jsonb",
        ),
        pytest.param(
            jsonl({"a": 1}, "", {"a": "x"}), {"columns": {"a": "bigint"}}, "bad-record", 3, "a", '"x"', id="no bigint"
        ),
        pytest.param(
            jsonl({"a": 1}, {"a": []}), {"columns": {"a": "bigint"}}, "bad-record", 2, "a", "array", id="nested"
        ),
        pytest.param(
            jsonl(*[{"a": 1, "pad": "x" * 20000}] * 34, {"b": 1}, *[{"a": 1, "pad": "x" * 20000}] * 40),
            {},
            "bad-record",
            35,
            "b",
            "'b'",
            id="a key beyond the sample",
        ),
        pytest.param(b'{"a": "' + b"x" * (17 << 20), {}, "invalid-data", 1, None, "16 MiB", id="a huge line"),
        pytest.param(gzip.compress(JSONL)[:-20], {}, "invalid-data", None, None, "upload it again", id="cut gzip"),
    ],
)
async def test_bad_files_fail_with_code_place_and_advice_and_an_abort_leaves_nothing(
    scene: Scene,
    content: bytes,
    params: dict[str, Any],
    code: str,
    line: int | None,
    column: str | None,
    said: str,
) -> None:
    error = await scene.fail(content, **params)
    assert (error["code"], error.get("line"), error.get("column")) == (code, line, column), error["detail"]
    assert said in error["detail"]
    await scene.abort(error["task_id"])
    assert await scene.leftovers(error["task_id"]) == {}


async def test_lines_that_are_no_rows_become_rejects_and_all_others_are_loaded(scene: Scene) -> None:
    content = jsonl({"n": 1}, "nonsense", "", {"n": 2}, {"n": "x"}, {"n": 3}, {"n": [1]}, {"n": 4})
    task = await scene.succeed(content, on_error="skip", columns={"n": "bigint"})
    assert [row[0] for row in await scene.rows()] == [1, 2, 3, 4]
    rejects = await scene.rejects(task.task_id)
    assert [(line, column, raw) for line, column, _, raw in rejects] == [
        (2, None, "nonsense"),
        (5, "n", '{"n": "x"}'),
        (7, "n", '{"n": [1]}'),
    ]
    assert (task.rows_done, task.rejects) == (4, 3)


async def test_rows_of_parquet_that_do_not_fit_become_rejects_with_their_number(scene: Scene) -> None:
    values = [str(n) for n in range(300)]
    values[7] = values[250] = 'b,"\nd'
    content = parquet({"n": values, "s": ["line\nbreak"] * 300}, row_group_size=100)
    task = await scene.succeed(content, on_error="skip", columns={"n": "bigint"})
    rejects = await scene.rejects(task.task_id)
    assert [(line, column) for line, column, _, _ in rejects] == [(8, "n"), (251, "n")]
    assert (task.rows_done, task.rejects) == (298, 2)
