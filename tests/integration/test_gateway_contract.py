"""What holds for every operation: documented and real are the same, owners are apart, faults are named."""

import random
import re
from typing import Any

import orjson
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import ValidationError

from gateway.app import OPERATIONS
from gateway.intake import TaskRequest
from gateway.operations import MAX_JSON_BYTES, Auth, Operation
from gateway.problems import MOST_FAULTS
from tests.gateway_process import Client

IDS = {"file": "file_id", "task": "task_id", "token": "token_id"}


async def document(client: Client) -> Any:
    return (await client.get("/openapi.json")).json


def path_of(operation: Operation, value: str = "1") -> str:
    return re.sub(r"{\w+}", value, operation.path)


def is_documented(described: Any, operation: Operation, status: int) -> bool:
    return str(status) in described["paths"][operation.path][operation.method.lower()]["responses"]


def name_of(operation: Operation) -> str:
    return f"{operation.method} {operation.path}"


async def test_the_document_is_valid_openapi(nobody: Client) -> None:
    described = await document(nobody)
    assert described["openapi"].startswith("3.1")
    assert [str(error) for error in OpenAPIV31SpecValidator(described).iter_errors()] == []


async def test_every_operation_is_documented_and_every_documented_one_exists(nobody: Client) -> None:
    described = await document(nobody)
    documented = {(m.upper(), path) for path, methods in described["paths"].items() for m in methods}
    assert documented == {(operation.method, operation.path) for operation in OPERATIONS}
    names = [op["operationId"] for methods in described["paths"].values() for op in methods.values()]
    assert len(set(names)) == len(names)
    # Templates that differ in the names of their parameters only would be one path.
    templates = [re.sub(r"{\w+}", "{}", path) for path in described["paths"]]
    assert len(set(templates)) == len(templates)
    for method, path in documented:
        answer = await nobody.ask(method, re.sub(r"{\w+}", "1", path))
        assert answer.status not in (404, 405), (method, path)


async def test_nobody_gets_in_without_credentials(nobody: Client) -> None:
    described = await document(nobody)
    for operation in OPERATIONS:
        answer = await nobody.ask(operation.method, path_of(operation))
        assert is_documented(described, operation, answer.status), (name_of(operation), answer.status)
        assert (answer.status == 401) == (operation.auth is Auth.REQUIRED), name_of(operation)


async def test_an_unknown_query_parameter_is_refused(alice: Client) -> None:
    described = await document(alice)
    for operation in OPERATIONS:
        answer = await alice.ask(operation.method, path_of(operation) + "?nonsense=1")
        assert answer.status == 422, name_of(operation)
        assert is_documented(described, operation, 422), name_of(operation)
        if operation.method != "HEAD":
            assert answer.json["errors"][0]["field"] == "nonsense", name_of(operation)


async def test_what_belongs_to_another_is_answered_like_what_is_not_there(alice: Client, bob: Client) -> None:
    file_id = (await bob.put("/v1/files/a.csv", b"x\n1\n")).json["file_id"]
    made = await bob.post("/v1/tasks", {"kind": "import", "file_id": file_id, "dataset": "d"})
    token = await bob.post("/v1/tokens", {"name": "x"})
    theirs = {"file": file_id, "task": made.json["task_id"], "token": token.json["token_id"]}
    unknown = [str(2**62), "0", "-1", str(2**63), "9" * 400, "x", "1.0", "%00", "%F0%9F%98%80", "%B2"]
    asked = 0
    for operation in OPERATIONS:
        found = re.search(r"{(file|task|token)}", operation.path)
        if found is None or operation.streams_body:
            continue
        for value in (str(theirs[found[1]]), *unknown):
            answer = await alice.ask(operation.method, path_of(operation, value))
            assert answer.status == 404, (operation.path, value, answer.body)
            if operation.method != "HEAD":
                assert answer.code == "not-found"
            asked += 1
    assert asked > 100
    for path in ("/v1/files", "/v1/tasks", "/v1/datasets"):
        assert not (await alice.get(path)).json[path.rpartition("/")[2]]
    assert (await bob.get(f"/v1/files/{file_id}")).status == 200


