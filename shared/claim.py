"""A claim: one task at one epoch, its checkpoint, and the only way to add to it.

Considerations
- Rows and checkpoint of a batch commit in one transaction, which also checks epoch and state. The in-memory copy of
  the checkpoint changes only after that commit, under the lock that orders the commits of a task's lanes.
- Batches commit with `synchronous_commit` off. A crash of PostgreSQL itself may lose the last of them, rows and
  checkpoint together; they are done again. A worker that did not notice the crash would build on what is gone: so
  each commit, and the end, says which checkpoint it saw. The transition that ends the task commits synchronously,
  after them all.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from shared.controls import Signal, Wanted
from shared.domain.checkpoint import Checkpoint, Range
from shared.domain.task import Task, TaskState
from shared.ports.database import Connection, Database
from shared.ports.tasks import Progress, Standing, TaskStore


class _BatchWork:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.outcome: tuple[Range, Progress, dict[str, Any] | None] | None = None

    def done(self, what: Range, progress: Progress, cursor: dict[str, Any] | None = None) -> None:
        self.outcome = (what, progress, cursor)


class RunnerClaim:
    """The `Claim` port: one task at one epoch, its checkpoint, and the way to add to it."""

    def __init__(self, task: Task, database: Database, store: TaskStore, signal: Signal) -> None:
        self.task = task
        self.checkpoint = Checkpoint.from_json(task.checkpoint)
        self._database = database
        self._store = store
        self._signal = signal
        self._committing = asyncio.Lock()
        self._allowance = _Allowance(task.max_bytes_per_second)
        self._turn = asyncio.Lock()

    @asynccontextmanager
    async def batch(self) -> AsyncIterator[_BatchWork]:
        async with AsyncExitStack() as ordered:
            async with self._database.transaction() as connection:
                await connection.execute("SET LOCAL synchronous_commit = off")
                work = _BatchWork(connection)
                yield work
                if work.outcome is None:
                    return
                what, progress, cursor = work.outcome
                # Held until COMMIT has returned: the next lane builds on what is certain.
                await ordered.enter_async_context(self._committing)
                checkpoint = self.checkpoint.add(what)
                if cursor is not None:
                    checkpoint = replace(checkpoint, cursor=cursor)
                standing = await self._store.commit_batch(
                    connection, self.task.task_id, self.task.epoch, checkpoint, progress, saw=self.checkpoint
                )
            self.checkpoint = checkpoint
            self.look(standing)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Connection]:
        async with self._committing, self._database.transaction() as connection:
            self.look(await self._store.hold(connection, self.task.task_id, self.task.epoch, saw=self.checkpoint))
            yield connection

    async def go_back(
        self, checkpoint: Checkpoint, lost: Progress, undo: Callable[[Connection], Awaitable[None]]
    ) -> None:
        async with self._committing, self._database.transaction() as connection:
            await self._store.go_back(connection, self.task.task_id, self.task.epoch, checkpoint, lost)
            await undo(connection)
        self.checkpoint = checkpoint
        self.task = replace(
            self.task, bytes_done=self.task.bytes_done - lost.bytes, rows_done=self.task.rows_done - lost.rows
        )

    async def save_plan(
        self,
        plan: dict[str, Any],
        prepare: Callable[[Connection], Awaitable[None]] | None = None,
        *,
        bytes_total: int | None = None,
        rows_total: int | None = None,
    ) -> None:
        await self._store.save_plan(
            self.task.task_id, self.task.epoch, plan, prepare, bytes_total=bytes_total, rows_total=rows_total
        )
        self.task = replace(self.task, plan=plan, bytes_total=bytes_total, rows_total=rows_total)

    def look(self, standing: Standing) -> None:
        self._signal.row_says(standing.state)
        self._allowance.bytes_per_second = standing.max_bytes_per_second

    async def look_again(self) -> TaskState:
        standing = await self._store.heartbeat(self.task.task_id, self.task.epoch)
        self.look(standing)
        return standing.state

    async def allowed(self, count: int, *, until: float) -> bool:
        """Wait for the task's rate before using `count` bytes.

        False when something else is wanted in the meantime, or when it would be later than `until` (loop time).
        """
        async with self._turn:
            while (wait_seconds := self._allowance.seconds_left()) > 0:
                time_left = until - asyncio.get_running_loop().time()
                # In steps, because the rate may be changed meanwhile.
                if time_left <= 0 or await self._signal.interrupted(min(wait_seconds, time_left, 1.0)):
                    return False
            self._allowance.take(count)
        return self._signal.wanted is Wanted.GO_ON


class _Allowance:
    """A token bucket that saves up one second's bytes at most, and goes into debt by one batch.

    It begins empty: a batch may be taken at once, so that every claim makes progress at whatever rate, and the next
    one when that is paid off.
    """

    def __init__(self, bytes_per_second: int | None) -> None:
        self.bytes_per_second = bytes_per_second
        self._tokens = 0.0
        self._at: float | None = None

    def seconds_left(self) -> float:
        """How long to wait before more may be taken."""
        now = asyncio.get_running_loop().time()
        if self.bytes_per_second is None:
            self._tokens = 0.0
        else:
            earned = (now - (self._at or now)) * self.bytes_per_second
            self._tokens = min(self._tokens + earned, float(self.bytes_per_second))
        self._at = now
        return max(0.0, -self._tokens / (self.bytes_per_second or 1))

    def take(self, count: int) -> None:
        if self.bytes_per_second is not None:
            self._tokens -= count
