"""Random walks: a pure model of the design beside the real store, and random commands on a running system."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from shared.adapters.postgres import PgDatabase
from shared.adapters.rabbit_topology import QUEUES
from shared.adapters.task_store import PgTaskStore
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.errors import Fenced, InvalidData
from shared.domain.messages import DEAD_QUEUE, EVENTS_EXCHANGE
from shared.domain.task import AccountId, Command, Epoch, Kind, Task, TaskId, TaskState, Trigger
from shared.ports.tasks import NewTask, Progress
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene
from tests.tasks import (
    POLICY,
    assert_loaded,
    new_account,
    numbered_csv,
    publish_nothing,
    silent_store,
    start,
    undo_nothing,
    until,
)
from tests.unit.test_task import DESIGN_ANSWERS, DESIGN_EDGES

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
WORKERS = ("one", "two", "three")
CLAIMED = ("running", "pausing")
MAX_ATTEMPTS = 3


class Model:
    """What the design says of one task; no clock, no I/O."""

    def __init__(self) -> None:
        self.state = "queued"
        self.epoch = 0
        self.attempts = 0
        self.batches = 0
        self.leased = False
        self.trail: list[tuple[str, str]] = []

    def go(self, trigger: str) -> bool:
        """Take the edge if there is one."""
        for target, triggers in DESIGN_EDGES[self.state].items():
            if trigger in triggers.split():
                self.trail.append((self.state, target))
                self.state = target
                self.leased = self.leased and target in CLAIMED
                if trigger == "resume" or target == "aborting":
                    self.attempts = 0
                return True
        return False

    def holds(self, epoch: int | None) -> bool:
        return epoch == self.epoch and self.state in CLAIMED

    def claim(self, steal_from: int | None) -> bool:
        came_back = steal_from is not None and self.epoch <= steal_from + 1
        if self.state in CLAIMED and (came_back or not self.leased):
            self.go("lose")
        if not self.go("claim"):
            return False
        self.epoch += 1
        self.attempts += 1
        self.leased = True
        return self.attempts <= MAX_ATTEMPTS or not self.go("fail")

    def claim_rollback(self, steal_from: int | None) -> bool:
        came_back = steal_from is not None and self.epoch <= steal_from + 1
        if self.state != "aborting" or (self.leased and not came_back):
            return False
        self.epoch += 1
        self.attempts += 1
        self.leased = True
        return True


class StoreWalk(RuleBasedStateMachine):
    """Workers that claim, commit, die and come back late, and users who command them."""

    def __init__(self, run: Run[Any], database: PgDatabase, store: PgTaskStore, account: AccountId) -> None:
        super().__init__()
        self.run, self.database, self.store, self.account = run, database, store, account
        self.model = Model()
        self.held: dict[str, int] = {}

    @initialize()
    def create(self) -> None:
        task, _ = self.run(self.store.create(NewTask(self.account, Kind.IMPORT, {}), actor="test"))
        self.task_id: TaskId = task.task_id

    @rule(command=st.sampled_from(Command))
    def command(self, command: Command) -> None:
        before, (_, after) = self.model.state, DESIGN_ANSWERS[self.model.state, command]
        self.model.go(command)
        assert self.model.state == after
        found = self.run(self.store.command(self.task_id, command, account_id=self.account, actor="me", reason=None))
        assert found == (before, after)

    @rule(worker=st.sampled_from(WORKERS), back=st.none() | st.integers(0, 3))
    def claim(self, worker: str, back: int | None) -> None:
        """`back`: its message came back; it had been sent so many epochs ago."""
        steal_from = None if back is None else max(0, self.model.epoch - back)
        expected = self.model.claim(steal_from)
        task = self.run(
            self.store.claim(self.task_id, worker, steal_from=None if steal_from is None else Epoch(steal_from))
        )
        assert (task is not None) is expected
        if task is not None:
            self.held[worker] = task.epoch

    @rule(worker=st.sampled_from(WORKERS))
    def commit(self, worker: str) -> None:
        if worker not in self.held:
            return
        epoch, batches = self.held[worker], self.model.batches
        checkpoint = Checkpoint().add(Range(0, batches + 1))

        async def batch() -> TaskState | None:
            try:
                async with self.database.transaction() as connection:
                    progress = Progress(bytes=10, rows=1)
                    return (
                        await self.store.commit_batch(connection, self.task_id, Epoch(epoch), checkpoint, progress)
                    ).state
            except Fenced:
                return None

        committed = self.run(batch())
        assert committed == (self.model.state if self.model.holds(epoch) else None)
        if committed:
            self.model.batches += 1
            self.model.attempts = 0
            self.model.leased = True

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        if worker not in self.held:
            return
        epoch = self.held[worker]

        async def beat() -> TaskState | None:
            try:
                return (await self.store.heartbeat(self.task_id, Epoch(epoch))).state
            except Fenced:
                return None

        heard = epoch == self.model.epoch and self.model.state in (*CLAIMED, "aborting")
        assert self.run(beat()) == (self.model.state if heard else None)
        self.model.leased = self.model.leased or self.model.holds(epoch)

    @rule(worker=st.sampled_from(WORKERS), trigger=st.sampled_from(["yield", "fail", "reach_pause", "succeed"]))
    def let_go(self, worker: str, trigger: str) -> None:
        if worker not in self.held:
            return
        epoch = self.held.pop(worker)
        expected = self.model.holds(epoch) and self.model.go(trigger)
        if trigger == "succeed":
            moved = self.run(self.store.succeed(self.task_id, Epoch(epoch), publish_nothing, actor=worker))
        else:
            error = InvalidData("broken") if trigger == "fail" else None
            moved = self.run(
                self.store.move(self.task_id, Trigger(trigger), actor=worker, epoch=Epoch(epoch), error=error)
            )
        assert (moved is not None) is expected

    @rule(worker=st.sampled_from(WORKERS))
    def die(self, worker: str) -> None:
        self.held.pop(worker, None)

    @rule()
    def lease_ends(self) -> None:
        self.change(
            "UPDATE sluice.tasks SET lease_until = now() - interval '1 s' WHERE task_id = $1 AND lease_until > now()"
        )
        self.model.leased = False

    @rule()
    def reap(self) -> None:
        expected = self.model.state in CLAIMED and not self.model.leased and self.model.go("lose")
        assert [task.task_id for task in self.run(self.store.lose_expired(actor="control"))] == [
            self.task_id
        ] * expected

    @rule()
    def expire(self) -> None:
        self.change(
            "UPDATE sluice.tasks SET expires_at = now() - interval '1 s' WHERE task_id = $1 AND expires_at IS NOT NULL"
        )
        expected = self.model.go("expire")
        assert [task.task_id for task in self.run(self.store.expire_due(actor="control"))] == [self.task_id] * expected

    @rule(
        worker=st.sampled_from(WORKERS),
        back=st.none() | st.integers(0, 2),
        then=st.sampled_from(["finish", "put off", "die"]),
    )
    def roll_back(self, worker: str, back: int | None, then: str) -> None:
        steal_from = None if back is None else max(0, self.model.epoch - back)
        expected = self.model.claim_rollback(steal_from)
        task = self.run(
            self.store.claim_rollback(
                self.task_id, worker, steal_from=None if steal_from is None else Epoch(steal_from)
            )
        )
        assert (task is not None) is expected
        if task is None:
            return
        if then == "finish":
            assert self.model.go("roll_back")
            assert self.run(self.store.rolled_back(self.task_id, task.epoch, undo_nothing, actor=worker)) is not None
        elif then == "put off":
            self.run(self.store.put_off_rollback(self.task_id, task.epoch, delay_seconds=0))
            self.model.leased = False

    def teardown(self) -> None:
        self.change("DELETE FROM sluice.tasks WHERE task_id = $1")

    def change(self, sql: str) -> None:
        async def execute() -> None:
            async with self.database.connection() as connection:
                await connection.execute(sql, self.task_id)

        self.run(execute())

    @invariant()
    def the_row_is_what_the_model_says(self) -> None:
        if not hasattr(self, "task_id"):
            return

        async def read() -> tuple[Task | None, list[tuple[str, str]], int]:
            async with self.database.connection() as connection:
                trail = await connection.fetch(
                    "SELECT from_state, to_state FROM sluice.task_events WHERE task_id = $1 ORDER BY event_id OFFSET 1",
                    self.task_id,
                )
                told = await connection.fetchval(
                    "SELECT count(*) FROM sluice.outbox WHERE (body ->> 'task_id')::bigint = $1 AND exchange = $2",
                    self.task_id,
                    EVENTS_EXCHANGE,
                )
            return await self.store.get(self.task_id), [(r["from_state"], r["to_state"]) for r in trail], told

        task, trail, told = self.run(read())
        assert task is not None
        model = self.model
        assert (task.state, task.epoch, task.attempts) == (model.state, model.epoch, model.attempts)
        assert (task.rows_done, task.bytes_done) == (model.batches, model.batches * 10)
        assert Checkpoint.from_json(task.checkpoint).positions == model.batches
        assert trail == model.trail
        assert told == len(model.trail) + 1
        if model.state != "aborting":
            assert (task.worker is not None) is (model.state in CLAIMED)
        assert (task.expires_at is not None) is (model.state in ("paused", "failed"))


def test_the_store_walks_as_the_design_says(database_dsn: str) -> None:
    with asyncio.Runner() as runner:
        database = PgDatabase(database_dsn, size=2, name="test")
        runner.run(database.open())
        store = silent_store(database, replace(POLICY, max_attempts=MAX_ATTEMPTS))
        account = runner.run(new_account(database))
        try:
            run_state_machine_as_test(
                lambda: StoreWalk(runner.run, database, store, account),  # type: ignore[arg-type]
                settings=settings(
                    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
                ),
            )
        finally:
            runner.run(database.close())


# --- a running system

ROWS = 1500
CSV = numbered_csv(ROWS)


class SystemWalk(RuleBasedStateMachine):
    """Users who start imports and command them, on real processes."""

    def __init__(self, run: Run[Any], scene: Scene) -> None:
        super().__init__()
        self.run, self.scene = run, scene
        self.tasks: dict[TaskId, str] = {}
        self.aborted: set[TaskId] = set()

    @initialize()
    def begin_the_first(self) -> None:
        self.begin()

    @rule()
    def begin(self) -> None:
        if len(self.tasks) >= 4:
            return
        dataset = f"data{self.run(self.scene.value('SELECT count(*) FROM sluice.tasks'))}"
        task_id = self.run(self.scene.begin(CSV, dataset, max_bytes_per_second=150_000))
        self.tasks[task_id] = dataset

    @rule(data=st.data(), command=st.sampled_from([*Command, Command.PAUSE, Command.RESUME]))
    def command(self, data: st.DataObject, command: Command) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.tasks)))
        reply = self.run(self.scene.command(task_id, command))
        assert reply.state is not None
        possible = [status_state for (_, c), status_state in DESIGN_ANSWERS.items() if c == command]
        assert (reply.status, reply.state) in possible
        if task_id in self.aborted:
            assert reply.state in ("aborting", "aborted")
        if command is Command.ABORT and reply.status != 409:
            self.aborted.add(task_id)

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.3]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    def teardown(self) -> None:
        for task_id, dataset in self.tasks.items():
            if task_id in self.aborted:
                task = self.run(self.scene.until(task_id, TaskState.ABORTED))
                assert self.run(self.scene.leftovers(task_id)) == {}
            else:
                self.run(self.scene.command(task_id, Command.RESUME))
                task = self.run(self.scene.until(task_id, TaskState.SUCCEEDED))
                self.run(assert_loaded(self.scene, dataset, ROWS))
            assert (task.worker, task.lease_until) == (None, None)


async def assert_nothing_is_left_over(scene: Scene) -> None:
    """The sums over all tasks: what succeeded is there, and nothing else."""
    loads = await scene.value("SELECT count(*) FROM sluice.tasks WHERE state = 'succeeded'")
    assert await scene.value("SELECT count(*) FROM sluice.loads WHERE dataset_id IS NOT NULL") == loads
    assert await scene.value("SELECT count(*) FROM pg_tables WHERE schemaname = 'sluice_loads'") == loads
    assert await scene.value("SELECT count(*) FROM sluice.datasets") == loads
    assert await scene.value("SELECT count(*) FROM sluice.rejects") == 0
    assert await scene.value("SELECT count(*) FROM sluice.object_ledger") == 0
    await until(lambda: scene.value("SELECT count(*) = 0 FROM sluice.outbox"))
    assert await scene.bus.ready_messages(DEAD_QUEUE) == 0
    for queue in QUEUES:
        assert await scene.bus.ready_messages(queue) == 0
    held = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in transaction%'"
    )
    await until(lambda: scene.value(held.replace("count(*)", "count(*) = 0")))
    # Each audit trail is one path through the design's table.
    rows = await scene.fetch("SELECT task_id, from_state, to_state FROM sluice.task_events ORDER BY task_id, event_id")
    at: dict[int, str | None] = {}
    for row in rows:
        assert row["from_state"] == at.get(row["task_id"])
        assert row["from_state"] is None or row["to_state"] in DESIGN_EDGES[row["from_state"]]
        at[row["task_id"]] = row["to_state"]


def test_a_running_system_keeps_its_invariants_under_any_commands(services: Stack, environment: dict[str, str]) -> None:
    with asyncio.Runner() as runner:
        opened = AsyncExitStack()
        try:
            runner.run(start(services, control=2, workers=2))
            scene = runner.run(opened.enter_async_context(open_scene(environment)))
            run_state_machine_as_test(
                lambda: SystemWalk(runner.run, scene),  # type: ignore[arg-type]
                settings=settings(
                    max_examples=6,
                    stateful_step_count=15,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
            runner.run(assert_nothing_is_left_over(scene))
        finally:
            runner.run(opened.aclose())
