"""What the gateway asks of a request for an export before it makes a task of it."""

from typing import Any

import pytest

from shared.adapters.postgres import PgDatabase
from tests.gateway_process import Client

COLUMNS = [{"name": "n", "type": "bigint"}, {"name": "day", "type": "date"}]
EXPORT = {"kind": "export", "dataset": "data"}


@pytest.fixture
async def owner(alice: Client, database: PgDatabase) -> Client:
    """An account with a dataset."""
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.datasets (account_id, name, columns)"
            " SELECT account_id, 'data', $2 FROM sluice.accounts WHERE username = $1",
            alice.username,
            COLUMNS,
        )
    return alice


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"columns": ["n", "m"]}, "columns.1"),
        ({"columns": ["n", "n"]}, ""),
        ({"columns": []}, "columns"),
        ({"conditions": [{"column": "n", "op": "=", "value": "x"}, {"column": "day", "op": "<", "value": 1}]}, "cond"),
        ({"conditions": [{"column": "n", "op": "in", "value": 1}]}, "conditions"),
        ({"conditions": [{"column": "n", "op": "; DROP TABLE", "value": 1}]}, "conditions"),
        ({"conditions": [{"column": "n", "op": "=", "value": "\x00"}]}, ""),
        ({"time_column": "n", "from_date": "2024-01-01"}, "time_column"),
        ({"time_column": "day", "from_date": "2024-01-01T00:00:00+01:00"}, "time_column"),
        ({"time_column": "day"}, ""),
        ({"format": "docx"}, "format"),
        ({"limit": -1}, "limit"),
        ({"csv": {"delimiter": '"'}}, "csv"),
        ({"csv": {"delimiter": ";", "null": "a;b"}}, "csv"),
        ({"file_name": "a/../b"}, "file_name"),
        ({"file_name": "a\nb"}, "file_name"),
    ],
)
async def test_a_request_that_does_not_fit_is_refused_and_says_where(
    owner: Client, asked: dict[str, Any], field: str
) -> None:
    answer = await owner.post("/v1/tasks", {**EXPORT, **asked})
    assert answer.status == 422, answer.body
    assert any(field in error["field"] and error["in"] == "body" for error in answer.json["errors"]), answer.json


async def test_a_dataset_of_nobody_or_of_another_account_is_unknown(owner: Client, bob: Client) -> None:
    assert (await owner.post("/v1/tasks", {**EXPORT, "dataset": "other"})).status == 404
    assert (await bob.post("/v1/tasks", EXPORT)).status == 404


async def test_a_load_that_the_dataset_does_not_have_is_unknown(owner: Client, database: PgDatabase) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.loads (load_id, account_id, dataset_id, columns, rows, bytes, rejects, detached_at)"
            " SELECT n, account_id, dataset_id, columns, 1, 1, 0, CASE n WHEN 12 THEN now() END"
            " FROM sluice.datasets, generate_series(11, 12) n"
        )
    for load, status in ((11, 202), (12, 404), (13, 404)):
        answer = await owner.post("/v1/tasks", {**EXPORT, "load_id": load})
        assert answer.status == status, answer.body
        if status == 404:
            assert (answer.code, answer.json["load_id"]) == ("not-found", load)


async def test_a_file_is_replaced_only_when_asked(owner: Client) -> None:
    await owner.put("/v1/files/out.csv", b"mine")
    assert (await owner.post("/v1/tasks", {**EXPORT, "file_name": "out.csv"})).status == 409
    made = await owner.post("/v1/tasks", {**EXPORT, "file_name": "out.csv", "overwrite": True})
    assert made.status == 202
    assert made.json["params"]["file_name"] == "out.csv"
