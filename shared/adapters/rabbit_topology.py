"""What there is on the broker and outlives a session: exchanges, and the queues that everybody shares."""

import aio_pika
from aio_pika.abc import AbstractChannel

from shared.domain.messages import (
    BROADCAST_EXCHANGE,
    COMMANDS_EXCHANGE,
    CONTROL_QUEUE,
    DEAD_QUEUE,
    EVENTS_EXCHANGE,
    EXPORT_QUEUE,
    IMPORT_QUEUE,
    rollback_queue,
)

# How often a message may come back before the broker gives it up. The row decides how often a task is tried; this
# only keeps a message that kills its consumers from circling for ever.
DELIVERY_LIMIT = 100
QUEUES = (
    CONTROL_QUEUE,
    IMPORT_QUEUE,
    EXPORT_QUEUE,
    rollback_queue(IMPORT_QUEUE),
    rollback_queue(EXPORT_QUEUE),
)


async def declare_dead_queue(channel: AbstractChannel) -> None:
    await channel.declare_queue(DEAD_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})


async def declare_topology(channel: AbstractChannel) -> dict[str, aio_pika.abc.AbstractExchange]:
    """Declare everything that outlives a session; declaring what is there already changes nothing."""
    commands = await channel.declare_exchange(COMMANDS_EXCHANGE, aio_pika.ExchangeType.DIRECT, durable=True)
    broadcast = await channel.declare_exchange(BROADCAST_EXCHANGE, aio_pika.ExchangeType.FANOUT, durable=True)
    events = await channel.declare_exchange(EVENTS_EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    await declare_dead_queue(channel)
    for name in QUEUES:
        queue = await channel.declare_queue(
            name,
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-delivery-limit": DELIVERY_LIMIT,
                "x-dead-letter-exchange": "",
                "x-dead-letter-routing-key": DEAD_QUEUE,
            },
        )
        await queue.bind(commands, name)
    return {exchange.name: exchange for exchange in (commands, broadcast, events)}
