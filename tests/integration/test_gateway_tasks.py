"""Tasks at the gateway: what it takes in, what it shows, how it waits. The commands' answers are tested elsewhere."""

import asyncio
from typing import Any

import pytest

from gateway.watch import TaskWatch
from shared.adapters.outbox import PgOutbox, relay
from shared.adapters.postgres import PgDatabase
from shared.adapters.rabbit import RabbitBus
from shared.adapters.task_store import PgTaskStore
from shared.config import Settings
from shared.domain.errors import (
    BadRecord,
    BusUnavailable,
    DatabaseUnavailable,
    InternalFault,
    NoProgress,
    SluiceError,
    StoreMisconfigured,
    StoreUnavailable,
)
from shared.domain.import_params import ImportParams
from shared.domain.task import Command, Task, TaskId, Trigger
from shared.worker import store_policy
from tests.gateway_process import Client, running_gateway, until


async def with_file(client: Client, name: str = "a.csv", data: bytes = b"x,y\n1,2\n") -> int:
    put = await client.put(f"/v1/files/{name}", data)
    return int(put.json["file_id"])


async def with_task(client: Client, **more: Any) -> int:
    file_id = await with_file(client)
    made = await client.post("/v1/tasks", {"kind": "import", "file_id": file_id, "dataset": "d", **more})
    assert made.status == 202, made.body
    return int(made.json["task_id"])


async def test_a_new_task_is_queued_and_pins_its_file(alice: Client, database: PgDatabase) -> None:
    file_id = await with_file(alice)
    request = {"kind": "import", "file_name": "a.csv", "dataset": "flights", "csv": {"delimiter": ","}}
    made = await alice.post("/v1/tasks", request)
    assert made.status == 202
    view = made.json
    assert made.headers["Location"] == f"/v1/tasks/{view['task_id']}"
    assert (view["kind"], view["state"]) == ("import", "queued")
    assert view["allowed"] == ["pause", "resume", "abort"]
    assert view["progress"]["bytes_total"] == 8
    assert view["params"]["source"]["file_id"] == file_id
    assert "object_key" not in view["params"]["source"]
    assert (await alice.get(view["links"]["self"])).json == view
    async with database.connection() as connection:
        stored = await connection.fetchval("SELECT params FROM sluice.tasks")
        key = await connection.fetchval("SELECT object_key FROM sluice.files")
    params = ImportParams.model_validate(stored)
    assert (params.source.object_key, params.csv.delimiter) == (key, ",")


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "nonsense"}, "kind"),
    ({"kind": None}, "kind"),
    ({"dataset": "1st"}, "dataset"),
    ({"dataset": "a" * 64}, "dataset"),
    ({"dataset": 'a"; drop table x'}, "dataset"),
    ({"dataset": None}, "dataset"),
    ({"mode": "upsert"}, "mode"),
    ({"schema_mode": "evolve"}, ""),
    ({"on_error": "ignore"}, "on_error"),
    ({"max_rejects": -1}, "max_rejects"),
    ({"max_bytes_per_second": 0}, "max_bytes_per_second"),
    ({"max_bytes_per_second": 2**63}, "max_bytes_per_second"),
    ({"file_name": "also.csv"}, ""),
    ({"file_id": None}, ""),
    ({"file_id": 0}, "file_id"),
    ({"file_id": 2**70}, "file_id"),
    ({"not_before": "9999-12-31T23:00:00-12:00"}, "not_before"),
    ({"not_before": "9999-12-31T23:00:00Z", "run_window": {"from": "01:00", "to": "02:00"}}, "not_before"),
    ({"csv": {"delimiter": ",,"}}, "csv.delimiter"),
    ({"csv": {"encoding": "klingon"}}, "csv.encoding"),
    ({"csv": {"unknown": 1}}, "csv.unknown"),
    ({"unknown": 1}, "unknown"),
    ({"csv": {"null": "\0"}}, ""),
]


async def test_a_request_that_is_not_right_names_its_fault(alice: Client) -> None:
    for change, field in BAD_REQUESTS:
        request = {"kind": "import", "file_id": 1, "dataset": "d", **change}
        answer = await alice.post("/v1/tasks", {name: value for name, value in request.items() if value is not None})
        assert (answer.status, answer.code) == (422, "invalid-request"), answer.body
        assert field in [error["field"] for error in answer.json["errors"]]
        assert all(error["in"] == "body" and error["fault"] for error in answer.json["errors"])


