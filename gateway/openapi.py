"""The OpenAPI 3.1 document, made from the table of operations and the pydantic models. Pure."""

import re
from collections.abc import Iterable
from importlib.metadata import version
from inspect import getdoc
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.operations import Answer, Auth, Operation
from gateway.problems import MEDIA_TYPE, Malformed, Problem, UnsupportedMediaType, title
from shared.domain.errors import (
    DatabaseUnavailable,
    Forbidden,
    InvalidRequest,
    SluiceError,
    TooLarge,
    TooManyRequests,
    TooSlow,
    Unauthenticated,
)

_REF = "#/components/schemas/{model}"
_NUMBER = {"type": "integer", "minimum": 1}
TEXT_PARAMETERS = {"dataset"}
_Mode = Literal["validation", "serialization"]


def openapi(operations: Iterable[Operation]) -> dict[str, Any]:
    operations = list(operations)
    wanted: dict[tuple[type[BaseModel], _Mode], None] = {(Problem, "serialization"): None}
    for operation in operations:
        if operation.body is not None:
            wanted[operation.body, "validation"] = None
        for answer in operation.answers.values():
            if answer.model is not None:
                wanted[answer.model, "serialization"] = None
    references, definitions = models_json_schema(list(wanted), ref_template=_REF)
    writer = _Writer({wanted_one: references[wanted_one] for wanted_one in wanted})
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = writer.operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sluice",
            "version": version("sluice"),
            "description": "Long-running data tasks that can be paused, resumed and aborted at any moment.",
        },
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic"},
                "token": {"type": "http", "scheme": "bearer"},
            },
        },
    }


class _Writer:
    def __init__(self, references: dict[tuple[type[BaseModel], _Mode], dict[str, Any]]) -> None:
        self._references = references

    def operation(self, operation: Operation) -> dict[str, Any]:
        summary, _, description = (getdoc(operation.handler) or "").partition("\n\n")
        described: dict[str, Any] = {
            "operationId": f"{operation.name}_head" if operation.method == "HEAD" else operation.name,
            "summary": summary.partition(". ")[0].rstrip("."),
            "description": f"{summary}\n\n{description}".strip(),
            "tags": [_tag(operation)],
            "responses": {str(status): self._answer(answer) for status, answer in sorted(operation.answers.items())},
        }
        if parameters := [*_in_path(operation), *_in_query(operation), *_in_header(operation)]:
            described["parameters"] = parameters
        if operation.streams_body:
            described["requestBody"] = {"required": True, "content": {"*/*": {}}}
        elif operation.body is not None:
            described["requestBody"] = {
                "required": operation.body_required,
                "content": {"application/json": {"schema": self._references[operation.body, "validation"]}},
            }
        if operation.auth is not Auth.NONE:
            anyone: list[dict[str, list[str]]] = [{}] if operation.auth is Auth.OPTIONAL else []
            described["security"] = [{"basic": []}, {"token": []}, *anyone]
        for status, errors in _problems(operation).items():
            described["responses"].setdefault(str(status), self._problem(errors))
        return described

    def _answer(self, answer: Answer) -> dict[str, Any]:
        described: dict[str, Any] = {"description": answer.description}
        content: dict[str, Any] = {}
        if answer.model is not None:
            content["application/json"] = {"schema": self._references[answer.model, "serialization"]}
        if answer.media_type is not None:
            content[answer.media_type] = {}
        if content:
            described["content"] = content
        if answer.headers:
            described["headers"] = {name: {"schema": {"type": "string"}} for name in answer.headers}
        return described

    def _problem(self, errors: list[type[SluiceError]]) -> dict[str, Any]:
        return {
            "description": "; ".join(f"{title(error)} (`urn:sluice:problem:{error.code}`)" for error in errors),
            "content": {MEDIA_TYPE: {"schema": self._references[Problem, "serialization"]}},
        }


def _tag(operation: Operation) -> str:
    return operation.handler.__module__.rpartition(".")[2]


def _in_path(operation: Operation) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "in": "path",
            "required": True,
            "schema": {"type": "string"} if name in (operation.tail, *TEXT_PARAMETERS) else _NUMBER,
        }
        for name in re.findall(r"{(\w+)}", operation.path)
    ]


def _in_query(operation: Operation) -> list[dict[str, Any]]:
    if operation.query is None:
        return []
    schema = operation.query.model_json_schema(ref_template=_REF)
    parameters = []
    for name, described in schema["properties"].items():
        inlined = _inline(described, schema.get("$defs", {}))
        description = inlined.pop("description", None)
        parameter = {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": inlined}
        parameters.append(parameter | ({"description": description} if description else {}))
    return parameters


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """Parameters are few and small: their enums are written in place."""
    if isinstance(schema, list):
        return [_inline(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {name: _inline(value, definitions) for name, value in schema.items()}


def _in_header(operation: Operation) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "header", "required": False, "schema": {"type": "string"}, "description": description}
        for name, description in operation.request_headers.items()
    ]


def _problems(operation: Operation) -> dict[int, list[type[SluiceError]]]:
    errors: list[type[SluiceError]] = list(operation.problems)
    if operation.auth is not Auth.NONE:
        errors += [Unauthenticated, TooManyRequests, DatabaseUnavailable]
    errors += [InvalidRequest]  # an unknown parameter, at least
    if operation.body is not None:
        errors += [Malformed, TooLarge, TooSlow, UnsupportedMediaType]
    if operation.method not in ("GET", "HEAD"):
        errors += [Forbidden]  # to pages of other sites
    by_status: dict[int, list[type[SluiceError]]] = {}
    for error in dict.fromkeys(errors):
        by_status.setdefault(int(error.status), []).append(error)
    return by_status
