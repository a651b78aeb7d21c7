"""Ranges of rows out of PostgreSQL: read ahead side by side, handed on in order, bounded in bytes."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from export_worker import session
from export_worker.formats.format import Copy, Encoded, Format
from export_worker.selection import Selection
from export_worker.snapshot import HEAD, Plan, ReadRange
from shared.ports.database import Database

# The server sends 8 KiB at a time. To be woken for each costs more than what is done with it; while nobody reads, the
# socket's buffer fills.
_LITTLE_BYTES = 128 * 1024
_GATHER_SECONDS = 0.004


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions `start` to `end` as they are in the file."""

    start: int
    end: int
    rows: int
    encoded: Encoded


class _TooMuch(Exception):
    """A range answers more than should be in memory at once."""


class Reader:
    """Reads one plan. At most `ahead` answers of at most `most_bytes` are kept besides the one handed on.

    A single row may be longer than `most_bytes`.
    """

    def __init__(
        self, database: Database, plan: Plan, selection: Selection, form: Format, *, ahead: int, most_bytes: int
    ) -> None:
        self._database = database
        self._plan = plan
        self._selection = selection
        self._format = form
        self._ahead = ahead
        self._most_bytes = most_bytes

    async def head(self) -> Chunk:
        """What the file begins with."""
        head = self._format.head()
        if isinstance(head, Encoded):
            return Chunk(0, HEAD, 0, head)
        answer, _ = await self._copy(head, None)
        return Chunk(0, HEAD, 0, await self._format.encode(answer))

    async def chunks(self, position: int, rows: int | None) -> AsyncIterator[Chunk]:
        """All rows from `position` on, at most `rows` of them; the last chunk ends where the data ends."""
        if rows == 0:
            yield Chunk(position, self._plan.data_end, 0, Encoded(b""))
            return
        async with aclosing(self._in_order(position)) as chunks:  # type: ignore[type-var]
            async for what, chunk in chunks:
                if rows is None:
                    yield chunk
                    continue
                if chunk.rows >= rows:
                    last = chunk if chunk.rows == rows else await self._read(what, rows)
                    yield replace(last, end=self._plan.data_end)
                    return
                rows -= chunk.rows
                yield chunk

    async def _in_order(self, position: int) -> AsyncIterator[tuple[ReadRange, Chunk]]:
        ahead: deque[tuple[ReadRange, asyncio.Task[Chunk]]] = deque()
        ranges = self._plan.ranges(position)
        try:
            while True:
                for what in ranges:
                    ahead.append((what, asyncio.create_task(self._read(what))))
                    if len(ahead) >= self._ahead:
                        break
                if not ahead:
                    return
                what, reading = ahead.popleft()
                chunk = await reading
                yield what, chunk
                while chunk.end < what.end:
                    rest = what.after(chunk.end)
                    chunk = await self._read(rest)
                    yield rest, chunk
        finally:
            for _, reading in ahead:
                reading.cancel()
            # With their errors: the first one has been raised already, or nobody wants to know any more.
            await asyncio.gather(*(reading for _, reading in ahead), return_exceptions=True)

    async def _read(self, what: ReadRange, rows: int | None = None) -> Chunk:
        """The range, or as much from its start as `most_bytes` allow; which part that is depends on nothing else."""
        while True:
            source = f"{what.source(self._selection.where)}{'' if rows is None else f' LIMIT {rows}'}"
            single = what.end - what.start == 1
            try:
                answer, count = await self._copy(self._format.rows(source), None if single else self._most_bytes)
            except _TooMuch:
                what = what.half()
                continue
            return Chunk(what.start, what.end, count, await self._format.encode(answer))

    async def _copy(self, copy: Copy, most_bytes: int | None) -> tuple[bytes, int]:
        pieces: list[bytes] = []
        size = 0

        async def keep(piece: bytes) -> None:
            nonlocal size
            size += len(piece)
            pieces.append(piece)
            if most_bytes is not None and size > most_bytes:
                raise _TooMuch
            if len(piece) < _LITTLE_BYTES:
                await asyncio.sleep(_GATHER_SECONDS)

        async with self._database.transaction() as connection:
            await session.prepare(connection, self._selection.values)
            count = await connection.copy_out(copy.query, sink=keep, **copy.options)
        return b"".join(pieces), count