async def test_a_run_window_is_shown_as_it_was_given(alice: Client, database: PgDatabase) -> None:
    window = {"from": "22:00", "to": "06:00", "time_zone": "Europe/Berlin"}
    task_id = await with_task(alice, run_window=window)
    assert (await alice.get(f"/v1/tasks/{task_id}")).json["run_window"] == window
    async with database.connection() as connection:  # as tasks of before may have it
        await connection.execute(
            "UPDATE sluice.tasks SET run_window = $1",
            {"start": "22:00", "end": "06:00", "time_zone": "Europe/Berlin"},
        )
    assert (await alice.get(f"/v1/tasks/{task_id}")).json["run_window"] == window


async def test_a_file_that_is_not_ones_own_is_not_there(alice: Client, bob: Client) -> None:
    file_id = await with_file(bob)
    for named in ({"file_id": file_id}, {"file_id": 2**62}, {"file_name": "a.csv"}):
        answer = await alice.post("/v1/tasks", {"kind": "import", "dataset": "d", **named})
        assert (answer.status, answer.code) == (404, "not-found")
        assert {name: answer.json[name] for name in named} == named


async def test_the_dataset_must_fit_the_mode(alice: Client, database: PgDatabase) -> None:
    file_id = await with_file(alice)
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.datasets (account_id, name, columns)"
            " SELECT account_id, 'there', '[]' FROM sluice.accounts WHERE username = 'alice'"
        )
    expected = {
        ("create", "there"): 409, ("append", "there"): 202, ("replace", "there"): 202,
        ("create", "new"): 202, ("append", "new"): 404, ("replace", "new"): 202,
    }  # fmt: skip
    for (mode, dataset), status in expected.items():
        answer = await alice.post("/v1/tasks", {"kind": "import", "file_id": file_id, "dataset": dataset, "mode": mode})
        assert answer.status == status, (mode, dataset, answer.body)


async def test_the_same_key_and_request_make_one_task(alice: Client) -> None:
    file_id = await with_file(alice)
    request = {"kind": "import", "file_id": file_id, "dataset": "d"}
    key = {"Idempotency-Key": "2026-05-01 import"}
    answers = await asyncio.gather(*(alice.post("/v1/tasks", request, headers=key) for _ in range(10)))
    assert sorted(answer.status for answer in answers) == [200] * 9 + [202]
    assert len({answer.json["task_id"] for answer in answers}) == 1
    assert len((await alice.get("/v1/tasks")).json["tasks"]) == 1


async def test_a_key_finds_its_task_even_when_the_file_is_gone(alice: Client) -> None:
    file_id = await with_file(alice)
    request = {"kind": "import", "file_id": file_id, "dataset": "d"}
    first = await alice.post("/v1/tasks", request, headers={"Idempotency-Key": "k"})
    await alice.delete(f"/v1/files/{file_id}")
    again = await alice.post("/v1/tasks", request, headers={"Idempotency-Key": "k"})
    assert (first.status, again.status) == (202, 200)
    assert again.json["task_id"] == first.json["task_id"]


async def test_a_key_goes_with_one_request_of_one_account(alice: Client, bob: Client) -> None:
    key = {"Idempotency-Key": "k"}
    request = {"kind": "import", "file_id": await with_file(alice), "dataset": "d"}
    first = await alice.post("/v1/tasks", request, headers=key)
    other = await alice.post("/v1/tasks", {**request, "dataset": "e"}, headers=key)
    assert (other.status, other.code, other.json["task_id"]) == (409, "conflict", first.json["task_id"])
    of_bob = await bob.post("/v1/tasks", {**request, "file_id": await with_file(bob)}, headers=key)
    assert of_bob.status == 202


BAD_KEYS = ["", "x" * 256, "ä"]


async def test_a_key_that_is_none_is_refused(alice: Client) -> None:
    for key in BAD_KEYS:
        request = {"kind": "import", "file_id": 1, "dataset": "d"}
        answer = await alice.post("/v1/tasks", request, headers={"Idempotency-Key": key})
        assert (answer.status, answer.json["errors"][0]["field"]) == (422, "Idempotency-Key")


async def test_lists_page_through_everything_once(alice: Client) -> None:
    file_id = await with_file(alice)
    made = [
        (await alice.post("/v1/tasks", {"kind": "import", "file_id": file_id, "dataset": f"d{n}"})).json["task_id"]
        for n in range(7)
    ]
    for kind, path in (("tasks", "/v1/tasks?kind=import&state=queued&state=running&limit=3"),):
        seen, pages = [], 0
        while path:
            page = await alice.get(path)
            seen += [item["task_id"] for item in page.json[kind]]
            pages += 1
            link = page.headers.get("Link", "")
            assert (page.json["next_cursor"] is None) == (link == "")
            path = link.removesuffix('>; rel="next"').removeprefix("<")
        assert (seen, pages) == (made[::-1], 3)


