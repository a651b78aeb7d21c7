"""Tasks with a run window, on real services and by a real clock, in a time zone that passes a minute in no time."""

import asyncio
import os
import struct
import time
import zoneinfo
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shared.domain.task import AccountId
from shared.ports.objects import MIN_PART_BYTES
from sluice.stack import Stack
from tests.exports import add_numbers, reference
from tests.faults.scene import Scene, open_scene
from tests.gateway_process import Client, until
from tests.servers import own_database, own_vhost
from tests.tasks import QUICK, ROW_BYTES, assert_loaded, numbered_csv

ROWS = 8000
SECOND = ROWS * ROW_BYTES // 4  # so that the import takes four, and the export too


@dataclass
class Office:
    """Every service, a user, and a folder of time zones that the services look into first."""

    user: Client
    scene: Scene
    zones: Path

    async def begin(self, **request: Any) -> str:
        made = await self.user.post("/v1/tasks", request)
        assert made.status == 202, made.body
        return made.headers["Location"]

    async def settled(self, task: str) -> dict[str, Any]:
        """Wait until it is paused or has ended."""
        view: dict[str, Any] = (await self.user.get(f"{task}?wait=60")).json
        return view

    async def told(self, task: str, event: tuple[str, str, str | None]) -> bool:
        return event in await self.trail(task)

    async def trail(self, task: str) -> list[tuple[str, str, str | None]]:
        events = (await self.user.get(f"{task}/events")).json["events"]
        return [(event["event"], event["actor"].partition("@")[0], event["reason"]) for event in events]


@pytest.fixture(scope="module")
async def office(shared_stack: Stack, template: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Office]:
    servers = shared_stack.environment()
    zones = tmp_path_factory.mktemp("zones")
    async with (
        own_database(servers["SLUICE_POSTGRES_DSN"], template) as dsn,
        own_vhost(servers["SLUICE_AMQP_URL"], servers["SLUICE_RABBITMQ_MANAGEMENT_URL"]) as amqp_url,
    ):
        environment = {
            **servers,
            **QUICK,
            "SLUICE_POSTGRES_DSN": dsn,
            "SLUICE_AMQP_URL": amqp_url,
            "SLUICE_S3_PREFIX": "windows/",
            "SLUICE_PART_BYTES": str(MIN_PART_BYTES),
        }
        look_into = {"PYTHONTZPATH": os.pathsep.join([str(zones), *zoneinfo.TZPATH])}
        stack = Stack.temporary(given=environment)
        try:
            stack.start()
            names = ("control", "upload-worker", "export-worker", "gateway")
            spawned = [service for name in names for service in stack.spawn(name, 1, look_into)]
            for service in spawned:
                await asyncio.to_thread(service.wait_ready)
            async with aiohttp.ClientSession() as session, open_scene(environment) as scene:
                user = await Client(spawned[-1].url, session).with_account("ann")
                account_id = AccountId((await user.get("/v1/accounts/me")).json["account_id"])
                yield Office(user, replace(scene, account_id=account_id, username="ann"), zones)
        finally:
            await asyncio.to_thread(stack.purge)


def closing_window(zones: Path, closes: int, opens: int) -> dict[str, str]:
    """A window that closes at one second and opens at another less than a minute later, both in Unix time.

    Its clock shows 12:00:00 when it closes, and is then put forward so that it shows 12:01:00 when it opens.
    """
    before = -closes % 86400 - 43200
    after = before + 60 - (opens - closes)
    name = f"Test/Closes{closes}"
    # RFC 9636, section 3: no leap seconds, one transition, two kinds of time.
    header = b"TZif\0" + bytes(15) + struct.pack(">6l", 0, 0, 0, 1, 2, 4)
    body = struct.pack(">lb", closes + 1, 1) + struct.pack(">lbblbb", before, 0, 0, after, 0, 0) + b"TST\0"
    (zones / "Test").mkdir(exist_ok=True)
    (zones / name).write_bytes(header + body)
    return {"from": "12:01", "to": "12:00", "time_zone": name}


async def test_a_worker_is_paused_when_its_window_closes_and_goes_on_when_it_opens(office: Office) -> None:
    await office.user.put("/v1/files/numbers.csv", numbered_csv(ROWS))
    load = await add_numbers(office.scene, 120_000)
    closes = int(time.time()) + 3
    opens = closes + 3
    window = closing_window(office.zones, closes, opens)
    tasks = [
        await office.begin(
            kind="import", file_name="numbers.csv", dataset="there", run_window=window, max_bytes_per_second=SECOND
        ),
        await office.begin(kind="export", dataset="data", run_window=window, max_bytes_per_second=MIN_PART_BYTES),
    ]
    for task in tasks:
        paused = await office.settled(task)
        assert paused["state"] == "paused"
        assert paused["progress"]["bytes_done"] > 0
        assert paused["run_window"] == window
        assert datetime.fromisoformat(paused["resume_at"]) == datetime.fromtimestamp(opens, UTC)
    shown = f"12:01 to 12:00 {window['time_zone']}"
    for task, worker in zip(tasks, ("upload-worker", "export-worker"), strict=True):
        await until(lambda task=task: office.told(task, ("TaskResumed", "schedule", f"its run window opens: {shown}")))
        ended = await office.settled(task)
        assert (ended["state"], ended["resume_at"]) == ("succeeded", None)
        assert await office.trail(task) == [
            ("TaskQueued", "ann", None),
            ("TaskStarted", worker, None),
            ("TaskPauseRequested", "schedule", f"outside its run window: {shown}"),
            ("TaskPaused", worker, None),
            ("TaskResumed", "schedule", f"its run window opens: {shown}"),
            ("TaskStarted", worker, None),
            ("TaskSucceeded", worker, None),
        ]
    await assert_loaded(office.scene, "there", ROWS)
    body = (await office.user.get(f"/v1/files/{ended['result']['file_id']}/content")).body
    assert body == await reference(office.scene, [load], ["n", "filling"])


def window_of(opens_in: timedelta) -> dict[str, str]:
    opens = datetime.now(UTC) + opens_in
    return {"from": f"{opens:%H:%M}", "to": f"{opens + timedelta(hours=2):%H:%M}", "time_zone": "UTC"}


async def test_what_a_user_resumes_outside_its_window_waits_for_it_all_the_same(office: Office) -> None:
    await office.user.put("/v1/files/numbers.csv", numbered_csv(ROWS))
    closed = window_of(timedelta(hours=3))
    task = await office.begin(
        kind="import",
        file_name="numbers.csv",
        dataset="later",
        max_bytes_per_second=SECOND,
        run_window=window_of(timedelta(hours=-1)),
    )
    task_id = int(task.rpartition("/")[2])
    await office.scene.when_value("SELECT bytes_done > 0 FROM sluice.tasks WHERE task_id = $1", True, task_id)
    async with office.scene.database.connection() as connection:  # as if it were later
        await connection.execute("UPDATE sluice.tasks SET run_window = $2 WHERE task_id = $1", task_id, closed)
    before = await office.settled(task)
    assert (await office.user.post(f"{task}/resume")).status == 202
    reason = f"outside its run window: {closed['from']} to {closed['to']} UTC"
    await until(lambda: office.told(task, ("TaskPaused", "schedule", reason)))
    after = await office.settled(task)
    assert (after["state"], after["resume_at"]) == ("paused", before["resume_at"])
    assert after["claims"] == 1
    assert (await office.user.post(f"{task}/abort")).status == 202
