"""Accounts and their tokens in PostgreSQL."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from shared.domain.errors import Conflict
from shared.domain.task import AccountId
from shared.ports.database import Database

USERNAME_PATTERN = r"^[a-z][a-z0-9_]{1,30}$"


@dataclass(frozen=True, slots=True)
class Account:
    account_id: AccountId
    username: str
    is_admin: bool
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Token:
    token_id: int
    name: str
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None


class Accounts:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(self, username: str, password_hash: str) -> Account:
        """Raises Conflict when the name is taken."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "INSERT INTO sluice.accounts (username, password_hash) VALUES ($1, $2)"
                " ON CONFLICT (username) DO NOTHING RETURNING account_id, username, is_admin, created_at",
                username,
                password_hash,
            )
        if row is None:
            raise Conflict(f"the username {username} is taken; choose another")
        return Account(**row)

    async def put_admin(self, username: str, password_hash: str) -> Account:
        """Create the account, or give it this password and make it an administrator.

        Tokens that it had are revoked: somebody else may have registered the name, or known the old password.
        """
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                "INSERT INTO sluice.accounts (username, password_hash, is_admin) VALUES ($1, $2, true)"
                " ON CONFLICT (username) DO UPDATE SET password_hash = excluded.password_hash, is_admin = true"
                " RETURNING account_id, username, is_admin, created_at",
                username,
                password_hash,
            )
            assert row is not None
            await connection.execute(
                "UPDATE sluice.tokens SET revoked_at = now() WHERE account_id = $1 AND revoked_at IS NULL",
                row["account_id"],
            )
        return Account(**row)

    async def with_password_hash(self, username: str) -> tuple[Account, str] | None:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT account_id, username, is_admin, created_at, password_hash"
                " FROM sluice.accounts WHERE username = $1",
                username,
            )
        if row is None:
            return None
        account = Account(row["account_id"], row["username"], row["is_admin"], row["created_at"])
        return account, cast(str, row["password_hash"])

    async def of_token(self, token_hash: bytes) -> Account | None:
        """The owner of a token that is neither expired nor revoked."""
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "SELECT a.account_id, a.username, a.is_admin, a.created_at"
                " FROM sluice.tokens t JOIN sluice.accounts a USING (account_id)"
                " WHERE t.token_hash = $1 AND t.revoked_at IS NULL AND t.expires_at > now()",
                token_hash,
            )
        return None if row is None else Account(**row)

    async def add_token(self, account_id: AccountId, name: str, token_hash: bytes, *, expires_in_seconds: int) -> Token:
        async with self._database.connection() as connection:
            row = await connection.fetchrow(
                "INSERT INTO sluice.tokens (account_id, name, token_hash, expires_at)"
                " VALUES ($1, $2, $3, now() + make_interval(secs => $4))"
                " RETURNING token_id, name, created_at, expires_at, revoked_at",
                account_id,
                name,
                token_hash,
                float(expires_in_seconds),
            )
        assert row is not None
        return Token(**row)

    async def tokens(self, account_id: AccountId) -> Sequence[Token]:
        """All that were not revoked, newest first."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                "SELECT token_id, name, created_at, expires_at, revoked_at FROM sluice.tokens"
                " WHERE account_id = $1 AND revoked_at IS NULL ORDER BY token_id DESC",
                account_id,
            )
        return [Token(**row) for row in rows]

    async def revoke_token(self, account_id: AccountId, token_id: int) -> bool:
        """False when there is no such token, or it was revoked before."""
        async with self._database.connection() as connection:
            status = await connection.execute(
                "UPDATE sluice.tokens SET revoked_at = now()"
                " WHERE account_id = $1 AND token_id = $2 AND revoked_at IS NULL",
                account_id,
                token_id,
            )
        return status == "UPDATE 1"
