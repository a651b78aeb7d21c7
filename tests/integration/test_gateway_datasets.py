"""Datasets at the gateway: shown, looked into, reverted and dropped."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from gateway.datasets import STREAM_ROWS, STREAMS_AT_ONCE
from shared.adapters.catalog import Column, FinishedLoad, create_stage, publish_load
from shared.adapters.postgres import PgDatabase, quoted
from shared.domain.task import LoadId
from tests.gateway_process import Client, RawClient, until
from tests.tasks import SOMEBODY_WAITS

COLUMNS = (Column("id", "bigint"), Column("The Price", "numeric"), Column("note", "text"))


async def with_load(
    database: PgDatabase,
    username: str,
    dataset: str,
    load: int,
    values: str,
    *,
    mode: str,
    columns: Sequence[Column] = COLUMNS,
) -> None:
    """What an import leaves behind when it has succeeded."""
    load_id = LoadId(load)
    async with database.transaction() as connection:
        account_id = await connection.fetchval("SELECT account_id FROM sluice.accounts WHERE username = $1", username)
        await create_stage(connection, load_id, columns)
        names = ", ".join(quoted(column.name) for column in columns)
        status = await connection.execute(f"INSERT INTO sluice_loads.load_{load} ({names}) VALUES {values}")
        finished = FinishedLoad(
            load_id, account_id, int(status.split()[2]), 1, 100, columns, file_id=7, file_name="a.csv"
        )
        await publish_load(connection, finished, dataset, mode=mode, evolve=False, lock_seconds=5)


@pytest.fixture
async def prices(alice: Client, database: PgDatabase) -> Client:
    """Alice with a dataset of two loads, 11 and 12."""
    await with_load(database, "alice", "prices", 11, "(1, 0.10, 'a'), (2, NULL, 'ä')", mode="create")
    big = "(9223372036854775807, 12345678901234567890.12345, NULL), (4, 'NaN', 'x')"
    await with_load(database, "alice", "prices", 12, big, mode="append")
    return alice


async def test_a_dataset_shows_its_columns_and_loads(prices: Client) -> None:
    shown = (await prices.get("/v1/datasets/prices")).json
    assert shown["sql_table"] == "data_alice.prices"
    assert shown["columns"] == [column.as_json() for column in COLUMNS]
    assert (shown["rows"], shown["loads"], shown["bytes"]) == (4, 2, 200)
    assert [(load["load_id"], load["rows"], load["rejects"]) for load in shown["load_list"]] == [(12, 2, 1), (11, 2, 1)]
    listed = (await prices.get("/v1/datasets")).json["datasets"]
    assert [(dataset["name"], dataset["rows"]) for dataset in listed] == [("prices", 4)]


async def test_a_preview_keeps_every_digit(prices: Client) -> None:
    answer = await prices.get("/v1/datasets/prices/rows?load=12")
    assert b"9223372036854775807" in answer.body
    assert b"12345678901234567890.12345" in answer.body
    assert [row["note"] for row in answer.json["rows"]] == [None, "x"]
    assert "_load" not in answer.json["rows"][0]
    assert len((await prices.get("/v1/datasets/prices/rows?limit=3")).json["rows"]) == 3
    assert (await prices.get("/v1/datasets/prices/rows?load=999")).json["rows"] == []


@pytest.mark.parametrize("what", ["rows", "export?format=csv", "export?format=jsonl"])
async def test_a_dataset_that_is_gone_when_it_is_read_is_no_fault_of_ours(
    prices: Client, database: PgDatabase, what: str
) -> None:
    async with database.connection() as connection:
        await connection.execute("ALTER TABLE data_alice.prices RENAME COLUMN note TO remark")
    answer = await prices.get(f"/v1/datasets/prices/{what}")
    assert (answer.status, answer.json["type"]) == (503, "urn:sluice:problem:schema-changed")


async def test_a_preview_of_long_rows_stays_small(alice: Client, database: PgDatabase) -> None:
    values = ", ".join(f"({n}, 1, repeat('x', 1000000))" for n in range(30))
    await with_load(database, "alice", "long", 20, values, mode="create")
    answer = await alice.get("/v1/datasets/long/rows")
    assert 0 < len(answer.json["rows"]) < 10
    assert len(answer.body) < 9_000_000


async def test_a_load_can_be_reverted(prices: Client) -> None:
    assert (await prices.delete("/v1/datasets/prices/loads/11")).status == 204
    assert (await prices.get("/v1/datasets/prices")).json["rows"] == 2
    assert (await prices.delete("/v1/datasets/prices/loads/11")).status == 404


async def test_a_dataset_can_be_dropped(prices: Client) -> None:
    assert (await prices.delete("/v1/datasets/prices")).status == 204
    assert (await prices.get("/v1/datasets/prices")).status == 404
    assert (await prices.get("/v1/datasets")).json["datasets"] == []


async def test_the_dataset_of_another_is_not_there(prices: Client, bob: Client) -> None:
    for method, path in (("GET", ""), ("GET", "/rows"), ("DELETE", ""), ("DELETE", "/loads/11")):
        answer = await bob.ask(method, f"/v1/datasets/prices{path}")
        assert (answer.status, answer.code) == (404, "not-found")
    assert (await prices.get("/v1/datasets/prices")).json["rows"] == 4


async def test_a_small_dataset_is_streamed_as_csv_and_as_json_lines(prices: Client) -> None:
    answer = await prices.get("/v1/datasets/prices/export")
    assert answer.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert answer.headers["Content-Disposition"].startswith("attachment")
    head, *rows = answer.body.decode().splitlines()
    assert head == "id,The Price,note"
    expected = ["1,0.10,a", "2,,ä", "9223372036854775807,12345678901234567890.12345,", "4,NaN,x"]
    assert sorted(rows) == sorted(expected)
    lines = (await prices.get("/v1/datasets/prices/export?format=jsonl")).body.splitlines()
    assert b'{"id":9223372036854775807,"The Price":12345678901234567890.12345,"note":null}' in lines
    assert len(lines) == 4


async def test_an_empty_dataset_streams_its_head(alice: Client, database: PgDatabase) -> None:
    await with_load(database, "alice", "none", 30, "(1, 1, 'x')", mode="create")
    await alice.delete("/v1/datasets/none/loads/30")
    assert (await alice.get("/v1/datasets/none/export")).body == b"id,The Price,note\n"
    assert (await alice.get("/v1/datasets/none/export?format=jsonl")).body == b""


@pytest.mark.parametrize("form", ["csv", "jsonl"])
async def test_a_large_dataset_is_not_streamed_but_pointed_to_export_tasks(
    prices: Client, database: PgDatabase, form: str
) -> None:
    for rows, status in ((STREAM_ROWS - 2, 200), (STREAM_ROWS - 1, 413)):  # the other load has two
        async with database.connection() as connection:
            await connection.execute("UPDATE sluice.loads SET rows = $1 WHERE load_id = 11", rows)
        answer = await prices.get(f"/v1/datasets/prices/export?format={form}")
        assert answer.status == status
    assert (answer.code, answer.json["max_rows"]) == ("too-large", STREAM_ROWS)
    assert "POST /v1/tasks" in answer.json["detail"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
async def test_a_dataset_that_takes_too_long_is_pointed_to_export_tasks(
    prices: Client, database: PgDatabase, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr("gateway.datasets.STREAM_SECONDS", 0.2)
    async with database.transaction() as connection:
        await connection.execute("LOCK TABLE data_alice.prices IN ACCESS EXCLUSIVE MODE")
        answer = await prices.get(f"/v1/datasets/prices/export?format={form}")
    assert (answer.status, answer.code) == (503, "statement-timeout")
    assert "POST /v1/tasks" in answer.json["detail"]


async def test_nobody_streams_the_dataset_of_another(prices: Client, bob: Client) -> None:
    assert (await bob.get("/v1/datasets/prices/export")).status == 404


@pytest.mark.parametrize(
    ("query", "field"), [("format=xml", "format"), ("format=", "format"), ("columns=id", "columns")]
)
async def test_a_stream_that_cannot_be_had_is_refused_by_name(prices: Client, query: str, field: str) -> None:
    answer = await prices.get(f"/v1/datasets/prices/export?{query}")
    assert (answer.status, answer.code) == (422, "invalid-request")
    assert [(error["in"], error["field"]) for error in answer.json["errors"]] == [("query", field)]
    answer = await prices.get("/v1/datasets/costs/export")
    assert (answer.status, answer.code, answer.json["detail"]) == (404, "not-found", "there is no dataset costs")


async def test_a_column_may_be_called_like_anything_in_the_query(alice: Client, database: PgDatabase) -> None:
    for load, columns in ((40, ("r",)), (41, ("r", "row")), (42, ("other",))):
        made = [Column(name, "text") for name in columns]
        values = ", ".join(["'x'"] * len(columns))
        await with_load(database, "alice", f"d{load}", load, f"({values})", mode="create", columns=made)
        expected = dict.fromkeys(columns, "x")
        assert (await alice.get(f"/v1/datasets/d{load}/rows")).json["rows"] == [expected]
        assert (await alice.get(f"/v1/datasets/d{load}/export?format=jsonl")).json == expected


@pytest.fixture
async def large(alice: Client, database: PgDatabase) -> Client:
    """Alice with a dataset that fills all buffers between PostgreSQL and a client that does not read."""
    values = ", ".join(f"({n}, 1, repeat('x', 1000000))" for n in range(60))
    await with_load(database, "alice", "large", 50, values, mode="create")
    return alice


async def stalled_stream(client: Client, version: str = "HTTP/1.1", form: str = "csv") -> RawClient:
    raw = await client.connect()
    await raw.send_head("GET", f"/v1/datasets/large/export?format={form}", version=version)
    status, _ = await raw.read_head()
    assert status == 200
    return raw


async def test_streams_that_nobody_reads_leave_connections_for_the_others(
    large: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.datasets.STREAM_SECONDS", 1000)
    stalled = await asyncio.gather(*(stalled_stream(large) for _ in range(STREAMS_AT_ONCE)))
    answer = await large.get("/v1/datasets/large/export")
    assert (answer.status, answer.code) == (429, "too-many-requests")
    assert "Retry-After" in answer.headers
    for raw in stalled:
        await raw.close()

    async def streams_again() -> bool:
        return (await large.get("/v1/datasets/large/export")).status == 200

    await until(streams_again)


@pytest.fixture
def in_transactions(database: PgDatabase) -> Callable[[], Awaitable[int]]:
    """How many other sessions read, or sit in a transaction."""

    async def count() -> int:
        async with database.connection() as connection:
            return int(
                await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND pid <> pg_backend_pid() AND backend_type = 'client backend' AND state <> 'idle'"
                )
            )

    return count


@pytest.mark.parametrize("form", ["csv", "jsonl"])
async def test_a_client_that_hangs_up_leaves_nothing_in_postgresql(
    large: Client,
    in_transactions: Callable[[], Awaitable[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: str,
) -> None:
    monkeypatch.setattr("gateway.datasets.STREAM_SECONDS", 1000)
    raw = await stalled_stream(large, form=form)
    assert await in_transactions() == 1
    await raw.close()

    async def is_over() -> bool:
        return await in_transactions() == 0

    await until(is_over)
    assert (await large.delete("/v1/datasets/large")).status == 204
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_client_that_reads_slowly_gets_everything(large: Client) -> None:
    raw = await stalled_stream(large, "HTTP/1.0")
    pieces = []
    while piece := await raw.reader.read(1_000_000):
        pieces.append(piece)
        await asyncio.sleep(0.005)  # slower than PostgreSQL sends, so that the gateway has to make it wait
    assert b"".join(pieces) == (await large.get("/v1/datasets/large/export")).body
    await raw.close()


async def test_a_drop_waits_for_a_stream(large: Client, database: PgDatabase) -> None:
    raw = await stalled_stream(large)
    dropping = asyncio.create_task(large.delete("/v1/datasets/large"))

    async def waits() -> bool:
        async with database.connection() as connection:
            return bool(await connection.fetchval(SOMEBODY_WAITS))

    await until(waits)
    await raw.close()
    assert (await dropping).status == 204
    assert (await large.get("/v1/datasets/large/export")).status == 404


@pytest.mark.parametrize("version", ["HTTP/1.0", "HTTP/1.1"])
async def test_a_stream_that_is_not_read_is_cut_and_looks_cut(
    large: Client, database: PgDatabase, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("gateway.datasets.STREAM_SECONDS", 0.2)
    raw = await stalled_stream(large, version)

    async def is_over() -> bool:
        async with database.connection() as connection:
            running = (
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND state = 'active' AND query LIKE 'COPY%'"
            )
            return await connection.fetchval(running) == 0

    await until(is_over)
    with pytest.raises(ConnectionResetError):
        await raw.reader.read()
    assert (await large.get("/v1/datasets")).status == 200
    await raw.close()
