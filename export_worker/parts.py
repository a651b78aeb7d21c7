"""What PostgreSQL knows of an export's parts: those that the store has, and pieces of one that is not full yet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shared.domain.export_keys import WHOLE
from shared.domain.task import TaskId
from shared.ports.database import Connection
from shared.ports.objects import Part


@dataclass(slots=True)
class Piece:
    """The positions `start` to `end` as they are in the file. A part is one piece or several."""

    start: int
    end: int
    rows: int = 0
    size: int = 0
    body: list[bytes] = field(default_factory=list)
    details: list[Any] = field(default_factory=list)


class Lost(NamedTuple):
    """What a segment held from position `start` to the end of what is done."""

    start: int
    size: int
    rows: int


async def record(connection: Connection, task_id: TaskId, segment: int, part: Part, pieces: Sequence[Piece]) -> None:
    """Note a part; its pieces need not be kept any more."""
    await connection.execute(
        "INSERT INTO sluice.export_parts (task_id, segment, part_number, etag, bytes, rows, start_position,"
        " end_position, detail) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        task_id,
        segment,
        part.number,
        part.etag,
        part.bytes,
        sum(piece.rows for piece in pieces),
        pieces[0].start,
        pieces[-1].end,
        [detail for piece in pieces for detail in piece.details] or None,
    )
    if len(pieces) > 1:
        await connection.execute("DELETE FROM sluice.export_remainders WHERE task_id = $1", task_id)


async def keep(connection: Connection, task_id: TaskId, piece: Piece) -> None:
    """Keep a piece of a part that is not full."""
    await connection.execute(
        "INSERT INTO sluice.export_remainders (task_id, start_position, end_position, rows, data, detail)"
        " VALUES ($1, $2, $3, $4, $5, $6)",
        task_id,
        piece.start,
        piece.end,
        piece.rows,
        b"".join(piece.body),
        piece.details or None,
    )


async def kept(connection: Connection, task_id: TaskId) -> list[Piece]:
    """What the next part begins with."""
    rows = await connection.fetch(
        "SELECT start_position, end_position, rows, data, detail FROM sluice.export_remainders"
        " WHERE task_id = $1 ORDER BY start_position",
        task_id,
    )
    pieces = []
    for row in rows:
        start, end, count, data, details = row.values()
        pieces.append(Piece(start, end, count, len(data), [data], details or []))
    return pieces


async def details(connection: Connection, task_id: TaskId) -> list[Any]:
    """What the format noted of all parts, in order."""
    rows = await connection.fetch(
        "SELECT detail FROM sluice.export_parts WHERE task_id = $1 AND detail IS NOT NULL"
        " ORDER BY segment, part_number",
        task_id,
    )
    return [detail for row in rows for detail in row["detail"]]


async def of_segment(connection: Connection, task_id: TaskId, segment: int) -> list[Part]:
    rows = await connection.fetch(
        "SELECT part_number, etag, bytes FROM sluice.export_parts WHERE task_id = $1 AND segment = $2"
        " ORDER BY part_number",
        task_id,
        segment,
    )
    return [Part(row["part_number"], row["etag"], row["bytes"]) for row in rows]


async def file_bytes(connection: Connection, task_id: TaskId) -> int:
    """What the parts of all segments are together."""
    return int(
        await connection.fetchval(
            "SELECT coalesce(sum(bytes), 0)::bigint FROM sluice.export_parts WHERE task_id = $1 AND segment <> $2",
            task_id,
            WHOLE,
        )
    )


async def lost_with(connection: Connection, task_id: TaskId, segment: int) -> Lost:
    """What must be done again without the last segment; copies are no progress that was counted."""
    if segment == WHOLE:
        start = "SELECT min(start_position) FROM sluice.export_parts WHERE task_id = $1 AND segment = $2"
        return Lost(await connection.fetchval(start, task_id, WHOLE), 0, 0)
    row = await connection.fetchrow(
        "SELECT min(start_position) AS start, sum(bytes)::bigint AS bytes, sum(rows)::bigint AS rows"
        " FROM (SELECT start_position, bytes, rows FROM sluice.export_parts WHERE task_id = $1 AND segment = $2"
        " UNION ALL"
        " SELECT start_position, length(data), rows FROM sluice.export_remainders WHERE task_id = $1) lost",
        task_id,
        segment,
    )
    assert row is not None, "it is an aggregate"
    return Lost(row["start"], row["bytes"], row["rows"])


async def forget_segment(connection: Connection, task_id: TaskId, segment: int) -> None:
    await connection.execute("DELETE FROM sluice.export_parts WHERE task_id = $1 AND segment = $2", task_id, segment)
    await connection.execute("DELETE FROM sluice.export_remainders WHERE task_id = $1", task_id)
