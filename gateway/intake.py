"""How each kind of task is taken in: its request is checked against what is there, and becomes a new task."""

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, RootModel

from gateway.file_names import check_file_name
from gateway.files import StoredFile
from shared.domain.errors import Conflict, NotFound
from shared.domain.export_params import ExportRequest
from shared.domain.import_params import ImportParams, ImportRequest, Mode, SourceFile
from shared.domain.task import AccountId, Kind
from shared.domain.task_options import TaskOptions
from shared.ports.tasks import NewTask

if TYPE_CHECKING:
    from gateway.context import Gateway


class TaskRequest(RootModel[Annotated[ImportRequest | ExportRequest, Field(discriminator="kind")]]):
    """What POST /v1/tasks takes: one of the kinds."""


Intake = Callable[["Gateway", AccountId, Any], Awaitable[NewTask]]


async def take_import(gateway: "Gateway", account_id: AccountId, request: ImportRequest) -> NewTask:
    """Pin the file as it is now. Raises NotFound for the file or the dataset, and Conflict for the dataset."""
    file = await _file(gateway, account_id, request)
    exists = await gateway.datasets.exists(account_id, request.dataset)
    if request.mode is Mode.CREATE and exists:
        raise Conflict(
            f"the dataset {request.dataset} exists already; use mode append or replace, or another name",
            dataset=request.dataset,
        )
    if request.mode is Mode.APPEND and not exists:
        raise NotFound(f"there is no dataset {request.dataset} to append to; use mode create", dataset=request.dataset)
    source = SourceFile(
        file_id=file.file_id, name=file.name, object_key=file.object_key, etag=file.etag, bytes=file.bytes
    )
    return NewTask(
        account_id=account_id,
        kind=Kind.IMPORT,
        params=ImportParams.of(request, source).model_dump(mode="json"),
        bytes_total=file.bytes,
    )


async def _file(gateway: "Gateway", account_id: AccountId, request: ImportRequest) -> StoredFile:
    if request.file_id is not None:
        file = await gateway.files.get(account_id, request.file_id)
        missing = NotFound(f"there is no file {request.file_id}", file_id=request.file_id)
    else:
        assert request.file_name is not None
        file = await gateway.files.named(account_id, request.file_name)
        missing = NotFound(f"there is no file named {request.file_name!r}", file_name=request.file_name)
    if file is None:
        raise missing
    return file


async def take_export(gateway: "Gateway", account_id: AccountId, request: ExportRequest) -> NewTask:
    """Check it against the dataset and the files as they are now.

    Raises NotFound, InvalidRequest that names every fault, and Conflict when the file is there and must stay.
    """
    dataset = await gateway.datasets.get(account_id, request.dataset)
    request.check({column["name"]: column["type"] for column in dataset.columns})
    if request.load_id is not None and not await gateway.datasets.has_load(dataset, request.load_id):
        raise NotFound(f"the dataset {request.dataset!r} has no load {request.load_id}", load_id=request.load_id)
    if request.file_name is not None:
        name = check_file_name(request.file_name, where="body")
        if not request.overwrite and await gateway.files.named(account_id, name) is not None:
            raise Conflict(f"there is a file {name!r} already; use overwrite, or another name", file_name=name)
    return NewTask(
        account_id=account_id,
        kind=Kind.EXPORT,
        params=request.model_dump(mode="json", exclude=set(TaskOptions.model_fields)),
    )


INTAKES: dict[str, Intake] = {
    Kind.IMPORT: take_import,
    Kind.EXPORT: take_export,
}
