"""The one table that both routes requests and documents them: operations, and how a call is decoded and encoded.

A handler says by its annotations what it takes: `query` and `body` are pydantic models. It returns a `Reply`, or a
response of its own when it streams.
"""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from http import HTTPStatus
from inspect import get_annotations, signature
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from gateway import bodies
from gateway.problems import UnsupportedMediaType, faults
from shared.domain.errors import InvalidRequest, NotFound, SluiceError, Unauthenticated
from shared.domain.task import BIGINT_MAX

if TYPE_CHECKING:
    from gateway.accounts import Account
    from gateway.context import Gateway

MAX_JSON_BYTES = 1024 * 1024
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")


class Query(BaseModel):
    """Query parameters; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Body(BaseModel):
    """A JSON body; unknown members are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Auth(Enum):
    NONE = auto()
    OPTIONAL = auto()
    REQUIRED = auto()


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way to a handler."""

    gateway: "Gateway"
    request: web.Request
    caller: "Account | None"

    @property
    def account(self) -> "Account":
        """Who asks; always there when the operation's `auth` is REQUIRED."""
        if self.caller is None:
            raise Unauthenticated("say who you are: HTTP Basic or a bearer token")
        return self.caller

    def id(self, name: str) -> int:
        """A number in the path. What cannot be one is answered like an unknown one: NotFound."""
        text = self.request.match_info[name]
        if not (text.isascii() and text.isdigit()) or len(text) > 19 or not 1 <= int(text) <= BIGINT_MAX:
            raise NotFound(f"there is no {name} {text}")
        return int(text)


@dataclass(frozen=True, slots=True)
class Reply:
    body: BaseModel | None = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> web.Response:
        headers = {"Cache-Control": "no-store", **self.headers}
        if self.body is None:
            return web.Response(status=self.status, headers=headers)
        return web.Response(
            status=self.status,
            headers=headers,
            body=self.body.model_dump_json().encode(),
            content_type="application/json",
        )


Handler = Callable[..., Awaitable[Reply | web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A documented answer: a JSON model, or bytes of a media type, or nothing."""

    description: str
    model: type[BaseModel] | None = None
    media_type: str | None = None
    headers: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    method: str
    path: str
    handler: Handler
    answers: Mapping[int, Answer]
    problems: Sequence[type[SluiceError]] = ()
    auth: Auth = Auth.REQUIRED
    request_headers: Mapping[str, str] = field(default_factory=dict)
    streams_body: bool = False
    """The handler reads the body itself, as bytes of any type."""
    tail: str | None = None
    """The parameter at the end of the path that is a text, and may hold slashes."""

    @property
    def name(self) -> str:
        return self.handler.__name__

    @property
    def query(self) -> type[Query] | None:
        return get_annotations(self.handler, eval_str=True).get("query")

    @property
    def body(self) -> type[BaseModel] | None:
        annotation = get_annotations(self.handler, eval_str=True).get("body")
        if get_origin(annotation) in (Union, UnionType):
            annotation = next(arm for arm in get_args(annotation) if arm is not type(None))
        return annotation

    @property
    def body_required(self) -> bool:
        return signature(self.handler).parameters["body"].default is not None

    @property
    def route_path(self) -> str:
        """`path` in aiohttp's form."""
        return self.path if self.tail is None else self.path.replace(f"{{{self.tail}}}", f"{{{self.tail}:(?s:.+)}}")


def bind(operation: Operation) -> Callable[[Call], Awaitable[web.StreamResponse]]:
    """Decode, call, encode."""
    query_model, body_model = operation.query, operation.body
    required = body_model is not None and operation.body_required

    async def serve(call: Call) -> web.StreamResponse:
        decoded: dict[str, Any] = {}
        if query_model is not None:
            decoded["query"] = decode_query(call.request, query_model)
        elif call.request.query_string:
            raise _unknown_parameters(sorted(call.request.query))
        if body_model is not None:
            decoded["body"] = await decode_body(call, body_model, required=required)
        reply = await operation.handler(call, **decoded)
        return reply.encode() if isinstance(reply, Reply) else reply

    return serve


def _unknown_parameters(names: Sequence[str]) -> InvalidRequest:
    errors = [{"in": "query", "field": name, "fault": "unknown parameter"} for name in names]
    return InvalidRequest(f"unknown query parameters: {', '.join(names)}", errors=errors)


def decode_query(request: web.Request, model: type[Query]) -> Query:
    values: dict[str, Any] = {}
    for name in request.query:
        given = request.query.getall(name)
        repeatable = name in model.model_fields and is_list(model.model_fields[name].annotation)
        if len(given) > 1 and not repeatable:
            raise InvalidRequest(
                f"the query parameter {name} was given {len(given)} times; once is allowed",
                errors=[{"in": "query", "field": name, "fault": "given more than once"}],
            )
        if any("\0" in value for value in given):
            raise InvalidRequest(
                f"the query parameter {name} has a NUL character",
                errors=[{"in": "query", "field": name, "fault": "NUL character"}],
            )
        values[name] = given if repeatable else given[0]
    if unknown := sorted(values.keys() - model.model_fields.keys()):
        raise _unknown_parameters(unknown)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise faults(error, where="query") from error


def is_list(annotation: object) -> bool:
    return get_origin(annotation) is list or any(get_origin(arm) is list for arm in get_args(annotation))


async def decode_body(call: Call, model: type[BaseModel], *, required: bool) -> BaseModel | None:
    """Raises UnsupportedMediaType, Malformed, InvalidRequest, and what `bodies.whole` raises."""
    request = call.request
    if not request.can_read_body:
        if required:
            raise InvalidRequest("a JSON body is needed; see /openapi.json")
        return None
    if request.content_type != "application/json":
        raise UnsupportedMediaType(f"the body is {request.content_type}; send JSON with Content-Type: application/json")
    refuse_content_encoding(request)
    idle_seconds = call.gateway.settings.body_idle_seconds
    text = await bodies.whole(request, max_bytes=MAX_JSON_BYTES, idle_seconds=idle_seconds)
    if _NUL.search(text):
        raise InvalidRequest(
            "the body has a NUL character (\\u0000), which PostgreSQL cannot store",
            errors=[{"in": "body", "field": "", "fault": "NUL character"}],
        )
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise faults(error, where="body") from error


def refuse_content_encoding(request: web.Request) -> None:
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaType(
            f"Content-Encoding {encoding} is not understood; send the bytes as they are, without that header"
        )


def created(location: str, body: BaseModel, *, status: HTTPStatus = HTTPStatus.CREATED) -> Reply:
    return Reply(body, status, {"Location": location})
