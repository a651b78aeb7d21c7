"""Request bodies as they arrive: asked for only when wanted, bounded in size and in silence."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import HttpVersion11, web

from gateway.problems import Malformed
from shared.domain.errors import TooLarge, TooSlow

CONTINUED = web.RequestKey("continued", bool)


class ClientGone(ConnectionError):
    """The client left before its request was complete: there is nobody to answer."""


async def chunks(request: web.Request, *, max_bytes: int, idle_seconds: float) -> AsyncIterator[bytes]:
    """The body in pieces; all of it arrives or this raises.

    Raises TooLarge (from Content-Length, before a byte is read, or when it turns out so), TooSlow after
    `idle_seconds` of silence, Malformed and ClientGone.
    """
    announced = request.content_length
    if announced is not None and announced > max_bytes:
        raise _too_large(max_bytes)
    await _continue(request)
    received = 0
    while True:
        try:
            async with asyncio.timeout(idle_seconds):
                chunk = await request.content.readany()
        except TimeoutError as error:
            raise TooSlow(f"no byte of the body came for {idle_seconds:g} seconds; send it again") from error
        except web.RequestPayloadError as error:
            if _is_gone(request):
                raise ClientGone("the client left in the middle of its body") from error
            raise Malformed(f"the body is broken: {error}") from error
        except OSError as error:
            raise ClientGone("the client left in the middle of its body") from error
        if not chunk:
            break
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        yield chunk
    if announced is not None and received != announced:
        raise ClientGone(f"the body ended after {received} of {announced} bytes")


async def whole(request: web.Request, *, max_bytes: int, idle_seconds: float) -> bytes:
    """A small body; it has `idle_seconds` altogether."""
    try:
        async with asyncio.timeout(idle_seconds):
            parts = [part async for part in chunks(request, max_bytes=max_bytes, idle_seconds=idle_seconds)]
    except TimeoutError as error:
        raise TooSlow(f"the body did not arrive within {idle_seconds:g} seconds; send it again") from error
    return b"".join(parts)


async def defer_continue(request: web.Request) -> None:
    """The expect handler of every route: "100 Continue" waits until the body is wanted (see `chunks`)."""


def refuse_expectations(request: web.Request) -> None:
    """Raises HTTPExpectationFailed for others than 100-continue; not by the expect handler, which is outside of all
    that answers errors."""
    if request.headers.get("Expect", "100-continue").lower() != "100-continue":
        raise web.HTTPExpectationFailed


def awaits_continue(request: web.Request) -> bool:
    """Whether the client holds its body back until it is asked for it."""
    return "Expect" in request.headers and request.version >= HttpVersion11 and CONTINUED not in request


async def _continue(request: web.Request) -> None:
    if awaits_continue(request):
        request[CONTINUED] = True
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await request.writer.drain()
        request.writer.output_size = 0  # the answer proper has not begun


def _is_gone(request: web.Request) -> bool:
    return request.transport is None or request.transport.is_closing()


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the body is larger than the {max_bytes:,} bytes that are allowed", max_bytes=max_bytes)