async def test_an_unknown_dataset_is_not_found(alice: Client) -> None:
    for operation in OPERATIONS:
        if "{dataset}" in operation.path:
            for name in ("unknown", "a%00b", "A", "%22", "x" * 64, "a%0A"):
                path = operation.path.replace("{dataset}", name).replace("{load}", "1")
                answer = await alice.ask(operation.method, path)
                assert (answer.status, answer.code) == (404, "not-found"), path


BAD_QUERIES = [
    ("limit=0", "limit"),
    ("limit=1001", "limit"),
    ("limit=ten", "limit"),
    ("limit=1&limit=2", "limit"),
    ("cursor=nonsense", "cursor"),
    ("cursor=MQ==", "cursor"),
    ("cursor=LTE", "cursor"),
    ("cursor=", "cursor"),
    ("state=flying", "state.0"),
    ("kind=flight", "kind"),
    ("created_from=yesterday", "created_from"),
    ("created_from=2026-01-01T00:00:00", "created_from"),
    ("created_from=0001-01-01T00:00:00%2B14:00", "created_from"),
    ("created_to=9999-12-31T23:00:00-12:00", "created_to"),
    ("kind=%00", "kind"),
]


async def test_a_query_that_is_not_right_names_its_fault(alice: Client) -> None:
    for query, field in BAD_QUERIES:
        answer = await alice.get(f"/v1/tasks?{query}")
        assert (answer.status, answer.code) == (422, "invalid-request"), query
        assert field in [error["field"] for error in answer.json["errors"]]


BAD_BODIES = [
    (b"{", "application/json", 400, "malformed"),
    (b"\xff", "application/json", 400, "malformed"),
    (b'{"name": "\\ud800"}', "application/json", 400, "malformed"),
    (b"[]", "application/json", 422, "invalid-request"),
    (b"null", "application/json", 422, "invalid-request"),
    (b"", "application/json", 422, "invalid-request"),
    (b"{}", "text/plain", 415, "unsupported-media-type"),
    (b"{}", "application/x-www-form-urlencoded", 415, "unsupported-media-type"),
    (b'{"name": "a\\u0000b"}', "application/json", 422, "invalid-request"),
    (b'{"name": "a\\nb"}', "application/json", 422, "invalid-request"),
    (b'{"name": "' + b"x" * MAX_JSON_BYTES + b'"}', "application/json", 413, "too-large"),
    (b"[" * 100_000, "application/json", 400, "malformed"),
]


async def test_a_body_that_is_not_right_is_refused(alice: Client) -> None:
    described = await document(alice)
    create_token = next(operation for operation in OPERATIONS if operation.name == "create_token")
    for body, media_type, status, code in BAD_BODIES:
        assert is_documented(described, create_token, status), status
        answer = await alice.post("/v1/tokens", data=body, headers={"Content-Type": media_type})
        assert (answer.status, answer.code) == (status, code), (body[:50], media_type)


@pytest.mark.parametrize(
    "request_",
    [
        {"kind": "export", "conditions": [{"column": "a", "op": "in", "value": [[]] * 9_000}]},
        {"kind": "export", "columns": [0] * 1_600},
        {"kind": "import", "file_id": 1, "csv": {"columns": [0] * 1_600}},
    ],
)
def test_the_faults_of_a_long_list_are_not_counted_to_its_end(request_: dict[str, Any]) -> None:
    """Else a body of one megabyte would take gigabytes, and the loop for many seconds."""
    with pytest.raises(ValidationError) as raised:
        TaskRequest.model_validate_json(orjson.dumps({"dataset": "d", **request_}))
    assert raised.value.error_count() < 20


