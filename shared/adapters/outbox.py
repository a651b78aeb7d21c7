"""The outbox in PostgreSQL, and the relay that sends what was left in it.

Considerations
- A row is deleted only after the broker has confirmed its message: a crash in between sends it twice. Consumers are
  idempotent.
- Two relays never hold the same row. The direct send after a commit locks nothing: the relay leaves young rows to it,
  and when it takes longer than that, the message is sent twice.
- The relay sends inside a transaction, which the server ends when it hears nothing for a minute: then all of it would
  be sent again. So it stops in time, however slow the broker is, and the next call goes on.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime

import structlog

from shared.domain.errors import BusUnavailable, DatabaseUnavailable
from shared.domain.messages import Message
from shared.ports.bus import Publisher
from shared.ports.database import Connection, Database
from shared.ports.outbox import Post

log = structlog.get_logger()

_INSERT = """
INSERT INTO sluice.outbox (exchange, routing_key, body, due_at)
VALUES ($1, $2, $3, greatest(now(), $4::timestamptz)) RETURNING outbox_id, due_at <= now() AS is_due
"""
_DELETE = "DELETE FROM sluice.outbox WHERE outbox_id = ANY($1)"
_DUE = """
SELECT outbox_id, exchange, routing_key, body FROM sluice.outbox
WHERE due_at <= now() - make_interval(secs => $1)
ORDER BY outbox_id LIMIT $2 FOR UPDATE SKIP LOCKED
"""


class PgOutbox:
    """The `Outbox` port. With `publisher` None nothing is sent at once: the relay of another process does it."""

    def __init__(self, publisher: Publisher | None) -> None:
        self._publisher = publisher

    @asynccontextmanager
    async def transaction(self, database: Database) -> AsyncIterator[tuple[Connection, Post]]:
        posted: list[tuple[int, str, str, Message]] = []
        async with database.transaction() as connection:

            async def post(exchange: str, routing_key: str, message: Message, due_at: datetime | None) -> None:
                body = message.model_dump(mode="json")
                row = await connection.fetchrow(_INSERT, exchange, routing_key, body, due_at)
                assert row is not None
                if row["is_due"]:
                    posted.append((row["outbox_id"], exchange, routing_key, message))

            yield connection, post
        if posted:
            await self._send(database, posted)

    async def _send(self, database: Database, posted: list[tuple[int, str, str, Message]]) -> None:
        if self._publisher is None:
            return
        sent: list[int] = []
        try:
            for outbox_id, exchange, routing_key, message in posted:
                await self._publisher.publish(exchange, routing_key, message)
                sent.append(outbox_id)
        except BusUnavailable as error:
            log.warning("left in the outbox for the relay", messages=len(posted) - len(sent), error=error.detail)
        if not sent:
            return
        try:
            async with database.connection() as connection:
                await connection.execute(_DELETE, sent)
        except DatabaseUnavailable as error:
            log.warning("sent, but still in the outbox: the relay will send it again", error=error.detail)


async def relay(
    database: Database,
    publisher: Publisher,
    *,
    older_than_seconds: float,
    limit: int = 200,
    longest_seconds: float = 20.0,
) -> int:
    """Send what is due and was not sent at once; answers how many, 0 when nothing is left.

    Begins no message after `longest_seconds`. Raises BusUnavailable and DatabaseUnavailable.
    """
    loop = asyncio.get_running_loop()
    sent: list[int] = []
    refused: BusUnavailable | None = None
    async with database.transaction() as connection:
        rows = await connection.fetch(_DUE, older_than_seconds, limit)
        stop_at = loop.time() + longest_seconds
        for row in rows:
            if loop.time() >= stop_at:
                break
            try:
                await publisher.publish_json(row["exchange"], row["routing_key"], row["body"])
            except BusUnavailable as error:
                # Raised after the commit: what was sent before it shall not be sent again. One message that the
                # broker does not take must not keep the others: give up only when the broker itself seems away.
                if refused is not None:
                    break
                refused = error
                continue
            sent.append(row["outbox_id"])
        if sent:
            await connection.execute(_DELETE, sent)
    if refused is not None:
        raise refused
    return len(sent)
