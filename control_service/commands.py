"""Pause, resume and abort: the one place where a user's wish moves a task."""

import asyncio
from weakref import WeakValueDictionary

import structlog

from shared.adapters.rabbit import Delivery, RabbitBus
from shared.domain.errors import Retryable
from shared.domain.messages import (
    CONTROL_COMMANDS,
    AbortTask,
    CommandReply,
    ControlCommand,
    PauseTask,
    ResumeTask,
    decode,
)
from shared.domain.task import TaskId, allowed_commands, answer
from shared.ports.tasks import TaskStore

log = structlog.get_logger()

_COMMAND = {message: command for command, message in CONTROL_COMMANDS.items()}
# A command is held until PostgreSQL can say what became of it; the broker gives up on us only after 30 minutes.
LONGEST_WAIT_SECONDS = 5.0


class CommandHandler:
    def __init__(self, store: TaskStore, bus: RabbitBus) -> None:
        self._store = store
        self._bus = bus
        # Commands to one task are applied in the order in which they came: the last wish counts.
        self._turns: WeakValueDictionary[TaskId, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, delivery: Delivery) -> None:
        """Apply one command, answer it from the truth, and acknowledge it. Raises InvalidMessage."""
        message = decode(delivery.body, PauseTask, ResumeTask, AbortTask)
        turn = self._turns.get(message.task_id)
        if turn is None:
            self._turns[message.task_id] = turn = asyncio.Lock()
        async with turn:
            reply = await self._applied(message)
        log.info(
            "command", type=type(message).__name__, task_id=message.task_id, actor=message.actor, status=reply.status
        )
        await self._bus.reply(delivery, reply)
        await delivery.ack()

    async def _applied(self, message: ControlCommand) -> CommandReply:
        command = _COMMAND[type(message)]
        wait_seconds = 0.1
        while True:
            try:
                found = await self._store.command(
                    message.task_id,
                    command,
                    account_id=message.account_id,
                    actor=message.actor,
                    reason=message.reason,
                    # It comes again if this process dies before the ack, perhaps after the user's next wish.
                    message_id=message.message_id,
                )
                break
            except Retryable as error:
                log.warning("the command waits", error=error.detail, task_id=message.task_id)
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(wait_seconds * 2, LONGEST_WAIT_SECONDS)
        if found is None:
            return CommandReply(task_id=message.task_id, status=404, state=None)
        before, after = found
        return CommandReply(
            task_id=message.task_id,
            status=answer(before, command).status,
            state=after,
            allowed=allowed_commands(after),
        )
