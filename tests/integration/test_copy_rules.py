"""What reading CSV takes for granted about COPY, asked of the real server."""

import random
import re
from collections.abc import AsyncIterator

import asyncpg
import pytest

from upload_worker.plan import Dialect
from upload_worker.records import (
    fragments,
    parse_fields,
    ready_for_copy,
    record_at_line,
    record_count,
    split_records,
)

# A delimiter that the data lacks: every record is one field.
ONE_COLUMN = {"format": "csv", "delimiter": "\x02", "null": "\x03"}
DIALECTS = (
    Dialect(delimiter="\x02"),
    Dialect(delimiter="\x02", escape="\\"),
    Dialect(delimiter="\x02", quote="'", escape="'"),
)
MORSELS = ("a", "b", '"', "'", "\\", ".", "\\.", "\n", "\r\n", "\r", '"a"', "\n\n")


@pytest.fixture
async def connection(database_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_dsn)
    await connection.execute("CREATE TEMP TABLE lines (field text); CREATE TEMP TABLE numbers (a bigint, b text)")
    yield connection
    await connection.close()


async def copy(connection: asyncpg.Connection, table: str, data: bytes, **options: str) -> int:
    status = await connection.copy_to_table(table, source=memoryview(data), **options)
    return int(status.rpartition(" ")[2])


async def test_any_bytes_cut_into_the_records_that_the_server_loads(connection: asyncpg.Connection) -> None:
    chosen = random.Random(5)
    loaded = 0
    for _ in range(1500):
        dialect = chosen.choice(DIALECTS)
        raw = "".join(chosen.choice(MORSELS) for _ in range(chosen.randrange(30))).encode()
        data = ready_for_copy(raw, dialect, skip_blank_lines=chosen.random() < 0.5)
        if len(fragments(data, dialect)) % 2 == 0:
            continue  # a quote is left open: the server refuses it
        rows = await copy(connection, "lines", data, quote=dialect.quote, escape=dialect.escape, **ONE_COLUMN)
        fields = [row["field"].encode() for row in await connection.fetch("SELECT field FROM lines")]
        records = [data[start:end] for start, end in split_records(data, dialect)]
        assert rows == record_count(data, dialect) == len(records), raw
        assert fields == [parse_fields(record, dialect)[0] for record in records], raw
        await connection.execute("TRUNCATE lines")
        loaded += rows
    assert loaded > 1000


async def test_the_line_that_the_server_reports_leads_to_the_bad_record(connection: asyncpg.Connection) -> None:
    chosen = random.Random(6)
    for _ in range(500):
        newline = chosen.choice(["\n", "\r\n", "\r"])
        count = chosen.randrange(1, 12)
        bad = chosen.randrange(count)
        records = [
            f'{"x" if number == bad else number},"'
            + "".join(chosen.choice(["a", "\n", "\r\n", "\r"]) for _ in range(chosen.randrange(4)))
            + f'"{newline}'
            for number in range(count)
        ]
        data = "".join(records).encode()
        with pytest.raises(asyncpg.DataError) as caught:
            await copy(connection, "numbers", data, format="csv")
        reported = re.search(r"line (\d+)", caught.value.context or "")
        assert reported is not None
        found = record_at_line(data, Dialect(), int(reported.group(1)))
        assert found is not None
        assert data[slice(*found)] == records[bad].encode()
