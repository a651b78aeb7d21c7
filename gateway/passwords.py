"""Passwords: argon2id off the loop, a bounded number at a time."""

import asyncio
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError

from shared.domain.errors import TooManyRequests

T = TypeVar("T")

REMEMBER_SECONDS = 60.0
REMEMBER_ENTRIES = 1024
QUEUE_PER_THREAD = 16
# Of a password that nobody kept, made with the defaults of argon2-cffi, so that to check it takes as long as another.
DECOY = "$argon2id$v=19$m=65536,t=3,p=4$HCHID5p7pwh7ZM8xpwzoxA$o6c7y4VPzePdl75C0LPTzRKrtPM1vchrLiljS0B2uqc"


class Passwords:
    """Hashes and verifies passwords.

    HTTP Basic sends the password with every request, and argon2id costs about 50 ms and 64 MiB each time (the
    defaults of argon2-cffi, RFC 9106). So a password that was verified is remembered for a minute, as an HMAC under
    a key of this process's own, over the stored hash and the password: a new password or another account's never
    matches, and nothing that is kept could be used elsewhere. Wrong passwords are not remembered.
    """

    def __init__(self, *, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._hasher = PasswordHasher()
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="argon2")
        self._most_waiting = concurrency * QUEUE_PER_THREAD
        self._waiting = 0
        self._key = secrets.token_bytes(32)
        self._remembered: OrderedDict[bytes, float] = OrderedDict()
        self._clock = clock

    async def hash(self, password: str) -> str:
        """Raises TooManyRequests."""
        return await self._run(lambda: self._hasher.hash(password))

    async def matches(self, password: str, stored_hash: str | None) -> bool:
        """Whether `password` is the one behind `stored_hash`; None (no such user) takes as long as a wrong one.

        Raises TooManyRequests.
        """
        mark = hmac.digest(self._key, f"{stored_hash}\0{password}".encode(), hashlib.sha256)
        if stored_hash is not None and self._remembered.get(mark, 0.0) > self._clock():
            return True
        right = await self._run(lambda: self._verify(stored_hash or DECOY, password))
        if not right or stored_hash is None:
            return False
        self._remembered[mark] = self._clock() + REMEMBER_SECONDS
        self._remembered.move_to_end(mark)
        while len(self._remembered) > REMEMBER_ENTRIES:
            self._remembered.popitem(last=False)
        return True

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _verify(self, stored_hash: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored_hash, password)
        except VerifyMismatchError:
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if self._waiting >= self._most_waiting:
            raise TooManyRequests("too many passwords are being checked at this moment; try again, or use a token")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._waiting -= 1
