"""Tasks that would wait for ever: lost workers, hints that went astray, pauses that nobody ends."""

import structlog

from shared.adapters.rabbit import RabbitBus
from shared.domain.messages import WORK_QUEUES, rollback_queue
from shared.ports.tasks import TaskStore

log = structlog.get_logger()

ACTOR = "control"
SCHEDULE = "schedule"
# A hint that was sent and is in no queue is with a worker, or lost. Give a worker this long to claim.
HINT_SECONDS = 5.0
# A queue that is never empty may hide a lost hint: then a task is announced again after this long, needed or not.
BUSY_HINT_SECONDS = 600.0


class Reaper:
    def __init__(self, store: TaskStore, bus: RabbitBus) -> None:
        self._store = store
        self._bus = bus

    async def __call__(self) -> None:
        for task in await self._store.lose_expired(actor=ACTOR):
            log.warning("lease ended", task_id=task.task_id, epoch=task.epoch, state=task.state)
        for task in await self._store.expire_due(actor=ACTOR):
            log.info("expired", task_id=task.task_id)
        for task in await self._store.keep_windows(actor=SCHEDULE):
            log.info("moved by its schedule", task_id=task.task_id, state=task.state)
        work = set(WORK_QUEUES.values())
        names = work | {rollback_queue(name) for name in work}
        # A queue that still holds messages will get to its tasks; only an empty one can have lost a hint.
        empty = {name for name in names if await self._bus.ready_messages(name) == 0}
        for queues, seconds in ((empty, HINT_SECONDS), (names - empty, BUSY_HINT_SECONDS)):
            for task in await self._store.announce_overdue(older_than_seconds=seconds, queues=queues):
                log.warning("announced again: its hint may be lost", task_id=task.task_id, state=task.state)
