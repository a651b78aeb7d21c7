"""What has no owner goes, and nothing else: tables, uploads, objects, deleted files."""

from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest

from control_service.sealer import Sealer
from control_service.sweeper import _DELETED_FILES, Sweeper
from shared.adapters.catalog import Column, PgCatalog, create_stage
from shared.adapters.objects import S3ObjectStore
from shared.adapters.postgres import PgDatabase
from shared.config import Settings
from shared.domain.export_keys import WHOLE, key_of, segment_of
from shared.domain.task import AccountId, Kind, LoadId, TaskState
from tests.faults.tap import ConnectionCut, Tap
from tests.tasks import new_account, silent_store, task_in

COLUMNS = [Column("n", "bigint")]


@pytest.fixture
async def account(database: PgDatabase) -> AccountId:
    return await new_account(database)


def sweeper(database: PgDatabase, objects: S3ObjectStore, *, orphan_age_seconds: float = 0.0) -> Sweeper:
    return Sweeper(database, objects, PgCatalog(database), orphan_age_seconds=orphan_age_seconds)


async def tables(database: PgDatabase) -> set[str]:
    async with database.connection() as connection:
        rows = await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'sluice_loads'")
    return {row["tablename"] for row in rows}


async def keys(objects: S3ObjectStore) -> set[str]:
    return {found.key async for found in objects.list_objects("")}


async def uploads(objects: S3ObjectStore) -> set[str]:
    return {found.key async for found in objects.list_uploads("")}


async def write_down(
    database: PgDatabase, key: str, *, upload_id: str | None = None, task_id: int | None = None, alive: bool = False
) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.object_ledger (object_key, upload_id, task_id, alive_until) VALUES ($1, $2, $3, $4)",
            key,
            upload_id,
            task_id,
            datetime.now(UTC) + timedelta(hours=1 if alive else -1),
        )


async def add_file(database: PgDatabase, account: AccountId, key: str, *, deleted: bool = False) -> None:
    async with database.connection() as connection:
        await connection.execute(
            "INSERT INTO sluice.files (account_id, name, object_key, bytes, etag, content_type, deleted_at)"
            " VALUES ($1, $2, $2, 1, 'e', 'text/csv', CASE WHEN $3 THEN now() END)",
            account,
            key,
            deleted,
        )


