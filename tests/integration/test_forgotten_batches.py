"""What a worker may do whose last batches a crash of PostgreSQL has forgotten: nothing but let go."""

import pytest

from shared.adapters.postgres import PgDatabase
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import CheckpointLost
from shared.domain.task import Epoch, TaskId, TaskState
from shared.ports.tasks import Progress
from tests.tasks import new_account, publish_nothing, silent_store, task_in

SEEN = Checkpoint().add(Range(0, 10))


async def _running(database: PgDatabase) -> tuple[TaskId, Epoch]:
    task = await task_in(silent_store(database), await new_account(database), TaskState.RUNNING)
    return task.task_id, task.epoch


async def test_a_batch_that_builds_on_a_forgotten_one_does_not_commit(database: PgDatabase) -> None:
    store = silent_store(database)
    task_id, epoch = await _running(database)
    with pytest.raises(CheckpointLost):
        async with database.transaction() as connection:
            await store.commit_batch(
                connection, task_id, epoch, SEEN.add(Range(10, 20)), Progress(bytes=10, rows=1), saw=SEEN
            )
    task = await store.get(task_id)
    assert task is not None
    assert (task.checkpoint, task.bytes_done, task.rows_done) == ({}, 0, 0)


async def test_a_task_whose_last_batches_are_forgotten_does_not_end(database: PgDatabase) -> None:
    store = silent_store(database)
    task_id, epoch = await _running(database)
    with pytest.raises(CheckpointLost):
        await store.succeed(task_id, epoch, publish_nothing, actor="w", saw=SEEN)
    with pytest.raises(CheckpointLost):
        async with database.transaction() as connection:
            await store.hold(connection, task_id, epoch, saw=SEEN)


async def test_batches_that_are_all_there_commit_one_after_the_other(database: PgDatabase) -> None:
    store = silent_store(database)
    task_id, epoch = await _running(database)
    checkpoint = Checkpoint()
    for start in (0, 20, 10):
        async with database.transaction() as connection:
            new = checkpoint.add(Range(start, start + 10))
            await store.commit_batch(connection, task_id, epoch, new, Progress(bytes=10, rows=1), saw=checkpoint)
            checkpoint = new
    assert await store.succeed(task_id, epoch, publish_nothing, actor="w", saw=checkpoint) is not None
