"""Start times and run windows at the gateway: what it refuses, and what it says of tasks that wait."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from shared.adapters.catalog import Column
from shared.adapters.postgres import PgDatabase
from tests.gateway_process import Client

NIGHT = {"from": "22:00", "to": "06:00"}
REQUESTS: dict[str, dict[str, Any]] = {
    "import": {"kind": "import", "file_name": "a.csv", "dataset": "new"},
    "export": {"kind": "export", "dataset": "there"},
}
kinds = pytest.mark.parametrize("kind", REQUESTS)


@pytest.fixture
async def user(alice: Client, database: PgDatabase) -> Client:
    """Alice with a file and a dataset."""
    await alice.put("/v1/files/a.csv", b"n\n1\n")
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.datasets (account_id, name, columns)"
            " SELECT account_id, 'there', $1 FROM sluice.accounts WHERE username = 'alice'",
            [Column("n", "bigint").as_json()],
        )
    return alice


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"run_window": {**NIGHT, "time_zone": "Mars/Olympus"}}, "run_window.time_zone", "'Mars/Olympus' is not a known"),
    ({"run_window": {**NIGHT, "time_zone": ""}}, "run_window.time_zone", "not a known IANA time zone"),
    ({"run_window": {**NIGHT, "time_zone": "../../etc/passwd"}}, "run_window.time_zone", "not a known"),
    ({"run_window": {**NIGHT, "zone": "UTC"}}, "run_window.zone", ""),
    ({"run_window": {"from": "22:00"}}, "run_window.to", "required"),
    ({"run_window": {**NIGHT, "to": "22:00"}}, "run_window", "from and to must differ"),
    ({"run_window": {**NIGHT, "to": "24:00"}}, "run_window.to", "as 22:00, from 00:00 to 23:59"),
    ({"run_window": {**NIGHT, "from": "9:00"}}, "run_window.from", "as 22:00"),
    ({"run_window": {**NIGHT, "from": "٢٢:00"}}, "run_window.from", "as 22:00"),
    ({"run_window": {**NIGHT, "from": "22:00\n"}}, "run_window.from", "as 22:00"),
    ({"run_window": {**NIGHT, "from": 22}}, "run_window.from", "string"),
    ({"run_window": "22:00-06:00"}, "run_window", "object"),
    ({"not_before": "2030-01-01T22:00:00"}, "not_before", "timezone"),
    ({"not_before": "2030-01-01"}, "not_before", "timezone"),
    ({"not_before": "2030-02-30T22:00:00Z"}, "not_before", "day value"),
    ({"not_before": "tomorrow"}, "not_before", ""),
]


@kinds
async def test_a_schedule_that_is_not_right_names_its_fault(user: Client, kind: str) -> None:
    for wrong, field, fault in WRONG:
        answer = await user.post("/v1/tasks", {**REQUESTS[kind], **wrong})
        assert (answer.status, answer.code) == (422, "invalid-request"), wrong
        [error] = answer.json["errors"]
        assert (error["in"], error["field"]) == ("body", field)
        assert fault in error["fault"], error
        assert field in answer.json["detail"]
    assert (await user.get("/v1/tasks")).json["tasks"] == []


@kinds
async def test_a_task_that_waits_shows_why_and_until_when(user: Client, kind: str) -> None:
    now = datetime.now(UTC)
    opens = (now + timedelta(hours=3)).replace(second=0, microsecond=0)
    closed = {"from": f"{opens:%H:%M}", "to": f"{opens + timedelta(hours=20):%H:%M}", "time_zone": "UTC"}
    start = now + timedelta(days=1)
    waits: list[tuple[dict[str, Any], datetime, str | None]] = [
        ({"run_window": closed}, opens, f"outside its run window: {closed['from']} to {closed['to']} UTC"),
        ({"not_before": start.isoformat()}, start, None),
    ]
    for asked, until, reason in waits:
        made = await user.post("/v1/tasks", {**REQUESTS[kind], **asked})
        assert made.status == 202, made.body
        view = (await user.get(made.headers["Location"])).json
        assert (view["state"], view["run_window"]) == ("queued", asked.get("run_window"))
        assert datetime.fromisoformat(view["not_before"]) == until
        [event] = (await user.get(view["links"]["events"])).json["events"]
        assert (event["event"], event["reason"]) == ("TaskQueued", reason)


@kinds
async def test_a_start_that_is_over_is_no_fault(user: Client, kind: str) -> None:
    """A client that repeats its request must not be refused because time has passed."""
    made = await user.post("/v1/tasks", {**REQUESTS[kind], "not_before": "2020-01-01T00:00:00+01:00"})
    assert (made.status, made.json["not_before"]) == (202, "2019-12-31T23:00:00Z")
