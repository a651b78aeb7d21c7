"""A gateway in the test's own process, on real servers, and accounts that talk to it over HTTP."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import yarl

from gateway.main import serve
from shared.config import Settings

PASSWORD = "correct horse battery"


@dataclass(slots=True)
class Answer:
    """An answer that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)

    @property
    def code(self) -> str:
        """The last word of a problem's type."""
        assert self.headers["Content-Type"] == "application/problem+json", self.body
        assert self.json["status"] == self.status
        return str(self.json["type"]).removeprefix("urn:sluice:problem:")


@dataclass
class Client:
    """One account, or nobody."""

    url: str
    session: aiohttp.ClientSession
    username: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    async def ask(self, method: str, path: str, *, headers: dict[str, str] | None = None, **more: Any) -> Answer:
        """`path` is sent as it is: encode it."""
        async with self.session.request(
            method,
            yarl.URL(self.url + path, encoded=True),
            headers={**self.headers, **(headers or {})},
            allow_redirects=False,
            **more,
        ) as response:
            return Answer(response.status, response.headers, await response.read())

    async def get(self, path: str, **more: Any) -> Answer:
        return await self.ask("GET", path, **more)

    async def post(self, path: str, json: Any = None, **more: Any) -> Answer:
        return await self.ask("POST", path, **({} if json is None else {"json": json}), **more)

    async def put(self, path: str, data: Any, **more: Any) -> Answer:
        return await self.ask("PUT", path, data=data, **more)

    async def delete(self, path: str, **more: Any) -> Answer:
        return await self.ask("DELETE", path, **more)

    async def with_account(self, username: str) -> "Client":
        """Register `username` and speak with a token of its own."""
        nobody = Client(self.url, self.session)
        answer = await nobody.post("/v1/accounts", {"username": username, "password": PASSWORD})
        assert answer.status == 201, answer.body
        token = await nobody.post("/v1/tokens", {"name": "test"}, headers=basic(username))
        assert token.status == 201, token.body
        return Client(self.url, self.session, username, bearer(token.json["token"]))

    async def connect(self) -> "RawClient":
        """A bare connection, for what no HTTP client would send."""
        address = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        return RawClient(reader, writer, self.headers)


@dataclass
class RawClient:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    headers: Mapping[str, str]

    async def send_head(self, method: str, path: str, *, version: str = "HTTP/1.1", **headers: str) -> None:
        """Header names with `_` for `-`."""
        lines = [f"{method} {path} {version}", "Host: test"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in {**self.headers, **headers}.items()]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def read_head(self) -> tuple[int, str]:
        """The status and the head as it came."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        return int(head.split(" ", 2)[1]), head

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.wait([asyncio.ensure_future(self.writer.wait_closed())])


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Look until it holds: for what tells nobody when it happens."""
    async with asyncio.timeout(30):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.02)


def basic(username: str, password: str = PASSWORD) -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(username, password)}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def running_gateway(settings: Settings, **changed: Any) -> AsyncIterator[Client]:
    """Nobody's client of a gateway on a free port; stopped afterwards as by SIGTERM."""
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = settings.model_copy(update={"gateway_port": 0, **changed})
    serving = asyncio.create_task(serve(settings, on_started=started.set_result))
    either: list[asyncio.Future[Any]] = [serving, started]
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        await serving
    try:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            yield Client(started.result(), session)
    finally:
        serving.cancel()
        await asyncio.wait([serving])
        if not serving.cancelled() and (error := serving.exception()) is not None:
            raise error
