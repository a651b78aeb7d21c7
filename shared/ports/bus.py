"""What the rest of Sluice needs of the message bus."""

from typing import Protocol

from shared.domain.messages import Message


class Publisher(Protocol):
    async def publish(self, exchange: str, routing_key: str, message: Message) -> None:
        """Hand `message` to the broker: persistent, confirmed and, to a queue, routed.

        Raises BusUnavailable when the broker has not confirmed in time.
        """
        ...

    async def publish_json(self, exchange: str, routing_key: str, body: dict[str, object]) -> None:
        """The same for a message that lay in the outbox."""
        ...
