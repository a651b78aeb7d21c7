"""The contracts of the bus: what is sent can be read, and what cannot be read says why."""

from dataclasses import fields, replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.errors import InvalidMessage
from shared.domain.messages import (
    CONTROL_COMMANDS,
    WORK_QUEUES,
    AbortTask,
    CommandReply,
    Message,
    PauseTask,
    ResumeTask,
    RollBackTask,
    RunTask,
    TaskEvent,
    decode,
    hint,
)
from shared.domain.task import AccountId, Command, Epoch, Event, Kind, Task, TaskId, TaskState

BIGINT_MAX = 2**63 - 1
ids = st.integers(1, 2**31)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=50)

messages = st.one_of(
    st.builds(RunTask, task_id=ids, epoch=st.none() | st.integers(0, 2**31)),
    st.builds(RollBackTask, task_id=ids, epoch=st.none() | st.integers(0, 2**31)),
    *(
        st.builds(contract, task_id=ids, account_id=st.none() | ids, actor=texts, reason=st.none() | texts)
        for contract in CONTROL_COMMANDS.values()
    ),
    st.builds(
        CommandReply,
        task_id=ids,
        status=st.sampled_from([200, 202, 404, 409]),
        state=st.none() | st.sampled_from(TaskState),
        allowed=st.lists(st.sampled_from(Command)),
    ),
    st.builds(
        TaskEvent,
        type=st.sampled_from(Event),
        task_id=ids,
        account_id=ids,
        kind=st.sampled_from(Kind),
        state=st.sampled_from(TaskState),
        previous=st.none() | st.sampled_from(TaskState),
        epoch=st.integers(0, 2**31),
        actor=texts,
        reason=st.none() | texts,
    ),
)


def fault(body: bytes, *expected: type[Message]) -> str:
    with pytest.raises(InvalidMessage) as raised:
        decode(body, *(expected or (RunTask,)))
    return raised.value.detail


def run_task(**changed: Any) -> bytes:
    return orjson.dumps({"type": "RunTask", "task_id": 1, **changed})


@given(messages)
def test_what_is_sent_is_what_is_read(message: Message) -> None:
    body = orjson.dumps(message.model_dump(mode="json"))
    assert decode(body, Message) == message


def test_a_person_needs_to_write_only_type_and_task() -> None:
    read = decode(b'{"type": "PauseTask", "task_id": 7}', PauseTask, ResumeTask, AbortTask)
    assert isinstance(read, PauseTask)
    assert (read.task_id, read.account_id, read.actor, read.reason) == (7, None, "operator", None)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "body: Invalid JSON"),
        (b"\x00\xff\xfe", "body: Invalid JSON"),
        (b"{", "body: Invalid JSON"),
        (b"null", "body: "),
        (b"[]", "body: "),
        (b"{}", "type: Field required"),
        (b'{"type": 5}', "type: "),
        (b'{"type": null}', "type: "),
        (b'{"type": "Nonsense", "task_id": 1}', "this queue takes RunTask"),
        (b'{"type": "RunTask"}', "task_id: Field required"),
        (run_task(task_id="x"), "task_id: "),
        (run_task(task_id=0), "task_id: "),
        (run_task(task_id=-1), "task_id: "),
        (run_task(task_id=None), "task_id: "),
        (run_task(task_id=1.5), "task_id: "),
        (run_task(task_id=BIGINT_MAX + 1), "task_id: "),
        (run_task(epoch=-1), "epoch: "),
        (run_task(epoch=BIGINT_MAX), "epoch: "),
        (run_task(version=2), "version: "),
        (run_task(version="1"), "version: "),
        (run_task(tsak_id=1), "tsak_id: Extra inputs are not permitted"),
        (run_task(message_id="x"), "message_id: "),
        (run_task(sent_at="yesterday"), "sent_at: "),
        (b"[" * 100_000, "body: Invalid JSON"),
    ],
)
def test_a_message_that_fits_no_contract_is_refused_with_its_fault(body: bytes, named: str) -> None:
    assert named in fault(body)


@pytest.mark.parametrize("contract", CONTROL_COMMANDS.values())
@pytest.mark.parametrize("field", ["actor", "reason"])
def test_a_text_that_no_table_can_keep_is_refused(contract: type[Message], field: str) -> None:
    body = orjson.dumps({"type": contract.__name__, "task_id": 1, field: "a\x00b"})
    assert f"{field}: " in fault(body, contract)


def test_a_message_on_the_wrong_queue_is_refused() -> None:
    body = orjson.dumps(AbortTask(task_id=TaskId(1)).model_dump(mode="json"))
    assert "this queue takes RunTask" in fault(body, RunTask)
    assert "this queue takes PauseTask, ResumeTask" in fault(body, PauseTask, ResumeTask)


def test_a_fault_is_short_whatever_the_message_holds() -> None:
    faults = [
        fault(orjson.dumps({"type": "RunTask", "task_id": 1, "x" * 200_000: 1})),
        fault(run_task(**{f"field{n}": n for n in range(10_000)})),
        fault(orjson.dumps({"type": "y" * 200_000, "task_id": 1})),
        fault(run_task(task_id="z" * 200_000)),
    ]
    assert all(len(f) < 5_000 for f in faults)


def waiting_task(kind: Kind, state: TaskState) -> Task:
    now = datetime.now(UTC)
    nothing: dict[str, Any] = dict.fromkeys(f.name for f in fields(Task))
    known = {"task_id": TaskId(3), "account_id": AccountId(1), "epoch": Epoch(4), "created_at": now}
    return replace(Task(**nothing), kind=kind, state=state, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("state", TaskState)
def test_only_waiting_tasks_are_hinted_at_each_on_its_queue(kind: Kind, state: TaskState) -> None:
    told = hint(waiting_task(kind, state))
    queue = WORK_QUEUES.get(kind)
    if queue is None or state not in (TaskState.QUEUED, TaskState.ABORTING):
        assert told is None
        return
    assert told is not None
    where, message = told
    contract = RunTask if state is TaskState.QUEUED else RollBackTask
    assert where == (queue if state is TaskState.QUEUED else f"{queue}.rollback")
    assert isinstance(message, contract)
    assert (message.task_id, message.epoch) == (3, 4)


def test_messages_are_values_with_identities_of_their_own() -> None:
    one, other = RunTask(task_id=TaskId(1)), RunTask(task_id=TaskId(1))
    assert one.message_id != other.message_id
    assert one.sent_at.tzinfo is not None
    assert decode(run_task(message_id=str(wanted := uuid4())), RunTask).message_id == wanted
