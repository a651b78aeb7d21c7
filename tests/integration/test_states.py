"""The store of tasks on PostgreSQL: every pair, every edge, and everyone who comes too late."""

import asyncio
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from shared.adapters.postgres import PgDatabase
from shared.adapters.task_store import PgTaskStore
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import Conflict, Fenced, InternalFault, InvalidData
from shared.domain.messages import (
    BROADCAST_EXCHANGE,
    COMMANDS_EXCHANGE,
    EVENTS_EXCHANGE,
    IMPORT_QUEUE,
    WORK_QUEUES,
    rollback_queue,
)
from shared.domain.task import (
    CLAIMED,
    EDGES,
    TRANSITIONS,
    AccountId,
    Command,
    Edge,
    Epoch,
    Event,
    Kind,
    Task,
    TaskId,
    TaskState,
    Trigger,
    answer,
)
from shared.ports.database import Connection
from shared.ports.tasks import NewTask, Progress
from tests.tasks import (
    POLICY,
    SOMEBODY_WAITS,
    Told,
    listening,
    new_account,
    open_database,
    publish_nothing,
    silent_store,
    task_in,
    undo_nothing,
    until,
)

HINTED = {
    TaskState.QUEUED: ("RunTask", IMPORT_QUEUE),
    TaskState.ABORTING: ("RollBackTask", rollback_queue(IMPORT_QUEUE)),
}
BROADCAST = {Event.PAUSE_REQUESTED, Event.PAUSE_WITHDRAWN, Event.ABORT_REQUESTED, Event.EXPIRED, Event.LOST}
ENDED_LEASE = replace(POLICY, lease_seconds=-1)
ONE = Progress(bytes=1, rows=1)


@pytest.fixture
def store(database: PgDatabase) -> PgTaskStore:
    return silent_store(database)


@pytest.fixture
async def account(database: PgDatabase) -> AccountId:
    return await new_account(database)


async def get(store: PgTaskStore, task_id: TaskId) -> Task:
    task = await store.get(task_id)
    assert task is not None
    return task


async def execute(database: PgDatabase, sql: str, *args: object) -> None:
    async with database.connection() as connection:
        await connection.execute(sql, *args)


async def commit(store: PgTaskStore, database: PgDatabase, task: Task, epoch: int | None = None) -> None:
    """One batch that moves the checkpoint by one position."""
    checkpoint = Checkpoint.from_json((await get(store, task.task_id)).checkpoint)
    start = checkpoint.prefix(0)
    async with database.transaction() as connection:
        await store.commit_batch(
            connection,
            task.task_id,
            Epoch(task.epoch if epoch is None else epoch),
            checkpoint.add(Range(start, start + 1)),
            ONE,
        )


def assert_told_once(told: Told, before: Task, after: Task, event: Event, actor: str, reason: str | None) -> None:
    """One audit row, one event, a hint exactly where a worker must look, and a broadcast where workers must obey."""
    [row] = told.events
    assert {key: row[key] for key in ("event", "from_state", "to_state", "epoch", "actor", "reason")} == {
        "event": event,
        "from_state": before.state,
        "to_state": after.state,
        "epoch": after.epoch,
        "actor": actor,
        "reason": reason,
    }
    [(key, body)] = told.to(EVENTS_EXCHANGE)
    assert key == f"task.import.{event.routing_word}"
    assert (body["type"], body["state"], body["previous"]) == (event, after.state, before.state)
    assert (body["account_id"], body["epoch"], body["actor"]) == (after.account_id, after.epoch, actor)
    assert told.to(BROADCAST_EXCHANGE) == ([("", body)] if event in BROADCAST else [])
    hints = [(hint["type"], queue, hint["epoch"]) for queue, hint in told.to(COMMANDS_EXCHANGE)]
    assert hints == ([(*HINTED[after.state], after.epoch)] if after.state in HINTED else [])


# --- commands


