"""The skeleton of a service process: settings, logs, signals, one task group, drain, health."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import structlog
import uvloop
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError

from shared.config import Settings
from shared.domain.errors import SluiceError
from shared.logs import set_up_logging

log = structlog.get_logger()

# Returns when what it asks can be used; raises otherwise.
Check = Callable[[], Coroutine[Any, Any, None]]


def run_service(name: str, body: Callable[[Settings], Awaitable[None]]) -> None:
    """Run `body` until SIGTERM or SIGINT cancels it; exit status 0 then, 1 when it fails, 2 when it is misconfigured.

    `body` opens what it needs, runs until cancelled, and closes what it opened.
    """
    try:
        settings = Settings()
    except ValidationError as error:
        for fault in error.errors():
            print(f"SLUICE_{str(fault['loc'][0]).upper()}: {fault['msg']}", file=sys.stderr)
        sys.exit(2)
    set_up_logging(service=name, level=settings.log_level, fmt=settings.log_format)
    sys.exit(uvloop.run(_supervise(body, settings)))


async def _supervise(body: Callable[[Settings], Awaitable[None]], settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    work = asyncio.ensure_future(body(settings))
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            log.warning("still draining")
            return
        stopping.set()
        log.info("stopping")
        work.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    drain = asyncio.ensure_future(_drained(stopping, settings.drain_seconds))
    done, _ = await asyncio.wait([work, drain], return_when=asyncio.FIRST_COMPLETED)
    if drain in done:
        log.error("did not drain in time; what is left will be recovered by others", seconds=settings.drain_seconds)
        return 1
    drain.cancel()
    try:
        await work
    except asyncio.CancelledError:
        return 0
    except BaseExceptionGroup as group:
        for error in _leaves(group):
            _say(error)
        return 1
    except Exception as error:
        _say(error)
        return 1
    return 0


async def _drained(stopping: asyncio.Event, seconds: float) -> None:
    await stopping.wait()
    await asyncio.sleep(seconds)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def _say(error: BaseException) -> None:
    if isinstance(error, SluiceError):
        log.error("the service ends", error=error.detail, code=error.code)
    else:
        log.error("the service ends", exc_info=error)


async def serve_health(settings: Settings, checks: Mapping[str, Check]) -> web.AppRunner | None:
    """Serve `/healthz`, `/readyz` and `/metrics` for a service without HTTP of its own; None when it is switched off.

    /readyz is 503 when a check raises, and names what is away.
    """
    if not settings.health_port:
        return None

    async def healthz(_: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def readyz(_: web.Request) -> web.Response:
        body, status = await readiness(checks)
        return web.json_response(body, status=status)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, settings.health_host, settings.health_port).start()
    return runner


async def readiness(checks: Mapping[str, Check], *, timeout_seconds: float = 3.0) -> tuple[dict[str, object], int]:
    """Ask all checks at once: the body and status of /readyz."""

    async def asked(check: Check) -> str:
        try:
            async with asyncio.timeout(timeout_seconds):
                await check()
                return "ready"
        except (SluiceError, TimeoutError, OSError) as error:
            # Anybody may ask: the reason, which names addresses, goes to the log.
            log.warning("not ready", error=str(error) or "no answer in time")
            return "away"

    answers = dict(zip(checks, await asyncio.gather(*map(asked, checks.values())), strict=True))
    ready = all(answer == "ready" for answer in answers.values())
    return {"status": "ready" if ready else "unavailable", "checks": answers}, 200 if ready else 503
