"""Files in PostgreSQL, and the ledger of objects that are on their way to becoming one.

Considerations
- The ledger's row exists before the first byte is sent and goes in the transaction that inserts the file. So at each
  moment an object has an owner or can be found by the sweeper, whatever dies.
- `publish` fails when the ledger's row is gone: then the sweeper has taken the object for an orphan.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gateway.ranges import Representation
from shared.domain.errors import TooSlow
from shared.domain.task import AccountId, FileId
from shared.ports.database import Connection, Database

_FILE = "file_id, name, object_key, bytes, etag, content_type, task_id, created_at"


@dataclass(frozen=True, slots=True)
class StoredFile:
    file_id: FileId
    name: str
    object_key: str
    bytes: int
    etag: str
    content_type: str
    task_id: int | None
    created_at: datetime

    @property
    def representation(self) -> Representation:
        return Representation(self.bytes, self.etag, self.created_at)


# Raises PreconditionFailed when the file that is there, if any, must not be replaced or deleted.
Check = Callable[[Representation | None], None]


def no_check(there: Representation | None) -> None:
    """A `Check` that all files pass."""


@dataclass(frozen=True, slots=True)
class FileFilter:
    """What is None does not restrict. Times are `from <= created_at < to`."""

    prefix: str | None = None
    contains: str | None = None
    created_from: datetime | None = None
    created_to: datetime | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None


def _stored(row: Mapping[str, Any] | None) -> StoredFile | None:
    return None if row is None else StoredFile(**row)


class Files:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, account_id: AccountId, file_id: int) -> StoredFile | None:
        async with self._database.connection() as connection:
            return _stored(
                await connection.fetchrow(
                    f"SELECT {_FILE} FROM sluice.files"  # noqa: S608 - a constant
                    " WHERE account_id = $1 AND file_id = $2 AND deleted_at IS NULL",
                    account_id,
                    file_id,
                )
            )

    async def named(self, account_id: AccountId, name: str) -> StoredFile | None:
        async with self._database.connection() as connection:
            return _stored(
                await connection.fetchrow(
                    f"SELECT {_FILE} FROM sluice.files"  # noqa: S608
                    " WHERE account_id = $1 AND name = $2 AND deleted_at IS NULL",
                    account_id,
                    name,
                )
            )

    async def page(
        self, account_id: AccountId, wanted: FileFilter, *, before: int | None, limit: int
    ) -> Sequence[StoredFile]:
        """Newest first, those with a number below `before`."""
        async with self._database.connection() as connection:
            rows = await connection.fetch(
                f"""
                SELECT {_FILE} FROM sluice.files
                WHERE account_id = $1 AND deleted_at IS NULL AND ($2::bigint IS NULL OR file_id < $2)
                    AND ($3::text IS NULL OR starts_with(name, $3))
                    AND ($4::text IS NULL OR strpos(name, $4) > 0)
                    AND ($5::timestamptz IS NULL OR created_at >= $5)
                    AND ($6::timestamptz IS NULL OR created_at < $6)
                    AND ($7::bigint IS NULL OR bytes >= $7)
                    AND ($8::bigint IS NULL OR bytes <= $8)
                ORDER BY file_id DESC LIMIT $9
                """,  # noqa: S608
                account_id,
                before,
                wanted.prefix,
                wanted.contains,
                wanted.created_from,
                wanted.created_to,
                wanted.min_bytes,
                wanted.max_bytes,
                limit,
            )
        return [StoredFile(**row) for row in rows]

    async def delete(self, account_id: AccountId, file_id: int, check: Check = no_check) -> bool:
        """Take the file out of the listing; the sweeper removes its object. False when there is no such file."""
        async with self._database.transaction() as connection:
            file = _stored(
                await connection.fetchrow(
                    f"UPDATE sluice.files SET deleted_at = now()"  # noqa: S608
                    f" WHERE account_id = $1 AND file_id = $2 AND deleted_at IS NULL RETURNING {_FILE}",
                    account_id,
                    file_id,
                )
            )
            if file is not None:
                check(file.representation)
        return file is not None

    async def publish(
        self,
        account_id: AccountId,
        name: str,
        *,
        object_key: str,
        size: int,
        etag: str,
        content_type: str,
        check: Check = no_check,
    ) -> tuple[StoredFile, bool]:
        """The object becomes the file of that name, and whether it replaced one, in one transaction.

        Raises TooSlow when the object was swept, and what `check` raises.
        """
        async with self._database.transaction() as connection:
            # One publication of an account at a time: two of the same name would both find nothing to replace.
            await connection.execute(
                "SELECT 1 FROM sluice.accounts WHERE account_id = $1 FOR NO KEY UPDATE", account_id
            )
            if not await forget(connection, object_key):
                raise TooSlow("the upload was silent for so long that it was cleared away; send it again")
            replaced = _stored(
                await connection.fetchrow(
                    f"UPDATE sluice.files SET deleted_at = now()"  # noqa: S608
                    f" WHERE account_id = $1 AND name = $2 AND deleted_at IS NULL RETURNING {_FILE}",
                    account_id,
                    name,
                )
            )
            check(replaced.representation if replaced else None)
            row = await connection.fetchrow(
                f"""
                INSERT INTO sluice.files (account_id, name, object_key, bytes, etag, content_type)
                VALUES ($1, $2, $3, $4, $5, $6) RETURNING {_FILE}
                """,  # noqa: S608
                account_id,
                name,
                object_key,
                size,
                etag,
                content_type,
            )
        assert row is not None
        return StoredFile(**row), replaced is not None


class Ledger:
    """Objects that are being written by this process."""

    def __init__(self, database: Database, *, lease_seconds: float) -> None:
        self._database = database
        self.lease_seconds = lease_seconds

    async def open(self, object_key: str) -> None:
        async with self._database.connection() as connection:
            await connection.execute(
                "INSERT INTO sluice.object_ledger (object_key, alive_until)"
                " VALUES ($1, now() + make_interval(secs => $2))",
                object_key,
                self.lease_seconds,
            )

    async def extend(self, object_key: str, *, upload_id: str | None) -> None:
        """Push the end of the lease forward; raises TooSlow when the sweeper was quicker."""
        async with self._database.connection() as connection:
            status = await connection.execute(
                "UPDATE sluice.object_ledger SET alive_until = now() + make_interval(secs => $2),"
                " upload_id = coalesce($3, upload_id) WHERE object_key = $1",
                object_key,
                self.lease_seconds,
                upload_id,
            )
        if status != "UPDATE 1":
            raise TooSlow("the upload was silent for so long that it was cleared away; send it again")

    async def give_up(self, object_key: str) -> None:
        """Leave it to the sweeper, at once."""
        async with self._database.connection() as connection:
            await connection.execute(
                "UPDATE sluice.object_ledger SET alive_until = now() WHERE object_key = $1", object_key
            )


async def forget(connection: Connection, object_key: str) -> bool:
    """Take an object out of the ledger; False when it is not in there."""
    status = await connection.execute("DELETE FROM sluice.object_ledger WHERE object_key = $1", object_key)
    return status == "DELETE 1"


async def still_ours(connection: Connection, object_key: str) -> bool:
    """Whether the object is in the ledger, and so has no file, once a transaction that takes it out has ended."""
    found = await connection.fetchval(
        "SELECT true FROM sluice.object_ledger WHERE object_key = $1 FOR UPDATE", object_key
    )
    return bool(found)
