"""The document of the bus names what the code declares, and its schemas accept what the code sends."""

from typing import Any

import jsonschema
import pytest

from shared.adapters.rabbit_topology import QUEUES
from shared.domain.asyncapi import asyncapi_document
from shared.domain.messages import CommandReply, Message, PauseTask, RollBackTask, RunTask, TaskEvent
from shared.domain.task import AccountId, Epoch, Event, Kind, TaskId, TaskState

DOCUMENT = asyncapi_document("1")


def test_every_queue_that_is_declared_is_a_channel() -> None:
    assert set(QUEUES) <= set(DOCUMENT["channels"])


def test_every_reference_leads_somewhere() -> None:
    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if "$ref" in node else []
            return own + [ref for key, value in node.items() if key != "payload" for ref in references(value)]
        return [ref for value in node for ref in references(value)] if isinstance(node, list) else []

    found = references(DOCUMENT)
    assert found
    for reference in found:
        node = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]


@pytest.mark.parametrize(
    "message",
    [
        RunTask(task_id=TaskId(1), epoch=Epoch(2)),
        RollBackTask(task_id=TaskId(1)),
        PauseTask(task_id=TaskId(1), reason="lunch"),
        CommandReply(task_id=TaskId(1), status=200, state=TaskState.PAUSED),
        TaskEvent(
            type=Event.STARTED,
            task_id=TaskId(1),
            account_id=AccountId(1),
            kind=Kind.IMPORT,
            state=TaskState.RUNNING,
            previous=TaskState.QUEUED,
            epoch=1,
            actor="w",
        ),
    ],
)
def test_its_schemas_accept_what_is_sent(message: Message) -> None:
    schema = DOCUMENT["components"]["messages"][type(message).__name__]["payload"]
    jsonschema.validate(message.model_dump(mode="json"), schema)