async def test_more_faults_than_anybody_reads_are_counted_only(nobody: Client) -> None:
    answer = await nobody.post("/v1/accounts", {f"unknown{n}": 0 for n in range(MOST_FAULTS)})
    assert (answer.status, answer.code) == (422, "invalid-request")
    assert answer.json["errors"] == [{"in": "body", "field": "", "fault": "1,002 faults, too many to name"}]


async def test_what_is_no_operation_is_a_problem_too(nobody: Client) -> None:
    unknown, wrong = await nobody.get("/v2/nonsense"), await nobody.delete("/v1/accounts")
    assert (unknown.status, unknown.code) == (404, "not-found")
    assert (wrong.status, wrong.code, wrong.headers["Allow"]) == (405, "method-not-allowed", "POST")


async def test_a_request_id_is_echoed_if_it_is_harmless(nobody: Client) -> None:
    for given, echoed in (("abc-1", True), ("x" * 129, False), ("a b", False)):
        for path in ("/healthz", "/nonsense"):
            answer = await nobody.get(path, headers={"X-Request-Id": given})
            assert (answer.headers["X-Request-Id"] == given) is echoed
            assert len(answer.headers["X-Request-Id"]) <= 128


async def test_a_page_of_another_site_changes_nothing(alice: Client) -> None:
    described = await document(alice)
    for operation in OPERATIONS:
        is_refused = operation.method not in ("GET", "HEAD")
        answer = await alice.ask(operation.method, path_of(operation), headers={"Sec-Fetch-Site": "cross-site"})
        assert (answer.status == 403) is is_refused, name_of(operation)
        assert is_documented(described, operation, answer.status), (name_of(operation), answer.status)
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 404), ("none", 404)):
        answer = await alice.post("/v1/tasks/1/abort", headers={"Sec-Fetch-Site": site})
        assert answer.status == status, site


async def test_metrics_count_requests_by_route(alice: Client) -> None:
    await alice.put("/v1/files/a", b"12345")
    await alice.get("/v1/files/77")
    text = (await alice.get("/metrics")).body.decode()
    assert 'sluice_http_requests_total{method="GET",route="/v1/files/{file}",status="404"} 1.0' in text
    assert "sluice_file_bytes_received_total 5.0" in text


@pytest.mark.parametrize("seed", range(4))
async def test_no_nonsense_is_an_internal_error(alice: Client, seed: int) -> None:
    """Random bytes in paths, queries, headers and bodies: refused, never a fault of the server."""
    chance = random.Random(seed)
    texts = [
        "",
        "%00",
        "%ff",
        "%F0%9F%98%80",
        "1",
        "-1",
        "9" * 30,
        "..",
        "%2e%2e",
        "a",
        "'",
        "%22",
        "{}",
        "%25s",
        "\udcff",
    ]
    for _ in range(150):
        operation = chance.choice(OPERATIONS)
        path = re.sub(r"{\w+}", lambda _: chance.choice(texts) or "x", operation.path)
        if chance.random() < 0.5:
            names = ["limit", "cursor", "state", "wait", "until", "prefix", "load", chance.choice(texts)]
            path += f"?{chance.choice(names)}={chance.choice(texts)}"
        headers = {
            name: chance.choice([*texts, "bytes=0-1", '"x"', "application/json", "text/csv"])
            for name in (
                "Range",
                "If-Range",
                "If-None-Match",
                "Idempotency-Key",
                "X-Request-Id",
                "Content-Type",
                "Accept",
            )
            if chance.random() < 0.2
        }
        body = b"" if operation.method in ("GET", "HEAD") else chance.randbytes(chance.choice([0, 1, 50]))
        raw = await alice.connect()
        lines = [f"{operation.method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in {**raw.headers, **headers}.items()]
        await raw.send(("\r\n".join(lines) + "\r\n\r\n").encode(errors="surrogateescape") + body)
        status, head = await raw.read_head()
        await raw.close()
        assert status < 500 or path.startswith("/readyz"), (operation.method, path, headers, body, head)
