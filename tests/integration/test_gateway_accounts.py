"""Accounts, passwords and tokens at the gateway."""

import asyncio
import base64

import pytest
from argon2 import PasswordHasher
from pydantic import ValidationError

from gateway.passwords import DECOY, QUEUE_PER_THREAD, Passwords
from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from shared.domain.errors import TooManyRequests
from tests.gateway_process import PASSWORD, Client, basic, bearer, running_gateway


def with_admin(settings: Settings, password: str = PASSWORD) -> Settings:
    return Settings.model_validate({**settings.model_dump(), "admin_username": "root", "admin_password": password})


async def test_an_account_that_registers_can_show_itself(nobody: Client) -> None:
    made = await nobody.post("/v1/accounts", {"username": "carol", "password": PASSWORD})
    shown = await nobody.get("/v1/accounts/me", headers=basic("carol"))
    assert (made.status, shown.status) == (201, 200)
    assert made.json == shown.json
    assert shown.json["username"] == "carol"
    assert not shown.json["is_admin"]
    assert PASSWORD.encode() not in made.body


async def test_a_username_is_taken_once(alice: Client) -> None:
    again = await alice.post("/v1/accounts", {"username": "alice", "password": PASSWORD})
    assert (again.status, again.code) == (409, "conflict")


BAD_ACCOUNTS = [
    ("Alice", PASSWORD, "username"),
    ("a", PASSWORD, "username"),
    ("1alice", PASSWORD, "username"),
    ("alice;drop", PASSWORD, "username"),
    ("alice\n", PASSWORD, "username"),
    ("a" * 32, PASSWORD, "username"),
    ("alice", "short", "password"),
    ("alice", "x" * 1001, "password"),
]


async def test_a_bad_username_or_password_is_named(nobody: Client) -> None:
    for username, password, field in BAD_ACCOUNTS:
        answer = await nobody.post("/v1/accounts", {"username": username, "password": password})
        assert (answer.status, answer.code) == (422, "invalid-request"), username
        assert [error["field"] for error in answer.json["errors"]] == [field]
        assert password.encode() not in answer.body or password == PASSWORD


async def test_closed_registration_is_open_to_administrators_only(settings: Settings) -> None:
    async with running_gateway(with_admin(settings), registration_enabled=False) as nobody:
        asked = {"username": "carol", "password": PASSWORD}
        assert (await nobody.post("/v1/accounts", asked)).code == "forbidden"
        assert (await nobody.post("/v1/accounts", asked, headers=basic("root"))).status == 201
        refused = await nobody.post("/v1/accounts", {**asked, "username": "dave"}, headers=basic("carol"))
        assert refused.status == 403


async def test_the_administrators_password_is_the_one_of_the_last_start(settings: Settings) -> None:
    for password in ("first password", "second password"):
        async with running_gateway(with_admin(settings, password)) as nobody:
            assert (await nobody.get("/v1/accounts/me", headers=basic("root", password))).json["is_admin"]
    async with running_gateway(settings) as nobody:
        assert (await nobody.get("/v1/accounts/me", headers=basic("root", "first password"))).status == 401


async def test_whoever_had_the_administrators_name_before_is_out(settings: Settings) -> None:
    async with running_gateway(settings) as nobody:
        squatter = await nobody.with_account("root")
    async with running_gateway(with_admin(settings, "another password")) as nobody:
        assert (await nobody.get("/v1/accounts/me", headers=squatter.headers)).status == 401
        assert (await nobody.get("/v1/accounts/me", headers=basic("root"))).status == 401
        assert (await nobody.get("/v1/accounts/me", headers=basic("root", "another password"))).json["is_admin"]


async def test_the_administrators_tokens_end_with_the_password(settings: Settings) -> None:
    async with running_gateway(with_admin(settings)) as nobody:
        made = await nobody.post("/v1/tokens", {"name": "x"}, headers=basic("root"))
        token = bearer(made.json["token"])
    async with running_gateway(with_admin(settings)) as nobody:
        assert (await nobody.get("/v1/accounts/me", headers=token)).json["is_admin"]
    async with running_gateway(with_admin(settings, "another password")) as nobody:
        assert (await nobody.get("/v1/accounts/me", headers=token)).status == 401


@pytest.mark.parametrize("password", ["", "short"])
def test_an_administrators_password_is_not_short(settings: Settings, password: str) -> None:
    with pytest.raises(ValidationError, match="admin_password"):
        with_admin(settings, password)


def test_an_empty_variable_is_not_set(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**environment, "SLUICE_ADMIN_USERNAME": "root", "SLUICE_ADMIN_PASSWORD": ""}.items():
        monkeypatch.setenv(name, value)
    assert Settings().admin_password is None