@pytest.mark.parametrize(
    ("state", "stays"),
    [
        (TaskState.RUNNING, True),
        (TaskState.PAUSED, True),
        (TaskState.FAILED, True),
        (TaskState.ABORTING, True),
        (TaskState.ABORTED, False),
        (TaskState.SUCCEEDED, False),
    ],
)
async def test_a_stage_table_goes_when_its_task_can_no_longer_go_on(
    state: TaskState, stays: bool, database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    task = await task_in(silent_store(database), account, state)
    async with database.connection() as connection:
        await create_stage(connection, LoadId(task.task_id), COLUMNS)
    await sweeper(database, object_store)()
    assert await tables(database) == ({f"load_{task.task_id}"} if stays else set())


async def test_a_stage_table_of_a_task_that_never_was_goes(database: PgDatabase, object_store: S3ObjectStore) -> None:
    async with database.connection() as connection:
        await create_stage(connection, LoadId(4711), COLUMNS)
    await sweeper(database, object_store)()
    assert await tables(database) == set()


async def test_an_upload_whose_writer_died_goes_with_its_object(
    database: PgDatabase, object_store: S3ObjectStore
) -> None:
    dead, alive = "files/dead", "files/alive"
    for key in (dead, alive):
        upload_id = await object_store.create_upload(key)
        await object_store.put_part(key, upload_id, 1, b"part")
        await write_down(database, key, upload_id=upload_id, alive=key == alive)
    await object_store.put("files/written", b"object")
    await write_down(database, "files/written")
    await sweeper(database, object_store, orphan_age_seconds=60)()
    assert await uploads(object_store) == {alive}
    assert await keys(object_store) == set()
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT array_agg(object_key) FROM sluice.object_ledger") == [alive]


async def test_objects_of_a_task_stay_as_long_as_it_may_go_on(
    database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    store = silent_store(database)
    for state in (TaskState.PAUSED, TaskState.ABORTED):
        task = await task_in(store, account, state)
        await object_store.put(f"exports/{state}", b"segment")
        await write_down(database, f"exports/{state}", task_id=task.task_id)
    await sweeper(database, object_store)()
    assert await keys(object_store) == {"exports/paused"}


@pytest.mark.parametrize("state", [TaskState.PAUSED, TaskState.FAILED, TaskState.RUNNING])
async def test_an_upload_that_a_lost_worker_left_open_becomes_an_object_while_its_export_rests(
    state: TaskState, database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    task = await task_in(silent_store(database), account, state, kind=Kind.EXPORT)
    first, second, whole = (key_of(task.task_id, segment, "x") for segment in (1, 2, WHOLE))
    for key, body in ((first, b"part"), (second, b""), (whole, b"copy")):
        upload_id = await object_store.create_upload(key)
        await write_down(database, key, upload_id=upload_id, task_id=task.task_id)
        # What came after the last commit is not part of the file.
        await object_store.put_part(key, upload_id, 2, b"uncommitted")
        if body:
            part = await object_store.put_part(key, upload_id, 1, body)
            async with database.connection() as connection:
                await connection.execute(
                    "INSERT INTO sluice.export_parts (task_id, segment, part_number, etag, bytes, rows, start_position,"
                    " end_position) VALUES ($1, $2, 1, $3, $4, 0, 0, 0)",
                    task.task_id,
                    segment_of(key),
                    part.etag,
                    part.bytes,
                )
    for _ in range(2):
        await Sealer(database, object_store)()
        rests = state is not TaskState.RUNNING
        assert await uploads(object_store) == (set() if rests else {first, second, whole})
        assert await keys(object_store) == ({first} if rests else set())
    async with database.connection() as connection:
        sealed = "SELECT upload_id IS NULL FROM sluice.object_ledger WHERE object_key = $1"
        assert await connection.fetchval(sealed, first) is rests
    if rests:
        assert (await object_store.stat(first)).bytes == 4


async def test_what_the_store_does_after_an_abort_is_undone_until_it_can_do_nothing_more(
    database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    task = await task_in(silent_store(database), account, TaskState.ABORTED, kind=Kind.EXPORT)
    key = key_of(task.task_id, 1, "x")
    upload_id = await object_store.create_upload(key)
    await write_down(database, key, upload_id=upload_id, task_id=task.task_id)
    ledger = "SELECT count(*) FROM sluice.object_ledger"
    for ended, left in ((0, 1), (0, 1), (200, 0)):
        await object_store.put(key, b"completed late")
        async with database.connection() as connection:
            await connection.execute("UPDATE sluice.tasks SET ended_at = now() - make_interval(secs => $1)", ended)
        await sweeper(database, object_store, orphan_age_seconds=3600)()
        assert await keys(object_store) == set()
        assert await uploads(object_store) == set()
        async with database.connection() as connection:
            assert await connection.fetchval(ledger) == left


async def test_what_no_row_knows_goes_once_it_is_old(
    database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    await object_store.put("files/known", b"1")
    await add_file(database, account, "files/known")
    await object_store.put("files/unknown", b"2")
    await object_store.create_upload("files/unknown-upload")
    await sweeper(database, object_store, orphan_age_seconds=3600)()
    assert await keys(object_store) == {"files/known", "files/unknown"}
    assert await uploads(object_store) == {"files/unknown-upload"}
    await sweeper(database, object_store, orphan_age_seconds=-3600)()
    assert await keys(object_store) == {"files/known"}
    assert await uploads(object_store) == set()


async def test_a_deleted_file_keeps_its_bytes_until_the_tasks_that_read_it_have_ended(
    database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    store = silent_store(database)
    for name in ("read", "unread"):
        await object_store.put(name, b"bytes")
        await add_file(database, account, name, deleted=True)
    task = await task_in(store, account, TaskState.PAUSED)
    async with database.connection() as connection:
        await connection.execute(
            "UPDATE sluice.tasks SET params = $2 WHERE task_id = $1", task.task_id, {"source": {"object_key": "read"}}
        )
    await sweeper(database, object_store)()
    assert await keys(object_store) == {"read"}
    async with database.connection() as connection:
        await connection.execute("UPDATE sluice.tasks SET state = 'aborted' WHERE task_id = $1", task.task_id)
    await sweeper(database, object_store)()
    assert await keys(object_store) == set()
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM sluice.files") == 0


async def test_the_bucket_is_listed_only_as_often_as_something_in_it_can_have_become_old(
    database: PgDatabase, object_store: S3ObjectStore
) -> None:
    sweep = sweeper(database, object_store)
    await sweep()
    await object_store.put("files/unknown", b"1")
    await object_store.put("files/left", b"2")
    await write_down(database, "files/left")
    async with database.connection() as connection:
        await connection.execute("UPDATE sluice.listings SET listed_at = now() + interval '1 h'")
    await sweep()
    assert await keys(object_store) == {"files/unknown"}
    async with database.connection() as connection:
        await connection.execute("UPDATE sluice.listings SET listed_at = now() - interval '1 h'")
    await sweep()
    assert await keys(object_store) == set()


async def test_an_object_that_cannot_be_deleted_and_a_table_that_is_read_do_not_keep_others(
    settings: Settings, database: PgDatabase, object_store: S3ObjectStore, account: AccountId
) -> None:
    for name in ("a", "b-stuck", "c"):
        for kind in ("left", "deleted"):
            await object_store.put(f"{kind}/{name}", b"1")
        await write_down(database, f"left/{name}")
        await add_file(database, account, f"deleted/{name}", deleted=True)
    async with Tap(urlsplit(settings.s3_endpoint).port or 0) as tap:

        async def refuse(_: int, chunk: bytes) -> bytes:
            if b"stuck" in chunk:
                raise ConnectionCut
            return chunk

        tap.up = refuse
        store = S3ObjectStore(settings.model_copy(update={"s3_endpoint": f"http://{tap.address}"}))
        try:
            async with database.transaction() as reader:
                for number in (5, 6, 7):
                    await create_stage(reader, LoadId(number), COLUMNS)
            async with database.transaction() as reader:
                await reader.execute("LOCK TABLE sluice_loads.load_6 IN ACCESS SHARE MODE")
                await sweeper(database, store)()
                assert await tables(database) == {"load_6"}
        finally:
            await store.aclose()
    assert await keys(object_store) == {"left/b-stuck", "deleted/b-stuck"}


async def test_a_sweep_finds_the_readers_of_deleted_files_through_an_index(database: PgDatabase) -> None:
    async with database.transaction() as connection:
        await connection.execute("SET LOCAL enable_seqscan = off")
        plan = await connection.fetch(f"EXPLAIN {_DELETED_FILES}")
    assert any("tasks_by_source" in row["QUERY PLAN"] for row in plan)
