"""Numbered SQL files, applied in order under an advisory lock by whichever service starts first. Forward only."""

import hashlib
from importlib.resources import files

import structlog

from shared.adapters.postgres import PgDatabase
from shared.domain.errors import SluiceError

_LOCK = 0x51_01CE  # one number for all of Sluice's migrations
log = structlog.get_logger()


class MigrationMismatch(SluiceError):
    """The database was migrated by another version of Sluice than this one."""

    code = "migration-mismatch"


def _migrations() -> list[tuple[int, str, str]]:
    found = []
    for entry in files("shared").joinpath("sql").iterdir():
        number, _, rest = entry.name.partition("_")
        if rest.endswith(".sql"):
            found.append((int(number), entry.name, entry.read_text(encoding="utf-8")))
    return sorted(found)


async def migrate(dsn: str) -> None:
    """Bring the database to this version; does nothing when it is there already.

    Raises MigrationMismatch when a migration that was applied is unknown here or reads differently, and
    DatabaseUnavailable.
    """
    database = PgDatabase(dsn, size=1, name="sluice migrations")
    await database.open()
    try:
        async with database.transaction() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS public.sluice_migrations (number integer PRIMARY KEY, name text NOT NULL,"
                " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            rows = await connection.fetch("SELECT number, checksum FROM public.sluice_migrations")
            applied = {row["number"]: row["checksum"] for row in rows}
            ours = {number: (name, text) for number, name, text in _migrations()}
            if unknown := sorted(applied.keys() - ours.keys()):
                raise MigrationMismatch(
                    f"this database has migrations {unknown} that this version of Sluice does not know: "
                    "start a version at least as new as the one that ran last"
                )
            for number, (name, text) in sorted(ours.items()):
                checksum = hashlib.sha256(text.encode()).hexdigest()
                if number in applied:
                    if applied[number] != checksum:
                        raise MigrationMismatch(f"{name} was changed after it was applied: add a new migration instead")
                    continue
                await connection.execute(text)
                await connection.execute(
                    "INSERT INTO public.sluice_migrations (number, name, checksum) VALUES ($1, $2, $3)",
                    number,
                    name,
                    checksum,
                )
                log.info("migration applied", migration=name)
    finally:
        await database.close()
