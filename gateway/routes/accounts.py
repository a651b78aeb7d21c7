"""Accounts and tokens."""

from typing import Annotated

from pydantic import AfterValidator, Field

from gateway.accounts import USERNAME_PATTERN
from gateway.auth import new_token
from gateway.operations import Answer, Auth, Body, Call, Operation, Reply, created
from gateway.schemas import AccountView, NewTokenView, TokenList, TokenView
from shared.config import MIN_PASSWORD_CHARACTERS
from shared.domain.errors import Conflict, Forbidden, NotFound, TooManyRequests


def printable(text: str) -> str:
    if any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("control characters are not allowed")
    return text


class NewAccount(Body):
    username: str = Field(pattern=USERNAME_PATTERN)
    password: str = Field(min_length=MIN_PASSWORD_CHARACTERS, max_length=1000, json_schema_extra={"writeOnly": True})


class NewToken(Body):
    name: Annotated[str, AfterValidator(printable)] = Field(min_length=1, max_length=200)
    expires_in_seconds: int = Field(default=30 * 24 * 3600, ge=1, le=10 * 366 * 24 * 3600)


async def register(call: Call, body: NewAccount) -> Reply:
    """Register an account. Administrators may do it also when registration is closed to others."""
    gateway = call.gateway
    if not gateway.settings.registration_enabled and not (call.caller and call.caller.is_admin):
        raise Forbidden("registration is closed here; ask an administrator for an account")
    account = await gateway.accounts.create(body.username, await gateway.passwords.hash(body.password))
    return created("/v1/accounts/me", AccountView.of(account))


async def show_own_account(call: Call) -> Reply:
    """Show the account that asks."""
    return Reply(AccountView.of(call.account))


async def create_token(call: Call, body: NewToken) -> Reply:
    """Make a bearer token. It is shown this once."""
    token, token_hash = new_token()
    stored = await call.gateway.accounts.add_token(
        call.account.account_id, body.name, token_hash, expires_in_seconds=body.expires_in_seconds
    )
    return created(f"/v1/tokens/{stored.token_id}", NewTokenView.of(stored, token=token))


async def list_tokens(call: Call) -> Reply:
    """List the tokens that were not revoked, newest first."""
    tokens = await call.gateway.accounts.tokens(call.account.account_id)
    return Reply(TokenList(tokens=[TokenView.of(token) for token in tokens]))


async def revoke_token(call: Call) -> Reply:
    """Revoke a token: from now on it opens nothing."""
    token_id = call.id("token")
    if not await call.gateway.accounts.revoke_token(call.account.account_id, token_id):
        raise NotFound(f"there is no token {token_id}")
    return Reply(status=204)


OPERATIONS = [
    Operation(
        "POST",
        "/v1/accounts",
        register,
        {201: Answer("The account.", AccountView, headers=["Location"])},
        problems=[Forbidden, Conflict, TooManyRequests],
        auth=Auth.OPTIONAL,
    ),
    Operation("GET", "/v1/accounts/me", show_own_account, {200: Answer("The account.", AccountView)}),
    Operation(
        "POST",
        "/v1/tokens",
        create_token,
        {201: Answer("The token.", NewTokenView, headers=["Location"])},
    ),
    Operation("GET", "/v1/tokens", list_tokens, {200: Answer("The tokens.", TokenList)}),
    Operation("DELETE", "/v1/tokens/{token}", revoke_token, {204: Answer("It is revoked.")}, problems=[NotFound]),
]
