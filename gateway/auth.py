"""Who asks: HTTP Basic (RFC 7617) and bearer tokens (RFC 6750)."""

import base64
import binascii
import hashlib
import secrets

from gateway.accounts import Account, Accounts
from gateway.passwords import Passwords
from shared.domain.errors import Unauthenticated

TOKEN_PREFIX = "slc_"  # noqa: S105 - lets people and scanners recognise a leaked token
MAX_CREDENTIALS = 8192


def new_token() -> tuple[str, bytes]:
    """A token of 256 random bits and the hash that is stored. SHA-256 is enough: there is nothing to guess."""
    token = TOKEN_PREFIX + secrets.token_urlsafe(32)
    return token, token_hash(token)


def token_hash(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


class Authenticator:
    def __init__(self, accounts: Accounts, passwords: Passwords) -> None:
        self._accounts = accounts
        self._passwords = passwords

    async def account(self, authorization: str | None) -> Account | None:
        """The account behind an Authorization header; None without one.

        Raises Unauthenticated, the same for an unknown user as for a wrong password, and TooManyRequests.
        """
        if authorization is None:
            return None
        scheme, _, credentials = authorization.partition(" ")
        match scheme.lower():
            case "basic":
                return await self._basic(credentials.strip())
            case "bearer":
                return await self._bearer(credentials.strip())
        raise Unauthenticated("only HTTP Basic and bearer tokens are understood")

    async def _basic(self, credentials: str) -> Account:
        try:
            text = base64.b64decode(credentials[:MAX_CREDENTIALS], validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise Unauthenticated("the Basic credentials are not the base64 of username:password in UTF-8") from error
        username, colon, password = text.partition(":")
        if not colon or "\0" in text:
            raise Unauthenticated("the Basic credentials are not username:password")
        found = await self._accounts.with_password_hash(username)
        if not await self._passwords.matches(password, found[1] if found else None) or found is None:
            raise Unauthenticated("the username or the password is wrong")
        return found[0]

    async def _bearer(self, token: str) -> Account:
        account = await self._accounts.of_token(token_hash(token))
        if account is None:
            raise Unauthenticated("the token is unknown, expired or revoked; make another with POST /v1/tokens")
        return account
