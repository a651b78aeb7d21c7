"""Datasets: what is in them, a first look, and taking loads or all of it away."""

import re

import orjson
from aiohttp import web
from pydantic import Field

from gateway import paging
from gateway.datasets import Dataset, StreamForm
from gateway.file_names import attachment
from gateway.operations import Answer, Call, Operation, Query, Reply
from gateway.schemas import DatasetDetail, DatasetPage, DatasetView, LoadView, RowList
from shared.domain.errors import Conflict, LockTimeout, NotFound, StatementTimeout, TooLarge
from shared.domain.import_params import DATASET_PATTERN
from shared.domain.task import BIGINT_MAX, LoadId


class RowQuery(Query):
    limit: int = Field(default=100, ge=1, le=1000)
    load: int | None = Field(default=None, ge=1, le=BIGINT_MAX, description="only rows of this load")


class StreamQuery(Query):
    format: StreamForm = "csv"


_MEDIA_TYPES: dict[StreamForm, str] = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}


async def list_datasets(call: Call, query: paging.PageQuery) -> Reply:
    """List datasets, newest first."""
    found = await call.gateway.datasets.page(call.account.account_id, before=query.position, limit=query.limit + 1)
    datasets, more = paging.split(found, query.limit)
    cursor = paging.encode_cursor(datasets[-1].dataset_id) if more else None
    page = DatasetPage(datasets=[DatasetView.of(dataset) for dataset in datasets], next_cursor=cursor)
    return Reply(page, headers=paging.link_header(call.request, cursor))


async def show_dataset(call: Call) -> Reply:
    """Show a dataset and its loads."""
    dataset = await _dataset(call)
    loads = await call.gateway.datasets.loads(dataset)
    return Reply(DatasetDetail.of(dataset, load_list=[LoadView.of(load) for load in loads]))


async def show_rows(call: Call, query: RowQuery) -> web.Response:
    """Show some rows, in no particular order; fewer than `limit` if they are long."""
    dataset = await _dataset(call)
    rows = await call.gateway.datasets.preview(dataset, load_id=query.load, limit=query.limit)
    # Fragments, because decoding would round numbers that are longer than a double.
    document = {"columns": dataset.columns, "rows": [orjson.Fragment(row) for row in rows]}
    return web.Response(body=orjson.dumps(document), content_type="application/json")


async def stream_dataset(call: Call, query: StreamQuery) -> web.StreamResponse:
    """Stream a small dataset at once, without a task: 100,000 rows and half a minute at most.

    Beyond that the answer is 413: make an export task. A stream that breaks off in the middle ends without its last
    chunk, so that nobody takes a part for the whole.
    """
    dataset = await _dataset(call)
    response = web.StreamResponse(headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
    response.headers["Content-Type"] = _MEDIA_TYPES[query.format]
    response.headers["Content-Disposition"] = attachment(f"{dataset.name}.{query.format}")

    async def send(piece: bytes) -> None:
        if not response.prepared:
            await response.prepare(call.request)
        await response.write(piece)
        call.gateway.metrics.sent(len(piece))

    await call.gateway.datasets.stream(dataset, query.format, send)
    if not response.prepared:
        await response.prepare(call.request)
    await response.write_eof()
    return response


async def drop_dataset(call: Call) -> Reply:
    """Drop a dataset with all its loads."""
    dataset = await _dataset(call)
    await call.gateway.catalog.drop(call.account.account_id, dataset.name)
    return Reply(status=204)


async def revert_load(call: Call) -> Reply:
    """Take one load out of a dataset, as if it had never been imported."""
    load_id = LoadId(call.id("load"))
    dataset = await _dataset(call)
    await call.gateway.catalog.revert(call.account.account_id, dataset.name, load_id)
    return Reply(status=204)


async def _dataset(call: Call) -> Dataset:
    name = call.request.match_info["dataset"]
    if not re.fullmatch(DATASET_PATTERN, name):
        raise NotFound(f"there is no dataset {name}")
    return await call.gateway.datasets.get(call.account.account_id, name)


OPERATIONS = [
    Operation("GET", "/v1/datasets", list_datasets, {200: Answer("A page.", DatasetPage, headers=["Link"])}),
    Operation(
        "GET",
        "/v1/datasets/{dataset}",
        show_dataset,
        {200: Answer("The dataset.", DatasetDetail)},
        problems=[NotFound],
    ),
    Operation(
        "GET",
        "/v1/datasets/{dataset}/rows",
        show_rows,
        {200: Answer("The rows.", RowList)},
        problems=[NotFound, StatementTimeout],
    ),
    Operation(
        "GET",
        "/v1/datasets/{dataset}/export",
        stream_dataset,
        {200: Answer("All rows.", media_type="*/*", headers=["Content-Disposition"])},
        problems=[NotFound, TooLarge, StatementTimeout],
    ),
    Operation(
        "DELETE",
        "/v1/datasets/{dataset}",
        drop_dataset,
        {204: Answer("It is dropped.")},
        problems=[NotFound, Conflict, LockTimeout],
    ),
    Operation(
        "DELETE",
        "/v1/datasets/{dataset}/loads/{load}",
        revert_load,
        {204: Answer("It is reverted.")},
        problems=[NotFound, Conflict, LockTimeout],
    ),
]