BAD_CREDENTIALS = [
    None,
    "",
    "Basic",
    "Basic !!!",
    "Basic " + base64.b64encode(b"alice").decode(),
    "Basic " + base64.b64encode(b"alice:wrong password").decode(),
    "Basic " + base64.b64encode(b"nobody:" + PASSWORD.encode()).decode(),
    "Basic " + base64.b64encode(b"\xff\xfe:" + PASSWORD.encode()).decode(),
    "Basic " + base64.b64encode(b"alice\0:" + PASSWORD.encode()).decode(),
    "Bearer",
    "Bearer slc_unknown",
    "Bearer \udcff",
    "Digest username=alice",
]


async def test_whoever_cannot_be_known_is_asked_for_credentials(alice: Client) -> None:
    for authorization in BAD_CREDENTIALS:
        raw = await Client(alice.url, alice.session).connect()
        headers = b"" if authorization is None else b"Authorization: " + authorization.encode(errors="surrogateescape")
        await raw.send(
            b"GET /v1/accounts/me HTTP/1.1\r\nHost: test\r\n" + headers + (b"\r\n" if headers else b"") + b"\r\n"
        )
        status, head = await raw.read_head()
        await raw.close()
        assert status == 401, authorization
        assert 'WWW-Authenticate: Basic realm="sluice", charset="UTF-8"' in head
        assert 'WWW-Authenticate: Bearer realm="sluice"' in head


async def test_an_unknown_user_and_a_wrong_password_get_the_same_answer(alice: Client) -> None:
    nobody = Client(alice.url, alice.session)
    headers = {"X-Request-Id": "same"}
    unknown = await nobody.get("/v1/accounts/me", headers={**basic("unknown"), **headers})
    wrong = await nobody.get("/v1/accounts/me", headers={**basic("alice", "wrong password"), **headers})
    assert unknown.json == wrong.json


def test_to_find_that_there_is_no_such_user_takes_as_long_as_to_check_a_new_password() -> None:
    assert not PasswordHasher().check_needs_rehash(DECOY)


async def test_a_token_opens_until_it_is_revoked(alice: Client) -> None:
    made = await alice.post("/v1/tokens", {"name": "laptop", "expires_in_seconds": 3600})
    token = made.json["token"]
    assert token.startswith("slc_")
    nobody = Client(alice.url, alice.session)
    assert (await nobody.get("/v1/accounts/me", headers=bearer(token))).json["username"] == "alice"
    listed = await alice.get("/v1/tokens")
    assert "laptop" in [shown["name"] for shown in listed.json["tokens"]]
    assert token.encode() not in listed.body
    assert (await alice.delete(made.headers["Location"])).status == 204
    assert (await nobody.get("/v1/accounts/me", headers=bearer(token))).code == "unauthenticated"
    assert (await alice.delete(made.headers["Location"])).status == 404
    assert made.json["token_id"] not in [t["token_id"] for t in (await alice.get("/v1/tokens")).json["tokens"]]


async def test_a_token_opens_until_it_expires(alice: Client, database: PgDatabase) -> None:
    made = await alice.post("/v1/tokens", {"name": "short", "expires_in_seconds": 3600})
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE sluice.tokens SET expires_at = now() WHERE token_id = $1", made.json["token_id"]
        )
    answer = await Client(alice.url, alice.session).get("/v1/accounts/me", headers=bearer(made.json["token"]))
    assert answer.status == 401


async def test_a_token_is_stored_as_a_hash_only(alice: Client, database: PgDatabase) -> None:
    token = (await alice.post("/v1/tokens", {"name": "x"})).json["token"]
    async with database.connection() as connection:
        stored = await connection.fetchval("SELECT string_agg(t::text, '') FROM sluice.tokens t")
    assert token not in stored


async def test_a_remembered_password_ends_with_the_hash_that_it_matched() -> None:
    passwords = Passwords(concurrency=1)
    first, second = await passwords.hash("the first one"), await passwords.hash("the second one")
    assert await passwords.matches("the first one", first)
    assert await passwords.matches("the first one", first)
    assert not await passwords.matches("the first one", second)
    assert not await passwords.matches("the second one", first)
    assert not await passwords.matches("the first one", None)
    passwords.close()


async def test_a_password_is_remembered_for_a_minute_and_then_checked_again() -> None:
    now = 0.0
    passwords = Passwords(concurrency=1, clock=lambda: now)
    stored = await passwords.hash(PASSWORD)
    assert await passwords.matches(PASSWORD, stored)
    passwords.close()  # from here on nothing can be checked any more, only remembered
    now = 59.0
    assert await passwords.matches(PASSWORD, stored)
    now = 61.0
    with pytest.raises(RuntimeError):
        await passwords.matches(PASSWORD, stored)


async def test_more_passwords_than_the_queue_holds_are_sent_away() -> None:
    passwords = Passwords(concurrency=1)
    stored = await passwords.hash(PASSWORD)
    asked = [passwords.matches(f"wrong {number}", stored) for number in range(QUEUE_PER_THREAD + 3)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    passwords.close()
    assert found.count(False) == QUEUE_PER_THREAD
    assert sum(isinstance(error, TooManyRequests) for error in found) == 3
