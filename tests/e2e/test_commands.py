"""Every command to a task in every state, over HTTP, through a real gateway, broker and control service."""

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from shared.adapters.postgres import PgDatabase
from shared.domain.task import AccountId, Command, Kind, TaskState
from sluice.stack import Stack
from tests.gateway_process import Client
from tests.servers import own_database, own_vhost
from tests.tasks import open_database, silent_store, task_in

# The table of the design, written out: status and state afterwards.
ANSWERS: dict[TaskState, tuple[tuple[int, str], tuple[int, str], tuple[int, str]]] = {
    TaskState.QUEUED: ((200, "paused"), (200, "queued"), (202, "aborting")),
    TaskState.RUNNING: ((202, "pausing"), (200, "running"), (202, "aborting")),
    TaskState.PAUSING: ((202, "pausing"), (200, "running"), (202, "aborting")),
    TaskState.PAUSED: ((200, "paused"), (202, "queued"), (202, "aborting")),
    TaskState.ABORTING: ((409, "aborting"), (409, "aborting"), (202, "aborting")),
    TaskState.FAILED: ((409, "failed"), (202, "queued"), (202, "aborting")),
    TaskState.ABORTED: ((409, "aborted"), (409, "aborted"), (200, "aborted")),
    TaskState.SUCCEEDED: ((409, "succeeded"), (409, "succeeded"), (409, "succeeded")),
}
CASES = [
    pytest.param(state, command, *expected, id=f"{command}-{state}")
    for state, answers in ANSWERS.items()
    for command, expected in zip(Command, answers, strict=True)
]


class Place:
    """A gateway and a control service, two accounts, and no worker that would move a task on."""

    def __init__(self, ann: Client, bob: Client, database: PgDatabase, account: AccountId) -> None:
        self.ann = ann
        self.bob = bob
        self.database = database
        self.account = account


@pytest.fixture(scope="module")
async def place(shared_stack: Stack, template: str) -> AsyncIterator[Place]:
    servers = shared_stack.environment()
    async with (
        own_database(servers["SLUICE_POSTGRES_DSN"], template) as dsn,
        own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as amqp_url,
        open_database(dsn) as database,
    ):
        environment = {**servers, "SLUICE_POSTGRES_DSN": dsn, "SLUICE_AMQP_URL": amqp_url, "SLUICE_S3_PREFIX": "e2e/"}
        stack = Stack.temporary(given=environment)
        try:
            stack.start()
            [control] = stack.spawn("control")
            [gateway] = stack.spawn("gateway")
            for service in (control, gateway):
                await asyncio.to_thread(service.wait_ready)
            async with aiohttp.ClientSession() as session:
                nobody = Client(gateway.url, session)
                ann, bob = await nobody.with_account("ann"), await nobody.with_account("bob")
                found = await ann.get("/v1/accounts/me")
                yield Place(ann, bob, database, AccountId(found.json["account_id"]))
        finally:
            await asyncio.to_thread(stack.purge)


@pytest.mark.parametrize(("state", "command", "status", "after"), CASES)
async def test_a_command_answers_as_the_design_says(
    state: TaskState, command: Command, status: int, after: str, place: Place
) -> None:
    # A kind without a worker: nothing but the command moves it.
    task = await task_in(silent_store(place.database), place.account, state, kind=Kind.EXPORT)
    answer = await place.ann.post(f"/v1/tasks/{task.task_id}/{command}", {"reason": "because"})
    assert answer.status == status, answer.body
    assert answer.json["state"] == after
    if status == 409:
        assert answer.code == "command-refused"
        allowed = [c for c, (code, _) in zip(Command, ANSWERS[state], strict=True) if code != 409]
        assert answer.json["allowed"] == allowed
    seen = await place.ann.get(f"/v1/tasks/{task.task_id}")
    assert seen.json["state"] == after
    events = (await place.ann.get(f"/v1/tasks/{task.task_id}/events")).json["events"]
    if after != state:
        assert (events[-1]["actor"], events[-1]["reason"]) == ("ann", "because")


@pytest.mark.parametrize("command", Command)
async def test_another_accounts_task_is_one_that_does_not_exist(command: Command, place: Place) -> None:
    task = await task_in(silent_store(place.database), place.account, TaskState.RUNNING, kind=Kind.EXPORT)
    refused = await place.bob.post(f"/v1/tasks/{task.task_id}/{command}")
    unknown = await place.bob.post(f"/v1/tasks/{task.task_id + 1_000_000}/{command}")
    assert refused.status == unknown.status == 404
    assert refused.code == unknown.code
    assert (await place.ann.get(f"/v1/tasks/{task.task_id}")).json["state"] == "running"
