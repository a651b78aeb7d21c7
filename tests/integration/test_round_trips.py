"""What was exported can be imported again, in every format: equal rows, and equal types where the format has types."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, date
from decimal import Decimal
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.domain.csv_options import MOST_COLUMNS
from shared.domain.import_params import SourceFile
from shared.domain.task import Task
from sluice.stack import Stack
from tests.exports import add_load, export
from tests.faults.scene import Scene, open_scene
from tests.servers import own_database, own_vhost

TYPES = {
    # First: what begins a row may be taken for the beginning of a file.
    "s": "text",
    "i": "bigint",
    "n": "numeric",
    "d": "double precision",
    "b": "boolean",
    "day": "date",
    "at": "timestamp",
    "tz": "timestamptz",
    "id": "uuid",
    "doc": "jsonb",
    "raw": "bytea",
}

WORKERS = ("control", "upload-worker", "export-worker")

TEXTS = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    [
        "",
        " ",
        "NULL",
        "\\N",
        "\\.",
        '"',
        "a,b\nc\r\nd",
        "\t\\t",
        "00123",
        "1e5",
        "=1+1",
        "true",
        "2024-01-01",
        "\ufeff",
        "\ufeffa",
    ]
)
NUMERICS = st.decimals(
    allow_nan=False, allow_infinity=False, places=6, min_value=-(10**20), max_value=10**20
) | st.sampled_from([Decimal("NaN"), Decimal("Infinity"), Decimal("-Infinity"), Decimal("1e-60"), Decimal("1e60")])
# Values that Python has none for, as PostgreSQL writes them.
FAR_DAYS = st.sampled_from(["infinity", "-infinity", "0044-03-15 BC", "10000-01-01", "5874897-12-31"])
FAR_TIMES = st.sampled_from(
    ["infinity", "-infinity", "0044-03-15 12:30:00.5 BC", "10000-01-01 00:00:00", "294276-12-31"]
)
JSON_NULL = "the document null, which is not NULL"
DOCUMENTS = st.just(JSON_NULL) | st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner | st.none(), max_size=3) | st.dictionaries(TEXTS, inner | st.none(), max_size=3),
    max_leaves=6,
)
VALUES: Mapping[str, st.SearchStrategy[Any]] = {
    "i": st.integers(-(2**63), 2**63 - 1),
    "n": NUMERICS,
    "d": st.floats(),
    "b": st.booleans(),
    "day": st.dates(date(1, 1, 1), date(9999, 12, 31)) | FAR_DAYS,
    "at": st.datetimes() | FAR_TIMES,
    "tz": st.datetimes(timezones=st.just(UTC)) | FAR_TIMES,
    "id": st.uuids(),
    "doc": DOCUMENTS,
    "raw": st.binary(max_size=20),
}
ROWS = st.lists(st.fixed_dictionaries({name: st.none() | values for name, values in VALUES.items()}), max_size=6)


@pytest.fixture(scope="module")
async def movers(shared_stack: Stack, template: str) -> AsyncIterator[Scene]:
    """A control service and workers of both kinds."""
    servers = shared_stack.environment()
    async with (
        own_database(servers["SLUICE_POSTGRES_DSN"], template) as dsn,
        own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as amqp_url,
    ):
        environment = {
            **servers,
            "SLUICE_POSTGRES_DSN": dsn,
            "SLUICE_AMQP_URL": amqp_url,
            "SLUICE_S3_PREFIX": f"{uuid.uuid4().hex}/",
            "SLUICE_SLOTS": "4",
        }
        services = Stack.temporary(given=environment)
        try:
            services.start()
            spawned = [service for name in WORKERS for service in services.spawn(name)]
            for service in spawned:
                await asyncio.to_thread(service.wait_ready)
            async with open_scene(environment) as scene:
                yield scene
        finally:
            await asyncio.to_thread(services.purge)


async def exported(scene: Scene, task: Task) -> SourceFile:
    assert task.result is not None
    row = (await scene.fetch("SELECT * FROM sluice.files WHERE file_id = $1", task.result["file_id"]))[0]
    return SourceFile(
        file_id=row["file_id"], name=row["name"], object_key=row["object_key"], etag=row["etag"], bytes=row["bytes"]
    )


async def insert(scene: Scene, rows: Sequence[Mapping[str, Any]]) -> None:
    written = json.dumps([{name: as_text(value, TYPES[name]) for name, value in row.items()} for row in rows])
    values = ", ".join(f"(r ->> '{name}')::{type_}" for name, type_ in TYPES.items())
    literal = written.replace("'", "''")
    await add_load(scene, TYPES, f"SELECT {values} FROM jsonb_array_elements('{literal}'::jsonb) r")


def as_text(value: Any, type_: str) -> str | None:
    if value is None or type_ == "text":
        return value  # type: ignore[no-any-return]
    if type_ == "jsonb":
        return "null" if value == JSON_NULL else json.dumps(value)
    return "\\x" + value.hex() if type_ == "bytea" else str(value)


async def texts(scene: Scene, dataset: str = "data") -> list[str]:
    """NaN and -0.0 are what they are; numerics are equal whatever their zeros; lanes have no order."""
    written = ", ".join(f"trim_scale({name})::text" if name == "n" else f"{name}::text" for name in TYPES)
    rows = await scene.fetch(f"SELECT {written} FROM {scene.table(dataset)}")
    return sorted(repr(tuple(row.values())) for row in rows)


def holdable(row: dict[str, Any], form: str) -> dict[str, Any]:
    """The row without what docs/exports.md says that a format does not keep."""
    if form == "parquet":
        return {name: None if name in ("day", "at", "tz") and isinstance(v, str) else v for name, v in row.items()}
    if form.startswith("jsonl") and row["doc"] == JSON_NULL:
        return {**row, "doc": None}
    return row


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(form=st.sampled_from(["csv", "csv.gz", "jsonl", "jsonl.gz", "parquet"]), rows=ROWS)
async def test_what_was_exported_imports_as_it_was(movers: Scene, form: str, rows: list[dict[str, Any]]) -> None:
    scene = await movers.another_account()
    await insert(scene, [holdable(row, form) for row in rows])
    source = await exported(scene, await export(scene, format=form))
    # Parquet has types of its own, but for numbers too long for it; a file without lines has nothing to be told by.
    given_types = {"columns": {"n": "numeric"} if form == "parquet" else TYPES}
    told = {} if rows or not form.startswith("jsonl") else {"format": "jsonl"}
    await scene.succeed(source, "again", **given_types, **told)
    assert await scene.columns("again") == TYPES
    assert await texts(scene, "again") == await texts(scene)


# What none of the types that are found out would give back as it was.
DOUBTFUL = {
    "zip": ["00123", "00456"],
    "number or not": ["1e5", "true"],
    "nan or no date": ["NaN", "2020-02-30"],
    "no date": ["2020-02-30", "2021-02-29"],
    "no iso date": ["28.02.2020", "29.02.2020"],
    "time": ["12:30", "23:59"],
    "hex": ["0x10", "0x11"],
    "grouped": ["1_000", "1,000"],
    "telephone": ["+4915112345678", "+1"],
    "answer": ["yes", "no"],
    "word": ["null", "NULL"],
    "document": ['{"a": 1}', "[1]"],
    "id": ["c0ffee00-0000-4000-8000-000000000000", "c0ffee00-0000-4000-8000-000000000001"],
}
# JSON tells strings from numbers, but has no times.
QUOTED = DOUBTFUL | {
    "double": ["1e5", "-0"],
    "yes": ["true", "false"],
    "nan": ["NaN", "Infinity"],
    "plus": ["+1", " 1"],
}
TYPED = QUOTED | {"day": ["2020-02-28", "2020-02-29"], "at": ["2020-02-28 01:02:03", "2020-02-28T01:02:03Z"]}


@pytest.mark.parametrize(
    ("form", "texts"), [("csv", DOUBTFUL), ("csv.gz", DOUBTFUL), ("jsonl", QUOTED), ("parquet", TYPED)]
)
async def test_text_that_looks_like_something_else_stays_text(
    movers: Scene, form: str, texts: Mapping[str, Sequence[str]]
) -> None:
    scene = await movers.another_account()
    columns = dict.fromkeys(texts, "text")
    rows = list(zip(*texts.values(), strict=True))
    await add_load(scene, columns, f"VALUES {', '.join(literal(row) for row in rows)}")
    await scene.succeed(await exported(scene, await export(scene, format=form)), "again")
    assert await scene.columns("again") == columns
    assert await scene.rows("again") == rows


def literal(row: Sequence[str]) -> str:
    return "(" + ", ".join("'" + text.replace("'", "''") + "'" for text in row) + ")"


FOUND = {
    "s": ("text", "'a'"),
    "i": ("bigint", "'-9223372036854775808'"),
    "n": ("numeric", "12345678901234567890.12345"),
    "d": ("double precision", "1e300"),
    "b": ("boolean", "n > 1"),
    "day": ("date", "'2024-02-29'"),
    "at": ("timestamp", "'2024-02-29 23:59:59.999999'"),
    "tz": ("timestamptz", "'2024-03-31 02:30:00+02'"),
}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
async def test_types_are_found_out_again(movers: Scene, form: str) -> None:
    scene = await movers.another_account()
    columns = {name: type_ for name, (type_, _) in FOUND.items()}
    values = ", ".join(f"({value})::{type_}" for type_, value in FOUND.values())
    nulls = ", ".join(["NULL"] * len(FOUND))
    await add_load(scene, columns, f"SELECT {values} FROM generate_series(1, 2) n UNION ALL SELECT {nulls}")
    await scene.succeed(await exported(scene, await export(scene, format=form)), "again")
    assert await scene.columns("again") == columns
    assert await scene.rows("again") == await scene.rows()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
async def test_as_many_columns_as_a_dataset_can_have_come_back(movers: Scene, form: str) -> None:
    scene = await movers.another_account()
    columns = {}
    numbers = iter(range(MOST_COLUMNS - 1))  # one is that of the load
    # A row must fit into a block, where each bigint begins at a multiple of 8.
    for type_, count in (("bigint", 500), ("boolean", 500), ("text", 599)):
        columns |= {f"column {number}": type_ for number in islice(numbers, count)}
    values = ", ".join({"bigint": "n", "boolean": "n > 1", "text": "'x' || n"}[type_] for type_ in columns.values())
    await add_load(scene, columns, f"SELECT {values} FROM generate_series(1, 3) n")
    await scene.succeed(await exported(scene, await export(scene, format=form)), "again")
    assert await scene.columns("again") == columns
    assert await scene.rows("again") == await scene.rows()


NAMES = [
    "select", "Order", "a b", "a.b", "it's", 'qu"ote', '""', "semi;colon", "com,ma", "$1", "%s {x}", "a\\b", "--", "/*",
    "Größe", "日本語 🎉", "=1+1", "data",
]  # fmt: skip


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
async def test_names_that_need_quotes_are_kept(movers: Scene, form: str) -> None:
    scene = await movers.another_account()
    columns = dict.fromkeys(NAMES, "text")
    rows = [tuple(f"{name} {number}" for name in NAMES) for number in range(3)]
    await add_load(scene, columns, f"VALUES {', '.join(map(literal, rows))}", "user")
    conditions = [{"column": name, "op": "in", "value": [f"{name} {number}" for number in (0, 2)]} for name in NAMES]
    task = await export(scene, "user", format=form, conditions=conditions, columns=NAMES[::-1])
    await scene.succeed(await exported(scene, task), "table")
    assert list(await scene.columns("table")) == NAMES[::-1]
    assert await scene.rows("table") == [row[::-1] for row in (rows[0], rows[2])]
