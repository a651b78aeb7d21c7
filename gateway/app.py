"""The web application: the table of operations as routes, and what surrounds every request."""

import asyncio
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from uuid import uuid4

import orjson
import structlog
from aiohttp import web
from aiohttp.abc import AbstractAccessLogger, AbstractStreamWriter

from gateway.bodies import awaits_continue, defer_continue, refuse_expectations
from gateway.context import Gateway
from gateway.openapi import openapi
from gateway.operations import Answer, Auth, Call, Operation, bind
from gateway.problems import REQUEST_ID, problem, router_problem, unexpected_problem
from gateway.routes import accounts, datasets, files, health, tasks
from shared.domain.errors import Forbidden, SluiceError, Unauthenticated

log = structlog.get_logger()

GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway")
DOCUMENT: web.AppKey[bytes] = web.AppKey("document")
USERNAME = web.RequestKey("username", str)
ROUTE = web.RequestKey("route", str)
READ_BUFFER_BYTES = 256 * 1024
KEEP_ALIVE_SECONDS = 75
CLIENT_LEFT = 499  # nginx's word for it: HTTP has none
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def show_openapi(call: Call) -> web.Response:
    """Describe this API in OpenAPI 3.1."""
    return web.Response(body=call.request.app[DOCUMENT], content_type="application/json")


OPERATIONS: tuple[Operation, ...] = (
    *health.OPERATIONS,
    Operation(
        "GET",
        "/openapi.json",
        show_openapi,
        {200: Answer("The document.", media_type="application/json")},
        auth=Auth.NONE,
    ),
    *accounts.OPERATIONS,
    *files.OPERATIONS,
    *tasks.OPERATIONS,
    *datasets.OPERATIONS,
)


def build_app(gateway: Gateway) -> web.Application:
    app = web.Application(middlewares=[_answer_every_error])
    app[GATEWAY] = gateway
    app[DOCUMENT] = orjson.dumps(openapi(OPERATIONS))
    for operation in OPERATIONS:
        app.router.add_route(
            operation.method, operation.route_path, _endpoint(operation), expect_handler=defer_continue
        )
    app.on_response_prepare.append(_name_request)
    app.on_shutdown.append(_let_waiters_go)
    app.on_cleanup.append(_finish_cleaning)
    return app


def build_runner(app: web.Application, *, drain_seconds: float) -> web.AppRunner:
    """What serves `app`.

    On cleanup requests in flight get `drain_seconds`, and as long again once they are cancelled.
    """
    return web.AppRunner(
        app,
        access_log_class=AccessLog,
        # A file is stored as it was sent, whatever Content-Encoding says.
        auto_decompress=False,
        read_bufsize=READ_BUFFER_BYTES,
        keepalive_timeout=KEEP_ALIVE_SECONDS,
        shutdown_timeout=drain_seconds,
    )


def _endpoint(operation: Operation) -> _Handler:
    serve = bind(operation)

    async def endpoint(request: web.Request) -> web.StreamResponse:
        request[ROUTE] = operation.path
        _refuse_other_sites(request)
        gateway = request.app[GATEWAY]
        caller = None
        if operation.auth is not Auth.NONE:
            caller = await gateway.authenticator.account(request.headers.get("Authorization"))
        if caller is not None:
            structlog.contextvars.bind_contextvars(account=caller.username)
            request[USERNAME] = caller.username
        elif operation.auth is Auth.REQUIRED:
            raise Unauthenticated("say who you are: HTTP Basic or a bearer token")
        return await serve(Call(gateway, request, caller))

    return endpoint


def _refuse_other_sites(request: web.Request) -> None:
    """Browsers send remembered Basic credentials along, also when a page of another site makes them ask."""
    if request.method not in ("GET", "HEAD") and request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
        raise Forbidden("a page of another site may not change anything here")


@web.middleware
async def _answer_every_error(request: web.Request, handler: _Handler) -> web.StreamResponse:
    given = request.headers.get("X-Request-Id", "")
    request[REQUEST_ID] = request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex
    structlog.contextvars.bind_contextvars(request_id=request_id)  # of this request's own task
    response = await _answer(request, handler)
    if awaits_continue(request) and not response.prepared:
        # The client may now send its body or leave it out; only a new connection makes sure what comes next.
        response.force_close()
    return response


async def _answer(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        refuse_expectations(request)
        return await handler(request)
    except asyncio.CancelledError:
        if request.writer.output_size:
            _reset(request)
        raise
    except ConnectionError as error:
        log.info("the client left", method=request.method, path=request.path, error=str(error))
        return _NoAnswer(status=CLIENT_LEFT)
    except web.HTTPException as error:
        return router_problem(request, error)
    except SluiceError as error:
        if error.status >= 500:
            log.warning("request failed", code=error.code, reason=error.detail, extra=error.extra)
        return _instead(request, problem(request, error), error)
    except Exception as error:
        log.exception("unexpected error", method=request.method, path=request.path)
        return _instead(request, unexpected_problem(request), error)


class _NoAnswer(web.StreamResponse):
    """Lets aiohttp close the connection without reporting an error of ours; the status is for log and metrics."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        raise ConnectionAbortedError("there is nobody to answer")


def _instead(request: web.Request, answer: web.Response, error: Exception) -> web.StreamResponse:
    """Once an answer has begun there is no other: the connection is cut, so that a part never looks like the whole."""
    if not request.writer.output_size:
        return answer
    log.warning("an answer was cut", method=request.method, path=request.path, error=str(error))
    _reset(request)
    return _NoAnswer(status=answer.status)


def _reset(request: web.Request) -> None:
    """Without a length or chunks, as in HTTP/1.0, an orderly end of the connection would be that of a whole answer."""
    if request.transport is None:
        return
    if (connection := request.transport.get_extra_info("socket")) is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["X-Request-Id"] = request.get(REQUEST_ID, "")


async def _let_waiters_go(app: web.Application) -> None:
    app[GATEWAY].watch.close()


async def _finish_cleaning(app: web.Application) -> None:
    await app[GATEWAY].uploads.drain()


class AccessLog(AbstractAccessLogger):
    """One structured line and one count for each request that was answered."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        if not isinstance(request, web.Request) or REQUEST_ID not in request:
            return  # not even HTTP: refused by the parser
        request.app[GATEWAY].metrics.answered(request.method, request.get(ROUTE, "none"), response.status, time)
        log.info(
            "request",
            method=request.method,
            path=request.path,
            status=response.status,
            seconds=round(time, 4),
            bytes=response.body_length,
            remote=request.remote,
            account=request.get(USERNAME),
            request_id=request.get(REQUEST_ID),
        )
