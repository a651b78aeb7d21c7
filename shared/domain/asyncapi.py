"""The AsyncAPI 3.0 document of the bus, made from the message contracts. Pure."""

from typing import Any

from shared.domain.messages import (
    BROADCAST_EXCHANGE,
    COMMANDS_EXCHANGE,
    CONTROL_COMMANDS,
    CONTROL_QUEUE,
    EVENTS_EXCHANGE,
    WORK_QUEUES,
    CommandReply,
    Message,
    RollBackTask,
    RunTask,
    TaskEvent,
    rollback_queue,
)


def asyncapi_document(version: str) -> dict[str, Any]:
    """Channels, operations and messages as this version of Sluice speaks them."""
    commands = tuple(CONTROL_COMMANDS.values())
    channels: dict[str, tuple[str, str, tuple[type[Message], ...]]] = {
        CONTROL_QUEUE: (COMMANDS_EXCHANGE, "Pause, resume and abort; answered to reply_to.", commands),
        BROADCAST_EXCHANGE: (BROADCAST_EXCHANGE, "Control events for every worker.", (TaskEvent,)),
        EVENTS_EXCHANGE: (EVENTS_EXCHANGE, "Everything that happens, as `task.<kind>.<event>`.", (TaskEvent,)),
        "reply": ("", "Answers to control commands, by direct reply-to.", (CommandReply,)),
    }
    for queue in sorted(set(WORK_QUEUES.values())):
        channels[queue] = (COMMANDS_EXCHANGE, "Look at a task that waits for a worker.", (RunTask,))
        channels[rollback_queue(queue)] = (
            COMMANDS_EXCHANGE,
            "Look at a task that waits to be rolled back.",
            (RollBackTask,),
        )
    messages = {message.__name__: message for _, _, those in channels.values() for message in those}
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Sluice on RabbitMQ", "version": version, "license": {"name": "MIT"}},
        "defaultContentType": "application/json",
        "channels": {name: _channel(name, *channel) for name, channel in channels.items()},
        "operations": {
            _operation_id(name): {
                "action": "receive" if exchange == COMMANDS_EXCHANGE else "send",
                "channel": {"$ref": f"#/channels/{name}"},
                **({"reply": {"channel": {"$ref": "#/channels/reply"}}} if name == CONTROL_QUEUE else {}),
            }
            for name, (exchange, _, _) in channels.items()
        },
        "components": {"messages": {name: _message(message) for name, message in messages.items()}},
    }


def _operation_id(channel: str) -> str:
    return channel.replace(".", "_")


def _channel(name: str, exchange: str, description: str, messages: tuple[type[Message], ...]) -> dict[str, Any]:
    if exchange == COMMANDS_EXCHANGE:
        amqp: dict[str, Any] = {"is": "queue", "queue": {"name": name, "durable": True}}
    else:
        kind = "fanout" if exchange == BROADCAST_EXCHANGE else "topic" if exchange else "default"
        amqp = {"is": "routingKey", "exchange": {"name": exchange, "type": kind, "durable": True}}
    return {
        "address": None if name == "reply" else name,
        "description": description,
        "messages": {m.__name__: {"$ref": f"#/components/messages/{m.__name__}"} for m in messages},
        "bindings": {"amqp": {**amqp, "bindingVersion": "0.3.0"}},
    }


def _message(message: type[Message]) -> dict[str, Any]:
    return {
        "name": message.__name__,
        "summary": " ".join((message.__doc__ or "").split()),
        "contentType": "application/json",
        "payload": message.model_json_schema(),
    }