@pytest.mark.parametrize("command", Command)
@pytest.mark.parametrize("state", TaskState)
async def test_a_command_moves_the_task_as_designed_and_tells_it_once(
    database: PgDatabase, store: PgTaskStore, account: AccountId, state: TaskState, command: Command
) -> None:
    before = await task_in(store, account, state)
    async with listening(database, before.task_id) as told:
        moved = await store.command(before.task_id, command, account_id=account, actor="me", reason="because")
    after = await get(store, before.task_id)
    assert moved == (state, answer(state, command).state) == (before.state, after.state)
    edge = EDGES[Trigger(command)].get(state)
    if edge is None:
        assert (after, told) == (before, Told())
    else:
        assert_told_once(told, before, after, edge.event, "me", "because")


@pytest.mark.parametrize("command", Command)
async def test_a_command_to_another_accounts_task_is_like_one_to_an_unknown_task(
    database: PgDatabase, store: PgTaskStore, account: AccountId, command: Command
) -> None:
    before = await task_in(store, account, TaskState.RUNNING)
    stranger = await new_account(database, "stranger")
    async with listening(database, before.task_id) as told:
        assert await store.command(before.task_id, command, account_id=stranger, actor="x", reason=None) is None
    assert await store.command(TaskId(10**9), command, account_id=None, actor="x", reason=None) is None
    assert (await get(store, before.task_id), told) == (before, Told())


# --- edges


async def pull(store: PgTaskStore, database: PgDatabase, task: Task, trigger: Trigger) -> object:
    """Pull a trigger the way the product does."""
    match trigger:
        case Trigger.CLAIM:
            return await store.claim(task.task_id, "me")
        case Trigger.SUCCEED:
            return await store.succeed(task.task_id, task.epoch, publish_nothing, actor="me")
        case Trigger.ROLL_BACK:
            return await store.rolled_back(task.task_id, task.epoch, undo_nothing, actor="me")
        case Trigger.LOSE:
            await execute(
                database,
                "UPDATE sluice.tasks SET lease_until = now() - interval '1 s' WHERE task_id = $1",
                task.task_id,
            )
            return await store.lose_expired(actor="me")
        case Trigger.EXPIRE:
            await execute(
                database, "UPDATE sluice.tasks SET expires_at = now() - interval '1 s' WHERE task_id = $1", task.task_id
            )
            return await store.expire_due(actor="me")
    return await store.move(task.task_id, trigger, actor="me", epoch=task.epoch)


@pytest.mark.parametrize("edge", TRANSITIONS, ids=lambda edge: f"{edge.source}-{edge.trigger}-{edge.target}")
async def test_every_edge_is_taken_once_and_told_once(
    database: PgDatabase, store: PgTaskStore, account: AccountId, edge: Edge
) -> None:
    before = await task_in(store, account, edge.source)
    async with listening(database, before.task_id) as told:
        assert await pull(store, database, before, edge.trigger)
    after = await get(store, before.task_id)
    assert after.state is edge.target
    reasons = {Trigger.LOSE: "the lease ended: no heartbeat", Trigger.EXPIRE: "nobody resumed it in time"}
    assert_told_once(told, before, after, edge.event, "me", reasons.get(edge.trigger))
    assert (after.worker is not None, after.lease_until is not None) == (after.state in CLAIMED,) * 2
    assert (after.expires_at is not None) is (after.state in (TaskState.PAUSED, TaskState.FAILED))
    assert (after.ended_at is not None) is (after.state in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.ABORTED))


@pytest.mark.parametrize("trigger", Trigger)
async def test_a_trigger_that_a_state_does_not_know_changes_nothing_and_is_no_error(
    database: PgDatabase, store: PgTaskStore, account: AccountId, trigger: Trigger
) -> None:
    for state in set(TaskState) - set(EDGES[trigger]):
        before = await task_in(store, account, state)
        async with listening(database, before.task_id) as told:
            assert await store.move(before.task_id, trigger, actor="me") is None
            if trigger is Trigger.CLAIM:
                assert await store.claim(before.task_id, "me") is None
            if trigger is Trigger.SUCCEED:
                assert await store.succeed(before.task_id, before.epoch, publish_nothing, actor="me") is None
            if trigger is Trigger.ROLL_BACK:
                assert await store.rolled_back(before.task_id, before.epoch, undo_nothing, actor="me") is None
                assert await store.claim_rollback(before.task_id, "me") is None
        assert (await get(store, before.task_id), told) == (before, Told())


