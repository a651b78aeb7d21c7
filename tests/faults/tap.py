"""A TCP relay in front of a server, through which a test breaks, freezes or garbles traffic at a chosen byte."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self

Filter = Callable[[int, bytes], Awaitable[bytes]]
"""Gets the offset in its direction, over all connections, and a chunk; returns what goes on."""


class ConnectionCut(ConnectionError):
    """Raised by a filter to drop the connection it is asked for."""


class Answered(ConnectionError):
    """Raised by `up` to answer in the server's place, which gets no more of the connection."""

    def __init__(self, answer: bytes) -> None:
        super().__init__()
        self.answer = answer


async def forward(_: int, chunk: bytes) -> bytes:
    return chunk


class Tap:
    """Set `up` (to the server) and `down` (to the client); both forward everything at first."""

    def __init__(self, port: int) -> None:
        self._upstream_port = port
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}
        self.reset()

    def reset(self) -> None:
        """Forward everything and count from 0 again."""
        self.up: Filter = forward
        self.down: Filter = forward
        self._offsets = {"up": 0, "down": 0}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        serving = list(self._connections.values())
        for writer in self._connections:
            writer.transport.abort()
        await asyncio.gather(*serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[writer] = task
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream_port)
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump("up", reader, upstream_writer))
                    group.create_task(self._pump("down", upstream_reader, writer))
            finally:
                upstream_writer.transport.abort()
        except* Answered as answered:
            with suppress(OSError):
                writer.write(next(error.answer for error in answered.exceptions if isinstance(error, Answered)))
                # To close with bytes unread would take the answer back.
                while await reader.read(64 * 1024):
                    pass
            writer.transport.abort()
        except* OSError:  # one side is gone: drop the other
            writer.transport.abort()
        finally:
            del self._connections[writer]

    async def _pump(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(64 * 1024):
            offset = self._offsets[way]
            self._offsets[way] += len(chunk)
            writer.write(await (self.up if way == "up" else self.down)(offset, chunk))
            await writer.drain()
        raise ConnectionResetError(f"{way}: end of stream")
