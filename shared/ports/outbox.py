"""The outbox: messages that are written in the transaction that causes them, and sent once it has committed."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Protocol

from shared.domain.messages import Message
from shared.ports.database import Connection, Database

# (exchange, routing key, message, not before this moment of the database's clock)
Post = Callable[[str, str, Message, datetime | None], Awaitable[None]]


class Outbox(Protocol):
    def transaction(self, database: Database) -> AbstractAsyncContextManager[tuple[Connection, Post]]:
        """A transaction and a way to post messages in it.

        After the commit they are sent at once; what cannot be sent then is relayed later. Sending never fails the
        caller: what was committed is true, whether or not anybody has heard of it yet.
        """
        ...
