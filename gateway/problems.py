"""Errors as problem documents (RFC 9457): every error of the project, of the router, and what nobody expected."""

import re
from http import HTTPStatus
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from shared.domain.errors import (
    BusUnavailable,
    DatabaseUnavailable,
    IntegrityMismatch,
    InternalFault,
    InvalidRequest,
    ObjectMissing,
    RangeNotSatisfiable,
    Retryable,
    SluiceError,
    StoreMisconfigured,
    StoreRefused,
    StoreUnavailable,
    TooManyRequests,
    TooSlow,
    Unauthenticated,
    UploadMissing,
)
from shared.domain.task import Kind

REQUEST_ID = web.RequestKey("request_id", str)
MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = {Retryable: 5, TooManyRequests: 1}


class Malformed(SluiceError):
    """Not even readable: broken JSON, a broken chunk, an address that is not UTF-8."""

    code = "malformed"
    status = HTTPStatus.BAD_REQUEST


class UnsupportedMediaType(SluiceError):
    code = "unsupported-media-type"
    status = HTTPStatus.UNSUPPORTED_MEDIA_TYPE


class Problem(BaseModel):
    """What every error answers. Further members belong to the type."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="urn:sluice:problem:CODE; CODE never changes its meaning")
    title: str
    status: int
    detail: str = Field(description="what was wrong, where, and what to do")
    instance: str = Field(description="the path that was asked")
    request_id: str = Field(description="the same as in the header X-Request-Id and in the logs")


_AWAY = "{} does not answer at this moment; try again"
# What these say is for operators: it names addresses and keys. The log has it.
PUBLIC_DETAILS: dict[type[SluiceError], str] = {
    BusUnavailable: _AWAY.format("the message bus"),
    DatabaseUnavailable: _AWAY.format("the database"),
    StoreUnavailable: _AWAY.format("the object store"),
    IntegrityMismatch: "what the object store holds is not what was sent; send it again",
}
# The same for a task, which has other errors as well.
_TASK_FAULT = "this is a fault of the server; the task's number finds it in the logs"
_TASK_DETAILS: dict[str, str] = {error.code: detail for error, detail in PUBLIC_DETAILS.items()} | {
    error.code: _TASK_FAULT for error in (InternalFault, ObjectMissing, StoreMisconfigured, StoreRefused, UploadMissing)
}
# How their details begin: the audit trail has no codes.
_FOR_OPERATORS = re.compile(r"unexpected |PostgreSQL |RabbitMQ |SLUICE_|the (object|store) |[0-9]+ of [0-9]+ objects ")
_FAULT = "this is a fault of the server; the request id finds it in the logs"


def title(error: type[SluiceError]) -> str:
    return error.code.replace("-", " ").capitalize()


def _document(request: web.Request, code: str, name: str, status: int, detail: str) -> dict[str, Any]:
    return {
        "type": f"urn:sluice:problem:{code}",
        "title": name,
        "status": status,
        "detail": detail.encode(errors="replace").decode(),  # headers may bring what is no UTF-8
        "instance": request.path,
        "request_id": request.get(REQUEST_ID, ""),
    }


def _response(document: dict[str, Any]) -> web.Response:
    return web.Response(status=document["status"], body=orjson.dumps(document, default=str), content_type=MEDIA_TYPE)


def problem(request: web.Request, error: SluiceError) -> web.Response:
    """The answer to an error of ours."""
    hidden = PUBLIC_DETAILS.get(type(error), _FAULT if error.status == HTTPStatus.INTERNAL_SERVER_ERROR else None)
    document = _document(request, error.code, title(type(error)), int(error.status), hidden or error.detail)
    response = _response(document if hidden else {**error.extra, **document})
    for kind, seconds in RETRY_AFTER_SECONDS.items():
        if isinstance(error, kind):
            response.headers["Retry-After"] = str(seconds)
    if isinstance(error, RangeNotSatisfiable):
        response.headers["Content-Range"] = f"bytes */{error.extra['bytes']}"
    if isinstance(error, TooSlow):
        response.force_close()
    if isinstance(error, Unauthenticated):
        response.headers.add("WWW-Authenticate", 'Basic realm="sluice", charset="UTF-8"')
        response.headers.add("WWW-Authenticate", 'Bearer realm="sluice"')
    return response


def public_error(error: dict[str, Any]) -> dict[str, Any]:
    """A task's error without what is for operators."""
    detail = _TASK_DETAILS.get(error.get("code", ""))
    if detail is not None:
        return {"code": error["code"], "detail": detail}
    last = error.get("last_error")
    return {**error, "last_error": public_error(last)} if isinstance(last, dict) else error


def public_reason(reason: str | None) -> str | None:
    """Why a worker let go of a task, without what is for operators."""
    return _TASK_FAULT if reason and _FOR_OPERATORS.match(reason) else reason


def router_problem(request: web.Request, error: web.HTTPException) -> web.Response:
    """The answer when no operation fits: 404, 405, 417."""
    phrase = HTTPStatus(error.status).phrase
    details = {
        404: "there is nothing at this address; see /openapi.json for what there is",
        405: f"{request.method} is not possible here",
        413: "the request is larger than allowed",
        417: "of all expectations only 100-continue can be met",
    }
    code = phrase.lower().replace(" ", "-")
    response = _response(_document(request, code, phrase, error.status, details.get(error.status, phrase)))
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def unexpected_problem(request: web.Request) -> web.Response:
    """The answer to a fault of ours, without a word about the inside."""
    return _response(_document(request, "internal", "Internal server error", 500, _FAULT))


# Pydantic begins the place of a fault with the arm of the union that it looked into, which is no field of anybody's.
_KINDS = frozenset(Kind)
# Writing down each of a hundred thousand would hold up everybody else.
MOST_FAULTS = 1000


def _field(item: ErrorDetails) -> str:
    if item["type"].startswith("union_tag_"):
        return str(item["ctx"]["discriminator"]).strip("'")
    steps = item["loc"][1:] if item["loc"] and item["loc"][0] in _KINDS else item["loc"]
    return ".".join(str(step) for step in steps)


def faults(error: ValidationError, *, where: str) -> InvalidRequest | Malformed:
    """Pydantic's findings, by field, without the values (they may be secrets)."""
    if error.error_count() > MOST_FAULTS:
        fault = f"{error.error_count():,} faults, too many to name"
        return InvalidRequest(f"the {where} has {fault}", errors=[{"in": where, "field": "", "fault": fault}])
    details = error.errors(include_url=False, include_input=False)
    if details[0]["type"] == "json_invalid":
        return Malformed(f"the {where} is not JSON: {details[0]['msg'].removeprefix('Invalid JSON: ')}")
    found = [
        {
            "in": where,
            "field": _field(item),
            "fault": item["msg"].removeprefix("Value error, "),
        }
        for item in details
    ]
    lines = [f"{item['field']}: {item['fault']}" if item["field"] else item["fault"] for item in found[:5]]
    return InvalidRequest(f"the {where} is not right: {'; '.join(lines)}", errors=found[:50])