async def test_a_new_task_is_told_once_with_its_hint(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    async with listening(database, TaskId(1)) as told:
        task, created = await store.create(NewTask(account, Kind.IMPORT, {"a": 1}), actor="me")
    assert created
    assert (task.task_id, task.state, task.params, task.epoch) == (1, TaskState.QUEUED, {"a": 1}, 0)
    assert [(row["event"], row["from_state"], row["to_state"]) for row in told.events] == [
        ("TaskQueued", None, "queued")
    ]
    assert [key for key, _ in told.to(EVENTS_EXCHANGE)] == ["task.import.queued"]
    assert [(queue, hint["task_id"]) for queue, hint in told.to(COMMANDS_EXCHANGE)] == [(IMPORT_QUEUE, 1)]


@pytest.mark.parametrize("kind", Kind)
async def test_hints_go_to_the_queue_of_the_kind(
    database: PgDatabase, store: PgTaskStore, account: AccountId, kind: Kind
) -> None:
    queue = WORK_QUEUES.get(kind)
    async with listening(database, TaskId(1)) as told:
        await task_in(store, account, TaskState.ABORTING, kind=kind)
    assert [key for key, _ in told.to(COMMANDS_EXCHANGE)] == ([queue, rollback_queue(queue)] if queue else [])
    assert [key for key, _ in told.to(EVENTS_EXCHANGE)] == [f"task.{kind}.queued", f"task.{kind}.abort_requested"]


async def test_an_idempotency_key_makes_one_task_and_refuses_another_request(
    store: PgTaskStore, database: PgDatabase, account: AccountId
) -> None:
    new = NewTask(account, Kind.IMPORT, {}, idempotency_key="k", request_hash=b"1")
    made = await asyncio.gather(*(store.create(new, actor="me") for _ in range(5)))
    assert len({task.task_id for task, _ in made}) == 1
    assert sum(created for _, created in made) == 1
    with pytest.raises(Conflict, match="another request"):
        await store.create(replace(new, request_hash=b"2"), actor="me")
    theirs, created = await store.create(replace(new, account_id=await new_account(database, "other")), actor="other")
    assert created
    assert theirs.task_id != made[0][0].task_id


# --- claims and fencing


async def test_of_many_workers_that_claim_at_once_exactly_one_has_the_task(
    database_dsn: str, account: AccountId
) -> None:
    async with open_database(database_dsn, size=8) as database:
        store = silent_store(database)
        for _ in range(10):
            task = await task_in(store, account, TaskState.QUEUED)
            claims = await asyncio.gather(*(store.claim(task.task_id, f"w{n}") for n in range(8)))
            [held] = [claim for claim in claims if claim is not None]
            row = await get(store, task.task_id)
            assert (row.worker, row.epoch, row.claims) == (held.worker, 1, 1)


async def test_of_many_workers_that_roll_back_at_once_exactly_one_has_the_task(
    database_dsn: str, account: AccountId
) -> None:
    async with open_database(database_dsn, size=8) as database:
        store = silent_store(database)
        for _ in range(10):
            task = await task_in(store, account, TaskState.ABORTING)
            claims = await asyncio.gather(*(store.claim_rollback(task.task_id, f"w{n}") for n in range(8)))
            assert len([claim for claim in claims if claim is not None]) == 1


async def assert_fenced(database: PgDatabase, store: PgTaskStore, old: Task) -> None:
    """Whoever holds `old`'s epoch cannot move, commit or publish anything, and leaves nothing behind."""
    before = await get(store, old.task_id)
    ran: list[str] = []

    async def mark(connection: Connection) -> dict[str, Any]:
        ran.append("ran")
        return {}

    async with listening(database, old.task_id) as told:
        with pytest.raises(Fenced):
            await commit(store, database, old)
        with pytest.raises(Fenced):
            await store.save_plan(old.task_id, old.epoch, {"plan": 1}, mark)  # type: ignore[arg-type]
        with pytest.raises(Fenced):
            await store.heartbeat(old.task_id, old.epoch)
        assert await store.succeed(old.task_id, old.epoch, mark, actor="w") is None
        for trigger in (Trigger.FAIL, Trigger.YIELD, Trigger.REACH_PAUSE, Trigger.LOSE, Trigger.SUCCEED):
            assert await store.move(old.task_id, trigger, actor="w", epoch=old.epoch) is None
    assert (await get(store, old.task_id), told, ran) == (before, Told(), [])


async def test_a_worker_whose_lease_ended_is_fenced_once_another_has_the_task(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(silent_store(database, ENDED_LEASE), account, TaskState.RUNNING)
    taken = await store.claim(task.task_id, "other")
    assert taken is not None
    assert taken.epoch == task.epoch + 1
    await assert_fenced(database, store, task)
    await commit(store, database, taken)


async def test_a_worker_whose_task_was_lost_is_fenced_before_another_has_it(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    for state in (TaskState.RUNNING, TaskState.PAUSING):
        task = await task_in(silent_store(database, ENDED_LEASE), account, state)
        if state is TaskState.PAUSING:
            await execute(
                database,
                "UPDATE sluice.tasks SET lease_until = now() - interval '1 s' WHERE task_id = $1",
                task.task_id,
            )
        [lost] = await store.lose_expired(actor="control")
        assert lost.state is (TaskState.QUEUED if state is TaskState.RUNNING else TaskState.PAUSED)
        await assert_fenced(database, store, task)


async def test_a_worker_of_an_aborted_task_hears_of_it_and_is_fenced(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.RUNNING)
    await store.command(task.task_id, Command.ABORT, account_id=None, actor="me", reason=None)
    assert (await store.heartbeat(task.task_id, task.epoch)).state is TaskState.ABORTING
    with pytest.raises(Fenced):
        await commit(store, database, task)
    assert await store.succeed(task.task_id, task.epoch, publish_nothing, actor="w") is None
    rollback = await store.claim_rollback(task.task_id, "other")
    assert rollback is not None, "the heartbeat of a worker that is about to let go must not hold up the rollback"
    await assert_fenced(database, store, task)


async def test_a_rollback_that_was_taken_over_cannot_end(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.ABORTING)
    first = await silent_store(database, ENDED_LEASE).claim_rollback(task.task_id, "one")
    second = await store.claim_rollback(task.task_id, "two")
    assert first is not None
    assert second is not None
    assert await store.claim_rollback(task.task_id, "three") is None
    assert await store.rolled_back(task.task_id, first.epoch, undo_nothing, actor="one") is None
    assert await store.rolled_back(task.task_id, second.epoch, undo_nothing, actor="two") is not None


async def test_a_message_that_came_back_takes_the_task_only_from_the_claim_that_followed_it(
    store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.QUEUED)
    sent_at = task.epoch
    first = await store.claim(task.task_id, "one")
    assert first is not None
    assert await store.claim(task.task_id, "two") is None, "a message that did not come back takes nothing"
    second = await store.claim(task.task_id, "two", steal_from=sent_at)
    assert second is not None
    assert second.epoch == first.epoch + 1
    assert await store.claim(task.task_id, "three", steal_from=sent_at) is None, "its claim is over already"
    third = await store.claim(task.task_id, "three", steal_from=first.epoch)
    assert third is not None
    assert third.epoch == second.epoch + 1


async def test_a_message_that_came_back_leaves_a_paused_task_alone(store: PgTaskStore, account: AccountId) -> None:
    task = await task_in(store, account, TaskState.PAUSING)
    assert await store.claim(task.task_id, "two", steal_from=Epoch(0)) is None
    assert (await get(store, task.task_id)).state is TaskState.PAUSED, "its worker is gone, so the pause is reached"


async def test_a_rollback_message_that_came_back_takes_the_rollback_only_from_the_claim_that_followed_it(
    store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.ABORTING)
    first = await store.claim_rollback(task.task_id, "one")
    assert first is not None
    assert await store.claim_rollback(task.task_id, "two") is None
    assert await store.claim_rollback(task.task_id, "two", steal_from=task.epoch) is not None
    assert await store.claim_rollback(task.task_id, "three", steal_from=task.epoch) is None


async def test_a_batch_that_is_fenced_takes_its_rows_with_it(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(silent_store(database, ENDED_LEASE), account, TaskState.RUNNING)
    assert await store.claim(task.task_id, "other") is not None

    async def late_batch() -> None:
        async with database.transaction() as connection:
            await connection.execute("CREATE TABLE sluice_loads.of_the_batch ()")
            await store.commit_batch(connection, task.task_id, task.epoch, Checkpoint().add(Range(0, 1)), ONE)

    with pytest.raises(Fenced):
        await late_batch()
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT to_regclass('sluice_loads.of_the_batch')") is None


@pytest.mark.parametrize("where", ["in a batch", "in any other transaction"])
async def test_a_session_that_hangs_in_a_transaction_does_not_hold_the_task_for_ever(
    database_dsn: str, database: PgDatabase, account: AccountId, where: str
) -> None:
    """A frozen process has locked the row; PostgreSQL must end that session, or not even an abort could pass."""
    in_a_batch = where == "in a batch"
    store = silent_store(database, replace(POLICY, lease_seconds=0.2))
    task = await task_in(store, account, TaskState.RUNNING)
    idle_seconds = 60 if in_a_batch else 0.2
    async with (
        open_database(database_dsn, idle_in_transaction_seconds=idle_seconds) as frozen,
        frozen.connection() as connection,
    ):
        await connection.execute("BEGIN")
        if in_a_batch:
            await store.commit_batch(connection, task.task_id, task.epoch, Checkpoint().add(Range(0, 1)), ONE)
        else:
            await connection.execute("SELECT FROM sluice.tasks FOR UPDATE")
        moved = await store.command(task.task_id, Command.ABORT, account_id=None, actor="me", reason=None)
    assert moved == (TaskState.RUNNING, TaskState.ABORTING)
    assert (await get(store, task.task_id)).rows_done == 0


# --- commands that come again


@pytest.mark.parametrize("state", TaskState)
@pytest.mark.parametrize("command", Command)
async def test_a_command_that_comes_again_finds_the_task_as_it_is_and_says_what_it_said(
    database: PgDatabase, store: PgTaskStore, account: AccountId, state: TaskState, command: Command
) -> None:
    task = await task_in(store, account, state)

    async def apply(command: Command, message_id: UUID) -> tuple[TaskState, TaskState] | None:
        return await store.command(
            task.task_id, command, account_id=account, actor="me", reason=None, message_id=message_id
        )

    message_id = uuid4()
    assert await apply(command, message_id) == (state, answer(state, command).state)
    for other in (Command.RESUME, Command.PAUSE):
        if other is not command:
            await apply(other, uuid4())
    before = await get(store, task.task_id)
    async with listening(database, task.task_id) as told:
        assert await apply(command, message_id) == (state, before.state)
    assert told == Told()
    assert await get(store, task.task_id) == before


async def test_commands_are_remembered_for_a_day(database: PgDatabase, store: PgTaskStore, account: AccountId) -> None:
    task = await task_in(store, account, TaskState.QUEUED)

    async def resume() -> None:
        await store.command(
            task.task_id, Command.RESUME, account_id=account, actor="me", reason=None, message_id=uuid4()
        )

    async with database.connection() as connection:
        for _ in range(3):
            await resume()
        await connection.execute("UPDATE sluice.applied_commands SET applied_at = now() - interval '25 hours'")
        await resume()
        assert await connection.fetchval("SELECT count(*) FROM sluice.applied_commands") == 1


# --- attempts


async def fruitless(store: PgTaskStore, task: Task, error: InternalFault | None = None) -> Task | None:
    held = await store.claim(task.task_id, "w")
    if held is not None:
        await store.move(task.task_id, Trigger.YIELD, actor="w", epoch=held.epoch, error=error)
    return held


async def test_a_task_without_progress_fails_after_its_attempts_and_can_be_resumed(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.QUEUED)
    for _ in range(POLICY.max_attempts):
        assert await fruitless(store, task, InternalFault("the disk is on fire")) is not None
    assert await fruitless(store, task) is None
    failed = await get(store, task.task_id)
    assert failed.state is TaskState.FAILED
    assert failed.error is not None
    assert failed.error["code"] == "no-progress"
    assert failed.error["last_error"]["detail"] == "the disk is on fire"
    moved = await store.command(task.task_id, Command.RESUME, account_id=account, actor="me", reason=None)
    assert moved == (TaskState.FAILED, TaskState.QUEUED)
    held = await store.claim(task.task_id, "w")
    assert held is not None
    assert (held.attempts, held.error) == (1, None)


async def test_a_committed_batch_starts_the_attempts_anew(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.QUEUED)
    for _ in range(POLICY.max_attempts * 3):
        held = await store.claim(task.task_id, "w")
        assert held is not None
        await commit(store, database, held)
        await store.move(task.task_id, Trigger.YIELD, actor="w", epoch=held.epoch)
    row = await get(store, task.task_id)
    assert (row.state, row.attempts, row.rows_done) == (TaskState.QUEUED, 0, POLICY.max_attempts * 3)


async def test_workers_that_die_without_a_word_use_up_attempts_too(database: PgDatabase, account: AccountId) -> None:
    store = silent_store(database, ENDED_LEASE)
    task = await task_in(store, account, TaskState.QUEUED)
    for _ in range(POLICY.max_attempts):
        assert await store.claim(task.task_id, "w") is not None
    assert await store.claim(task.task_id, "w") is None
    assert (await get(store, task.task_id)).state is TaskState.FAILED


async def test_a_back_off_holds_up_the_task_and_its_hint_but_never_a_rollback(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.RUNNING)
    await store.move(task.task_id, Trigger.YIELD, actor="w", epoch=task.epoch, delay_seconds=3600)
    assert await store.claim(task.task_id, "w") is None
    await store.command(task.task_id, Command.ABORT, account_id=None, actor="me", reason=None)
    assert await store.claim_rollback(task.task_id, "w") is not None
    async with database.connection() as connection:
        rows = await connection.fetch(
            "SELECT body ->> 'type' AS type, due_at > now() AS later FROM sluice.outbox"
            " WHERE exchange = $1 ORDER BY outbox_id",
            COMMANDS_EXCHANGE,
        )
    assert [tuple(row.values()) for row in rows] == [("RunTask", False), ("RunTask", True), ("RollBackTask", False)]


async def test_a_hint_that_waits_is_due_when_its_task_is_whatever_the_clock_of_its_writer_says(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.RUNNING)
    moved = await store.move(task.task_id, Trigger.YIELD, actor="w", epoch=task.epoch, delay_seconds=3600)
    async with database.connection() as connection:
        due_at = await connection.fetchval(
            "SELECT max(due_at) FROM sluice.outbox WHERE exchange = $1", COMMANDS_EXCHANGE
        )
    assert moved is not None
    assert due_at == moved.not_before


async def test_a_rollback_that_is_put_off_is_nobodys_until_it_is_due(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.ABORTING)
    held = await store.claim_rollback(task.task_id, "one")
    assert held is not None
    async with listening(database, task.task_id) as told:
        await store.put_off_rollback(task.task_id, Epoch(held.epoch - 1), delay_seconds=3600)  # an earlier claim's
    assert told.posted == []
    async with listening(database, task.task_id) as told:
        await store.put_off_rollback(task.task_id, held.epoch, delay_seconds=3600)
    [(queue, body)] = told.to(COMMANDS_EXCHANGE)
    assert (queue, body["type"], body["epoch"]) == (rollback_queue(IMPORT_QUEUE), "RollBackTask", held.epoch)
    row = await get(store, task.task_id)
    assert (row.state, row.worker, row.attempts) == (TaskState.ABORTING, None, 1)
    assert await store.claim_rollback(task.task_id, "two") is None
    assert await store.announce_overdue(older_than_seconds=0, queues={rollback_queue(IMPORT_QUEUE)}) == []
    async with database.connection() as connection:
        due_at = await connection.fetchval(
            "SELECT max(due_at) FROM sluice.outbox WHERE exchange = $1", COMMANDS_EXCHANGE
        )
        assert due_at == row.lease_until
        await connection.execute(
            "UPDATE sluice.tasks SET lease_until = now() - interval '1 s', announced_at = now() - interval '1 s'"
        )
    assert len(await store.announce_overdue(older_than_seconds=0, queues={rollback_queue(IMPORT_QUEUE)})) == 1
    assert await store.claim_rollback(task.task_id, "two") is not None


async def test_the_plan_and_what_it_prepares_are_stored_together(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.RUNNING)

    async def prepare(connection: Connection) -> None:
        await connection.execute("CREATE TABLE sluice_loads.of_the_plan ()")

    async def fail(connection: Connection) -> None:
        await prepare(connection)
        raise InvalidData("no")

    with pytest.raises(InvalidData):
        await store.save_plan(task.task_id, task.epoch, {"n": 1}, fail)
    assert (await get(store, task.task_id)).plan is None
    await store.save_plan(task.task_id, task.epoch, {"n": 2}, prepare, bytes_total=7)
    row = await get(store, task.task_id)
    assert (row.plan, row.bytes_total) == ({"n": 2}, 7)


async def test_a_publication_that_fails_leaves_the_task_running_and_nothing_published(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    task = await task_in(store, account, TaskState.RUNNING)

    async def publish(connection: Connection) -> dict[str, Any]:
        await connection.execute("CREATE TABLE sluice_loads.published ()")
        raise InvalidData("no")

    async with listening(database, task.task_id) as told:
        with pytest.raises(InvalidData):
            await store.succeed(task.task_id, task.epoch, publish, actor="w")
    assert (await get(store, task.task_id), told) == (task, Told())
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT to_regclass('sluice_loads.published')") is None


async def test_an_abort_that_meets_the_publication_waits_and_is_refused(store: PgTaskStore, account: AccountId) -> None:
    task = await task_in(store, account, TaskState.RUNNING)
    aborts: list[asyncio.Task[Any]] = []

    async def publish(connection: Connection) -> dict[str, Any]:
        aborting = store.command(task.task_id, Command.ABORT, account_id=None, actor="me", reason=None)
        aborts.append(asyncio.ensure_future(aborting))
        # The abort's session waits for this one's row: only then is it a meeting.
        await until(lambda: connection.fetchval(SOMEBODY_WAITS))
        return {"rows": 1}

    assert await store.succeed(task.task_id, task.epoch, publish, actor="w") is not None
    assert await aborts[0] == (TaskState.SUCCEEDED, TaskState.SUCCEEDED)
    assert (await get(store, task.task_id)).result == {"rows": 1}


async def test_a_hint_is_repeated_only_for_tasks_that_wait_and_only_where_queues_are_empty(
    database: PgDatabase, store: PgTaskStore, account: AccountId
) -> None:
    tasks = {state: await task_in(store, account, state) for state in TaskState}
    await execute(database, "UPDATE sluice.tasks SET announced_at = now() - interval '1 minute'")
    queues = {IMPORT_QUEUE, rollback_queue(IMPORT_QUEUE)}
    assert await store.announce_overdue(older_than_seconds=3600, queues=queues) == []
    assert await store.announce_overdue(older_than_seconds=5, queues=set()) == []
    told = [t.task_id for t in await store.announce_overdue(older_than_seconds=5, queues={IMPORT_QUEUE})]
    assert told == [tasks[TaskState.QUEUED].task_id]
    told = [t.task_id for t in await store.announce_overdue(older_than_seconds=5, queues=queues)]
    assert told == [tasks[TaskState.ABORTING].task_id], "what was just announced is not announced again"
