"""A gateway in the test's own process, on real servers, and accounts that talk to it over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp

from gateway.main import serve
from shared.config import Settings

PASSWORD = "correct horse battery"


@dataclass(slots=True)
class Answer:
    """An answer that has been read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        import orjson

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
        import yarl

        url = yarl.URL(self.url + path, encoded=True)
        async with self.session.request(
            method, url, headers={**self.headers, **(headers or {})}, allow_redirects=False, **more
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

    def as_nobody(self) -> "Client":
        return Client(self.url, self.session)

    async def with_account(self, username: str) -> "Client":
        """Register `username` and speak with a token of its own."""
        nobody = self.as_nobody()
        answer = await nobody.post("/v1/accounts", {"username": username, "password": PASSWORD})
        assert answer.status == 201, answer.body
        basic = {"Authorization": aiohttp.encode_basic_auth(username, PASSWORD)}
        token = await nobody.post("/v1/tokens", {"name": "test"}, headers=basic)
        assert token.status == 201, token.body
        return Client(self.url, self.session, username, {"Authorization": f"Bearer {token.json['token']}"})


@asynccontextmanager
async def running_gateway(settings: Settings) -> AsyncIterator[Client]:
    """Nobody's client of a gateway on a free port; stopped afterwards as by SIGTERM."""
    started: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    local = settings.model_copy(update={"gateway_port": 0})
    serving = asyncio.create_task(serve(local, on_started=started.set_result))
    await asyncio.wait([serving, started], return_when=asyncio.FIRST_COMPLETED)
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
