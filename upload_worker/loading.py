"""One piece of a file into the load's table: COPY of its records, and bad ones found and set aside."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shared.adapters.catalog import LOADS_SCHEMA, load_table
from shared.domain.errors import DETAIL_CHARACTERS, BadRecord, CountMismatch, storable
from shared.domain.task import LoadId, TaskId
from shared.ports.database import Connection

# What is sent again after a bad record was found: small enough that many bad ones do not make it quadratic.
_SMALLEST_WINDOW = 4 << 10
_SAVE = "SAVEPOINT good"
_MOVE_ON = "RELEASE SAVEPOINT good; SAVEPOINT good"
# A reject keeps this much of its record.
RAW_CHARACTERS = 64 << 10


@dataclass(frozen=True, slots=True)
class Reject:
    line: int
    """Where the record begins: the line of the file, or the number of the row in formats without lines; from 1."""
    column: str | None
    reason: str
    raw: str


class Piece(Protocol):
    """Whole records of a file, written as COPY takes them. Both ends are positions where reading can begin."""

    @property
    def start(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def lines(self) -> int:
        """How many lines of the file end in this piece; 0 in formats without lines."""

    @property
    def data(self) -> bytes:
        """What COPY gets; empty if the piece has no record that could be sent."""

    @property
    def rejects(self) -> Sequence[Reject]:
        """Records that are not in `data` because they cannot even be written for COPY."""

    def holds(self, rows: int) -> bool:
        """Whether `data` has that many records."""

    def records_end(self, start: int, size: int) -> int:
        """Where the last record ends that fits whole into `data[start : start + size]`; 0 if none does."""

    def record_at(self, start: int, end: int, line: int) -> tuple[int, int] | None:
        """Offsets in `data` of the record for which COPY of `data[start:end]` names `line`."""

    def source_of(self, start: int, end: int) -> tuple[int, str]:
        """The line (or row) of the file at which this record of `data` begins, and its text for people."""


class Loader:
    """Loads pieces of one file into one load's table."""

    def __init__(self, load_id: LoadId, columns: Sequence[str], copy_options: Mapping[str, Any]) -> None:
        self._table = load_table(load_id)
        self._columns = columns
        self._options = copy_options

    async def load(self, connection: Connection, piece: Piece) -> int:
        """Load all records of the piece; answers the rows. Raises BadRecord with the line in the file."""
        if piece.rejects:
            raise _error(piece.rejects[0])
        if not piece.data:
            return 0
        try:
            rows = await self._copy(connection, piece.data)
        except BadRecord as error:
            found = piece.record_at(0, len(piece.data), error.extra["line"])
            if found is None:
                raise
            raise _error(_reject(piece, found, error), error.extra.get("sqlstate")) from error
        self._check(piece, rows)
        return rows

    async def load_good(
        self, connection: Connection, piece: Piece, count: Callable[[Reject], None]
    ) -> tuple[int, list[Reject]]:
        """Load the records that can be loaded; answers the rows and the rejects.

        `count` is called with each reject when it is found, and ends this by raising an error.
        """
        for reject in piece.rejects:
            count(reject)
        data, size = piece.data, len(piece.data)
        rows, refused = 0, list[Reject]()
        position, window = 0, size
        # One savepoint that moves on: a transaction of its own for each window would stay open beneath the next one.
        await connection.execute(_SAVE)
        while position < size:
            end = _window_end(piece, position, window)
            try:
                rows += await self._copy(connection, data[position:end])
            except BadRecord as error:
                await connection.execute("ROLLBACK TO SAVEPOINT good")
                found = piece.record_at(position, end, error.extra["line"])
                if found is None:
                    raise
                refused.append(_reject(piece, found, error))
                count(refused[-1])
                if found[0] > position:
                    rows += await self._copy(connection, data[position : found[0]])
                    await connection.execute(_MOVE_ON)
                position = found[1]
                window = max(_SMALLEST_WINDOW, window // 4)
            else:
                position = end
                window *= 4
                if position < size:
                    await connection.execute(_MOVE_ON)
        self._check(piece, rows + len(refused))
        return rows, sorted([*piece.rejects, *refused], key=lambda reject: reject.line)

    async def _copy(self, connection: Connection, data: bytes) -> int:
        return await connection.copy_in(LOADS_SCHEMA, self._table, data, columns=self._columns, **self._options)

    @staticmethod
    def _check(piece: Piece, count: int) -> None:
        if not piece.holds(count):
            raise CountMismatch(
                f"in the part of the file from position {piece.start} to {piece.end} PostgreSQL counted {count} "
                "records, which is not what was cut; for CSV: the options quote and escape probably do not fit it"
            )


def _window_end(piece: Piece, position: int, window: int) -> int:
    """Where a record ends about `window` behind `position`; a longer record makes it longer."""
    size = len(piece.data)
    while window < size - position:
        if end := piece.records_end(position, window):
            return end
        window *= 4
    return size


async def keep_rejects(connection: Connection, task_id: TaskId, rejects: Sequence[Reject]) -> None:
    await connection.copy_records(
        "sluice",
        "rejects",
        ["task_id", "line", "column_name", "reason", "raw"],
        [
            (
                task_id,
                reject.line,
                None if reject.column is None else storable(reject.column, DETAIL_CHARACTERS),
                storable(reject.reason, DETAIL_CHARACTERS),
                storable(reject.raw, RAW_CHARACTERS),
            )
            for reject in rejects
        ],
    )


def _reject(piece: Piece, record: tuple[int, int], error: BadRecord) -> Reject:
    line, raw = piece.source_of(*record)
    return Reject(line, error.extra["column"], error.detail, raw)


def _error(reject: Reject, sqlstate: str | None = None) -> BadRecord:
    where = f"line {reject.line}" + (f", column {reject.column}" if reject.column else "")
    return BadRecord(
        f"{where}: {reject.reason}. Correct the file, name another type in columns (or csv.columns), or import with "
        "on_error skip",
        line=reject.line,
        column=reject.column,
        sqlstate=sqlstate,
    )
