"""The object becomes a file of the account, in the transaction that ends the task."""

from shared.domain.errors import Conflict
from shared.domain.task import AccountId, Task
from shared.ports.database import Connection
from shared.ports.objects import ObjectStat


async def check_name(connection: Connection, account_id: AccountId, name: str, *, overwrite: bool) -> None:
    """Raises Conflict when a file of that name is there and must not be replaced."""
    if overwrite:
        return
    if await connection.fetchval(
        "SELECT true FROM sluice.files WHERE account_id = $1 AND name = $2 AND deleted_at IS NULL", account_id, name
    ):
        raise Conflict(
            f"there is a file {name!r} already; delete or rename it, or export with overwrite or another file_name",
            file_name=name,
        )


async def publish_file(
    connection: Connection, task: Task, name: str, key: str, stat: ObjectStat, *, content_type: str, overwrite: bool
) -> int:
    """Answers the file's number. Raises Conflict."""
    # One publication of an account at a time: two of the same name would both find nothing to replace.
    await connection.execute("SELECT 1 FROM sluice.accounts WHERE account_id = $1 FOR NO KEY UPDATE", task.account_id)
    await check_name(connection, task.account_id, name, overwrite=overwrite)
    await connection.execute(
        "UPDATE sluice.files SET deleted_at = now() WHERE account_id = $1 AND name = $2 AND deleted_at IS NULL",
        task.account_id,
        name,
    )
    file_id = await connection.fetchval(
        "INSERT INTO sluice.files (account_id, name, object_key, bytes, etag, content_type, task_id)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING file_id",
        task.account_id,
        name,
        key,
        stat.bytes,
        stat.etag,
        content_type,
        task.task_id,
    )
    return int(file_id)