async def test_files_are_filtered_by_name_time_and_size(alice: Client) -> None:
    for name, size in (("logs/a.csv", 1), ("logs/b.csv", 10), ("data/100%_a.csv", 100)):
        await alice.put(f"/v1/files/{name.replace('%', '%25')}", b"x" * size)
    now = (await alice.get("/v1/files?limit=1")).json["files"][0]["created_at"].replace("+", "%2B")
    expected = {
        "": 3, "prefix=logs/": 2, "contains=a.csv": 2, "contains=%25_": 1, "prefix=%25": 0, "min_bytes=10": 2,
        "max_bytes=10": 2, "min_bytes=2&max_bytes=99": 1, f"created_from={now}": 1, f"created_to={now}": 2,
        "prefix=logs/&contains=b": 1,
    }  # fmt: skip
    found = {query: len((await alice.get(f"/v1/files?{query}")).json["files"]) for query in expected}
    assert found == expected


async def test_a_wait_ends_when_the_tasks_event_comes(
    alice: Client, settings: Settings, database: PgDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.watch.LOOK_SECONDS", 1000)  # only events can end the waits
    begun: list[TaskId] = []
    wait = TaskWatch.wait

    async def noted_wait(watch: TaskWatch, task_id: TaskId, *args: Any, **more: Any) -> Task | None:
        begun.append(task_id)
        return await wait(watch, task_id, *args, **more)

    monkeypatch.setattr(TaskWatch, "wait", noted_wait)
    task_id = await with_task(alice)

    async def listens() -> bool:
        return (await alice.get("/readyz")).status == 200

    await until(listens)
    waits = [
        asyncio.create_task(alice.get(f"/v1/tasks/{task_id}?wait=60")),
        asyncio.create_task(alice.get(f"/v1/tasks/{task_id}?wait=60&until=change")),
    ]

    async def both_wait() -> bool:
        return len(begun) == 2

    await until(both_wait)
    store = PgTaskStore(database, PgOutbox(None), store_policy(settings))
    await store.command(TaskId(task_id), Command.PAUSE, account_id=None, actor="test", reason=None)
    bus = RabbitBus(settings.amqp_url, name="test")
    running = asyncio.create_task(bus.run())

    async def told() -> bool:
        try:
            return await relay(database, bus, older_than_seconds=0) > 0
        except BusUnavailable:
            return False

    await until(told)
    answers = await asyncio.gather(*waits)
    assert [answer.json["state"] for answer in answers] == ["paused", "paused"]
    running.cancel()
    await asyncio.wait([running])


async def test_a_wait_sees_a_move_whose_event_was_lost(alice: Client, database: PgDatabase) -> None:
    task_id = await with_task(alice)
    waiting = asyncio.create_task(alice.get(f"/v1/tasks/{task_id}?wait=60"))
    async with database.connection() as connection:
        await connection.execute("UPDATE sluice.tasks SET state = 'succeeded', ended_at = now()")
    assert (await waiting).json["state"] == "succeeded"


async def test_a_wait_ends_when_the_gateway_stops(settings: Settings) -> None:
    async with running_gateway(settings) as nobody:
        alice = await nobody.with_account("alice")
        task_id = await with_task(alice)
        raw = await alice.connect()
        await raw.send_head("GET", f"/v1/tasks/{task_id}?wait=60")
        # It is being answered when a later request on another connection is.
        await alice.get("/healthz")
    assert (await raw.read_head())[0] == 200
    await raw.close()


async def test_a_command_that_nobody_answers_is_queued(settings: Settings) -> None:
    async with running_gateway(settings, command_reply_seconds=0.2) as nobody:
        alice = await nobody.with_account("alice")
        task_id = await with_task(alice)
        for command in ("pause", "resume", "abort"):
            answer = await alice.post(f"/v1/tasks/{task_id}/{command}", {"reason": "lunch"})
            assert answer.status == 202, answer.body
            assert (answer.json["delivery"], answer.json["command"]) == ("queued", command)


async def test_a_command_without_a_bus_is_503(settings: Settings) -> None:
    async with running_gateway(settings, amqp_url="amqp://guest:guest@127.0.0.1:1/") as nobody:
        alice = await nobody.with_account("alice")
        task_id = await with_task(alice)
        answer = await alice.post(f"/v1/tasks/{task_id}/pause")
        assert (answer.status, answer.code) == (503, "bus-unavailable")
        assert int(answer.headers["Retry-After"]) > 0
        ready = await nobody.get("/readyz")
        assert ready.status == 503
        assert ready.json["checks"]["rabbitmq"].startswith("away")
        assert ready.json["checks"]["postgres"] == "ready"


async def test_rejects_are_paged_and_downloaded(alice: Client, database: PgDatabase) -> None:
    task_id = await with_task(alice)
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.rejects (task_id, line, column_name, reason, raw)"
            " SELECT $1, n * 10, 'x', 'not a \"number\"', 'a,' || n || E'\\n' FROM generate_series(1, 2500) n",
            task_id,
        )
    page = await alice.get(f"/v1/tasks/{task_id}/rejects?limit=2")
    assert [reject["line"] for reject in page.json["rejects"]] == [10, 20]
    assert page.json["rejects"][0] == {"line": 10, "column": "x", "reason": 'not a "number"', "raw": "a,1\n"}
    following = await alice.get(f"/v1/tasks/{task_id}/rejects?limit=1000&cursor={page.json['next_cursor']}")
    assert following.json["rejects"][0]["line"] == 30
    for answer in (
        await alice.get(f"/v1/tasks/{task_id}/rejects", headers={"Accept": "text/csv"}),
        await alice.get(f"/v1/tasks/{task_id}/rejects?format=csv"),
    ):
        assert answer.headers["Content-Type"].startswith("text/csv")
        assert answer.body.startswith(b'line,column,reason,raw\r\n10,x,"not a ""number""","a,1\n"\r\n')
        assert answer.body.count(b"\r\n") == 2501


