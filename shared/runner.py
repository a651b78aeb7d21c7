"""The batch runner: claim, batches in lanes, obey, finish or roll back.

When a lane was cancelled or a commit failed, nobody knows whether its last commit counts. What memory says is then
thrown away: the task is given back, and the next claim reads the row.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from shared.claim import RunnerClaim
from shared.controls import Controls, Signal, Wanted
from shared.domain.errors import DatabaseUnavailable, Fenced, InternalFault, Retryable, SluiceError
from shared.domain.task import Epoch, Kind, Task, TaskId, TaskState, Trigger
from shared.ports.database import Connection, Database
from shared.ports.kinds import Batch, Job, TaskKind
from shared.ports.tasks import TaskStore

log = structlog.get_logger()
T = TypeVar("T")

_SHUTDOWN = "the worker shuts down"


@dataclass(frozen=True, slots=True)
class RunnerPolicy:
    """Times in seconds; `lanes` batch pipelines side by side.

    The message of a rollback is held for `rollback_seconds` at most: the broker takes it back after half an hour.
    """

    lanes: int
    slice_seconds: float
    lease_seconds: float
    retry_backoff_seconds: float
    longest_backoff_seconds: float = 60.0
    rollback_seconds: float = 600.0


class Runner:
    """Runs and rolls back tasks of the kinds it is given."""

    def __init__(
        self,
        *,
        worker: str,
        store: TaskStore,
        database: Database,
        kinds: Mapping[Kind, TaskKind],
        controls: Controls,
        policy: RunnerPolicy,
    ) -> None:
        self._worker = worker
        self._store = store
        self._database = database
        self._kinds = kinds
        self._controls = controls
        self._policy = policy

    async def run(self, task_id: TaskId, *, steal_from: Epoch | None = None) -> None:
        """Work on the task until it ends, pauses, is taken away, or its slice is over; then hold nothing of it.

        Does nothing when there is nothing to do. Returns only when the row says where the task stands, so that its
        message may be acknowledged.
        """
        task = await self._claimed(
            lambda: self._store.claim(task_id, self._worker, steal_from=steal_from),
            lambda task: self._let_go(task, _SHUTDOWN),
        )
        if task is None:
            return
        with (
            structlog.contextvars.bound_contextvars(task_id=task_id, epoch=task.epoch),
            self._controls.watch(task_id, task.epoch) as signal,
        ):
            try:
                await self._work(task, signal)
            except asyncio.CancelledError:
                await _uncut(self._let_go(task, _SHUTDOWN))
                raise
            except BaseExceptionGroup as group:
                await _uncut(self._answer_for(task, _leading(group)))
            except Exception as error:
                await _uncut(self._answer_for(task, error))

    async def roll_back(self, task_id: TaskId, *, steal_from: Epoch | None = None) -> None:
        """Undo an aborting task, or give it back for a later attempt. Returns as `run` does."""
        task = await self._claimed(
            lambda: self._store.claim_rollback(task_id, self._worker, steal_from=steal_from), self._put_off
        )
        if task is None:
            return
        with structlog.contextvars.bound_contextvars(task_id=task_id, epoch=task.epoch):
            try:
                async with asyncio.timeout(self._policy.rollback_seconds), asyncio.TaskGroup() as group:
                    beat = group.create_task(self._beat(lambda: self._store.heartbeat(task.task_id, task.epoch)))
                    await self._undo(task)
                    beat.cancel()
            except asyncio.CancelledError:
                await _uncut(self._put_off(task))
                raise
            except BaseExceptionGroup as group:
                await _uncut(self._put_off(task, _leading(group)))
            except TimeoutError as error:
                await _uncut(self._put_off(task, error))

    async def _undo(self, task: Task) -> None:
        kind = self._kinds[task.kind]

        async def undo(connection: Connection) -> None:
            await kind.undo(task, connection)

        await kind.discard(task)
        if await self._store.rolled_back(task.task_id, task.epoch, undo, actor=self._worker):
            log.info("rolled back")

    # --- one claim

    async def _work(self, task: Task, signal: Signal) -> None:
        claim = RunnerClaim(task, self._database, self._store, signal)
        async with asyncio.TaskGroup() as group:
            beat = group.create_task(self._beat(claim.look_again))
            await self._drive(claim, signal)
            beat.cancel()

    async def _beat(self, look: Callable[[], Awaitable[object]]) -> None:
        while True:
            await asyncio.sleep(self._policy.lease_seconds / 4)
            try:
                async with asyncio.timeout(self._policy.lease_seconds):
                    await look()
            except (DatabaseUnavailable, TimeoutError):
                log.warning("no heartbeat: PostgreSQL does not answer")

    async def _drive(self, claim: RunnerClaim, signal: Signal) -> None:
        task = claim.task
        slice_end = asyncio.get_running_loop().time() + self._policy.slice_seconds
        log.info("claimed", attempt=task.attempts, rows_done=task.rows_done, bytes_done=task.bytes_done)
        async with self._kinds[task.kind].open(claim) as job:
            while True:
                if await self._pump(job, claim, signal, slice_end):
                    await job.finish()
                    ended = await self._store.succeed(
                        task.task_id, task.epoch, job.publish, actor=self._worker, saw=claim.checkpoint
                    )
                    if ended is None:
                        raise Fenced("aborted or taken before it could be published")
                    log.info("succeeded")
                    return
                if signal.wanted is Wanted.STOP:
                    # Lanes were cancelled: what memory says is no longer certain, so nothing goes on from here.
                    if await claim.look_again() in (TaskState.RUNNING, TaskState.PAUSING):
                        await self._let_go(task, "a stop was heard that the row does not know of")
                    return
                await job.seal()
                if signal.wanted is Wanted.PAUSE:
                    if await self._move(task, Trigger.REACH_PAUSE):
                        log.info("paused")
                        return
                elif asyncio.get_running_loop().time() >= slice_end and await self._move(
                    task, Trigger.YIELD, "its slice is over"
                ):
                    return
                # Neither: the pause was withdrawn, or came just now. The row knows.
                if await claim.look_again() is TaskState.ABORTING:
                    return

    async def _pump(self, job: Job, claim: RunnerClaim, signal: Signal, slice_end: float) -> bool:
        """Run batches in lanes until all are committed (True) or something else is wanted (False)."""
        queue: asyncio.Queue[Batch | None] = asyncio.Queue()
        # Batches in memory: one in each lane and one that waits.
        room = asyncio.Semaphore(self._policy.lanes + 1)
        stopping = False
        complete = False

        async def produce() -> None:
            nonlocal complete
            async with aclosing(job.batches(claim.checkpoint)) as batches:  # type: ignore[type-var]
                await room.acquire()
                async for batch in batches:
                    queue.put_nowait(batch)
                    await room.acquire()
            complete = True

        async def lane() -> None:
            nonlocal complete
            while (batch := await queue.get()) is not None:
                if stopping or not await claim.allowed(batch.bytes, until=slice_end):
                    complete = False
                    return
                await job.run(batch)
                room.release()

        async def watch(producer: asyncio.Task[None], lanes: list[asyncio.Task[None]]) -> None:
            nonlocal stopping
            while await signal.interrupted(max(0.0, slice_end - asyncio.get_running_loop().time())):
                if not stopping:
                    stopping = True
                    producer.cancel()
                if signal.wanted is Wanted.STOP:
                    for task in lanes:
                        task.cancel()
                    return
                # A pause waits for the batches in hand; an abort may still overtake it.
                await asyncio.sleep(0.005)
            stopping = True
            producer.cancel()

        async with asyncio.TaskGroup() as group:
            producer = group.create_task(produce())
            lanes = [group.create_task(lane()) for _ in range(self._policy.lanes)]
            watcher = group.create_task(watch(producer, lanes))
            await asyncio.wait([producer])
            for _ in lanes:
                queue.put_nowait(None)
            await asyncio.wait(lanes)
            watcher.cancel()
        return complete and not producer.cancelled() and not any(task.cancelled() for task in lanes)

    # --- how a claim ends otherwise

    async def _answer_for(self, task: Task, error: BaseException) -> None:
        if isinstance(error, Fenced):
            log.info("let go: the task is somebody else's now", reason=error.detail)
        elif isinstance(error, SluiceError) and not error.retryable:
            log.warning("failed", code=error.code, error=error.detail)
            await self._patiently(
                lambda: self._store.move(task.task_id, Trigger.FAIL, actor=self._worker, epoch=task.epoch, error=error)
            )
        elif isinstance(error, SluiceError):
            log.warning("a later attempt may go better", code=error.code, error=error.detail)
            await self._let_go(task, error.detail, error=error)
        else:
            log.error("unexpected error", exc_info=error)
            fault = InternalFault(f"unexpected {type(error).__name__}: {error}")
            await self._let_go(task, fault.detail, error=fault)

    async def _let_go(self, task: Task, reason: str, *, error: SluiceError | None = None) -> None:
        """Hand a task that we still hold to the next worker; after an error, later."""
        delay = self._backoff(task.attempts) if error else 0.0

        async def hand_over() -> None:
            moved = await self._store.move(
                task.task_id,
                Trigger.YIELD,
                actor=self._worker,
                epoch=task.epoch,
                reason=reason,
                error=error,
                delay_seconds=delay,
            )
            if moved is None:
                await self._move(task, Trigger.REACH_PAUSE, reason)

        await self._patiently(hand_over)

    async def _put_off(self, task: Task, error: BaseException | None = None) -> None:
        """Give a rollback that we still hold to whoever takes it next; after an error, later."""
        if isinstance(error, Fenced):
            return  # rolled back in the meantime, or somebody else's
        delay = 0.0
        if error is not None:
            delay = self._backoff(task.attempts)
            log.warning("rollback will be tried again", error=str(error), attempt=task.attempts, exc_info=error)
        await self._patiently(lambda: self._store.put_off_rollback(task.task_id, task.epoch, delay_seconds=delay))

    async def _move(self, task: Task, trigger: Trigger, reason: str | None = None) -> Task | None:
        return await self._store.move(task.task_id, trigger, actor=self._worker, epoch=task.epoch, reason=reason)

    async def _claimed(
        self, claim: Callable[[], Coroutine[Any, Any, Task | None]], give_back: Callable[[Task], Awaitable[None]]
    ) -> Task | None:
        """Claim; a cancel in the middle of it must not leave a task with a worker that does not know of it."""

        async def and_back(task: Task | None) -> None:
            if task is not None:
                await give_back(task)

        return await self._patiently(lambda: _uncut(claim(), and_back))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """Try until PostgreSQL answers: without it nobody can say where the task stands."""
        attempt = 0
        while True:
            try:
                return await call()
            except Retryable as error:
                attempt += 1
                log.warning("waiting for PostgreSQL", error=error.detail, attempt=attempt)
                await asyncio.sleep(min(self._backoff(attempt), 5.0))

    def _backoff(self, attempt: int) -> float:
        longest = self._policy.longest_backoff_seconds
        return min(longest, self._policy.retry_backoff_seconds * 2.0 ** min(attempt - 1, 30)) * random.uniform(0.75, 1)  # noqa: S311


async def _uncut(work: Coroutine[Any, Any, T], if_cut: Callable[[T], Awaitable[None]] | None = None) -> T:
    """Do `work` to its end although cancelled in the middle of it, and `if_cut` then; after that the cancel goes on."""
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        if doing.exception() is None and if_cut is not None:
            await if_cut(doing.result())
        raise


def _leading(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group that decides: fenced before permanent before passing before unexpected."""

    def rank(error: BaseException) -> int:
        if isinstance(error, Fenced):
            return 0
        if isinstance(error, SluiceError):
            return 2 if error.retryable else 1
        return 3

    leaves: list[BaseException] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        else:
            leaves.append(error)
    return min(leaves, key=rank)
