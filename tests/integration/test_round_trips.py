"""What was exported can be imported again, in every format: equal rows, and equal types where the format has types."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
