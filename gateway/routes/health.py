"""Is it alive, is it ready, how is it doing, and what is it."""

from importlib.metadata import version

from aiohttp import web

from gateway.metrics import MEDIA_TYPE
from gateway.operations import Answer, Auth, Call, Operation, Reply
from gateway.schemas import Health, Index, Readiness
from shared.domain.asyncapi import asyncapi_document
from shared.service import readiness


async def show_index(call: Call) -> Reply:
    """Say what this is and where its description is."""
    return Reply(Index())


async def check_health(call: Call) -> Reply:
    """Answer while the process lives."""
    return Reply(Health())


async def check_readiness(call: Call) -> Reply:
    """Ask PostgreSQL, the bus and the object store whether they answer."""
    found, status = await readiness(dict(call.gateway.checks))
    return Reply(Readiness.model_validate(found), status)


async def show_bus(call: Call) -> web.Response:
    """Describe the messages on the bus: AsyncAPI 3.0."""
    return web.json_response(asyncapi_document(version("sluice")))


async def show_metrics(call: Call) -> web.Response:
    """Numbers for Prometheus."""
    return web.Response(body=call.gateway.metrics.exposition(), headers={"Content-Type": MEDIA_TYPE})


OPERATIONS = [
    Operation("GET", "/", show_index, {200: Answer("Where to look.", Index)}, auth=Auth.NONE),
    Operation("GET", "/healthz", check_health, {200: Answer("It lives.", Health)}, auth=Auth.NONE),
    Operation(
        "GET",
        "/readyz",
        check_readiness,
        {200: Answer("All answer.", Readiness), 503: Answer("Some are away.", Readiness)},
        auth=Auth.NONE,
    ),
    Operation(
        "GET", "/asyncapi.json", show_bus, {200: Answer("The document.", media_type="application/json")}, auth=Auth.NONE
    ),
    Operation("GET", "/metrics", show_metrics, {200: Answer("Metrics.", media_type="text/plain")}, auth=Auth.NONE),
]