async def test_pages_of_long_rejects_stay_small(alice: Client, database: PgDatabase) -> None:
    task_id = await with_task(alice)
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.rejects (task_id, line, reason, raw)"
            " SELECT $1, n, 'r', repeat('x', 1000000) FROM generate_series(1, 12) n",
            task_id,
        )
    path, lines = f"/v1/tasks/{task_id}/rejects", []
    while path:
        page = await alice.get(path)
        assert len(page.body) < 6_000_000
        lines += [reject["line"] for reject in page.json["rejects"]]
        path = page.headers.get("Link", "").removesuffix('>; rel="next"').removeprefix("<")
    assert lines == list(range(1, 13))


async def test_the_audit_trail_says_who_did_what(alice: Client, settings: Settings, database: PgDatabase) -> None:
    task_id = await with_task(alice)
    store = PgTaskStore(database, PgOutbox(None), store_policy(settings))
    await store.command(TaskId(task_id), Command.PAUSE, account_id=None, actor="operator", reason="lunch")
    events = (await alice.get(f"/v1/tasks/{task_id}/events")).json["events"]
    assert [(e["event"], e["from_state"], e["to_state"], e["actor"], e["reason"]) for e in events] == [
        ("TaskQueued", None, "queued", "alice", None),
        ("TaskPaused", "queued", "paused", "operator", "lunch"),
    ]


SECRETS = [
    StoreUnavailable("the object store at http://10.0.0.7:8333 could not serve 'files/1/abc'"),
    StoreMisconfigured("the object store at http://10.0.0.7:8333 refuses us"),
    DatabaseUnavailable("PostgreSQL does not answer: 10.0.0.7"),
    InternalFault("unexpected ValueError: 10.0.0.7"),
    NoProgress("8 claims in turn", last_error=InternalFault("unexpected ValueError: 10.0.0.7").as_json()),
]


async def with_failed_task(client: Client, settings: Settings, database: PgDatabase, error: SluiceError) -> int:
    task_id = TaskId(await with_task(client))
    store = PgTaskStore(database, PgOutbox(None), store_policy(settings))
    task = await store.claim(task_id, "worker@host:1")
    assert task is not None
    await store.move(task_id, Trigger.FAIL, actor="worker@host:1", epoch=task.epoch, error=error)
    return task_id


async def test_what_is_for_operators_is_not_shown_to_the_owner(
    alice: Client, settings: Settings, database: PgDatabase
) -> None:
    for error in SECRETS:
        task_id = await with_failed_task(alice, settings, database, error)
        shown, events = await alice.get(f"/v1/tasks/{task_id}"), await alice.get(f"/v1/tasks/{task_id}/events")
        assert shown.json["error"]["code"] == error.code
        assert events.json["events"][-1]["event"] == "TaskFailed"
        assert b"10.0.0.7" not in shown.body + events.body


async def test_what_is_wrong_with_the_data_is_shown(alice: Client, settings: Settings, database: PgDatabase) -> None:
    error = BadRecord("invalid input for bigint", line=7)
    task_id = await with_failed_task(alice, settings, database, error)
    assert (await alice.get(f"/v1/tasks/{task_id}")).json["error"] == error.as_json()
    events = (await alice.get(f"/v1/tasks/{task_id}/events")).json["events"]
    assert events[-1]["reason"] == error.detail
