"""What the rest of Sluice needs of the message bus."""

from typing import Protocol

from shared.domain.messages import CommandReply, ControlCommand, Message


class Publisher(Protocol):
    async def publish(self, exchange: str, routing_key: str, message: Message) -> None:
        """Hand `message` to the broker: persistent, confirmed and, to a queue, routed.

        Raises BusUnavailable when the broker has not confirmed in time.
        """
        ...

    async def publish_json(self, exchange: str, routing_key: str, body: dict[str, object]) -> None:
        """The same for a message that lay in the outbox."""
        ...


class Control(Protocol):
    async def ask(self, command: ControlCommand, *, timeout_seconds: float) -> CommandReply | None:
        """Send a control command and wait for the control service's answer.

        None: no answer in time; the command stays in its durable queue and will be carried out. Raises BusUnavailable
        when the broker did not take it.
        """
        ...
