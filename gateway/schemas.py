"""What the API shows: one pydantic model for each thing, made from the rows."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from gateway.accounts import Account, Token
from gateway.datasets import Dataset, Load
from gateway.files import StoredFile
from gateway.problems import public_error, public_reason
from gateway.task_queries import AuditEntry, Reject
from shared.domain.checkpoint import Checkpoint
from shared.domain.schedule import RunWindow
from shared.domain.task import CLAIMED, Command, Kind, Task, TaskState, allowed_commands


class View(BaseModel):
    model_config = ConfigDict(frozen=True)


class Page(View):
    next_cursor: str | None = Field(description="the cursor of the next page; null on the last one")


# --- accounts


class AccountView(View):
    account_id: int
    username: str
    is_admin: bool
    created_at: datetime

    @classmethod
    def of(cls, account: Account) -> Self:
        return cls(
            account_id=account.account_id,
            username=account.username,
            is_admin=account.is_admin,
            created_at=account.created_at,
        )


class TokenView(View):
    token_id: int
    name: str
    created_at: datetime
    expires_at: datetime

    @classmethod
    def of(cls, token: Token, /, **more: str) -> Self:
        return cls(
            token_id=token.token_id,
            name=token.name,
            created_at=token.created_at,
            expires_at=token.expires_at,
            **more,
        )


class NewTokenView(TokenView):
    token: str = Field(description="shown this once; send it as `Authorization: Bearer …`")


class TokenList(View):
    tokens: list[TokenView]


# --- files


class FileView(View):
    file_id: int
    name: str
    bytes: int
    etag: str
    content_type: str
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, file: StoredFile) -> Self:
        here = f"/v1/files/{file.file_id}"
        return cls(
            file_id=file.file_id,
            name=file.name,
            bytes=file.bytes,
            etag=file.etag,
            content_type=file.content_type,
            created_at=file.created_at,
            links={"self": here, "content": f"{here}/content"},
        )


class FilePage(Page):
    files: list[FileView]


# --- tasks


class ProgressView(View):
    bytes_done: int
    bytes_total: int | None
    rows_done: int
    rows_total: int | None
    rejects: int
    bytes_per_second: float | None = Field(description="over the time that a worker held the task")
    eta_seconds: float | None = Field(description="at that rate, while a worker holds it")

    @classmethod
    def of(cls, task: Task, now: datetime) -> Self:
        seconds = task.running_seconds
        if task.claimed_at is not None:
            seconds += max(0.0, (now - task.claimed_at).total_seconds())
        rate = task.bytes_done / seconds if seconds > 0 and task.bytes_done else None
        eta = None
        if rate and task.bytes_total is not None and task.state in CLAIMED:
            eta = max(0, task.bytes_total - task.bytes_done) / rate
        return cls(
            bytes_done=task.bytes_done,
            bytes_total=task.bytes_total,
            rows_done=task.rows_done,
            rows_total=task.rows_total,
            rejects=task.rejects,
            bytes_per_second=rate,
            eta_seconds=eta,
        )


class CheckpointView(View):
    ranges: list[tuple[int, int]] = Field(description="what is done, as [from, to) in the unit of the kind: bytes, say")
    covered: int = Field(description="the sum of the ranges")

    @classmethod
    def of(cls, stored: dict[str, Any]) -> Self:
        checkpoint = Checkpoint.from_json(stored)
        return cls(ranges=[(done.start, done.end) for done in checkpoint.done], covered=checkpoint.positions)


class TaskView(View):
    task_id: int
    kind: Kind
    state: TaskState
    allowed: list[Command] = Field(description="the commands that the state allows")
    params: dict[str, Any]
    progress: ProgressView
    attempts: int = Field(description="workers that took it since the last committed batch")
    claims: int = Field(description="workers that took it altogether")
    max_bytes_per_second: int | None
    error: dict[str, Any] | None
    result: dict[str, Any] | None
    checkpoint: CheckpointView
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    not_before: datetime | None = Field(description="it waits in the queue until then")
    run_window: RunWindow | None
    resume_at: datetime | None = Field(description="when its schedule, which paused it, will let it go on")
    expires_at: datetime | None = Field(description="when a paused or failed task will be aborted")
    links: dict[str, str]

    @classmethod
    def of(cls, task: Task) -> Self:
        here = f"/v1/tasks/{task.task_id}"
        allowed = allowed_commands(task.state)
        links = {"self": here, "events": f"{here}/events", "rejects": f"{here}/rejects"}
        return cls(
            task_id=task.task_id,
            kind=task.kind,
            state=task.state,
            allowed=allowed,
            params=public_params(task.params),
            progress=ProgressView.of(task, datetime.now(UTC)),
            attempts=task.attempts,
            claims=task.claims,
            max_bytes_per_second=task.max_bytes_per_second,
            error=None if task.error is None else public_error(task.error),
            result=task.result,
            checkpoint=CheckpointView.of(task.checkpoint),
            created_at=task.created_at,
            updated_at=task.updated_at,
            started_at=task.started_at,
            ended_at=task.ended_at,
            not_before=task.not_before,
            run_window=task.run_window,
            resume_at=task.resume_at,
            expires_at=task.expires_at,
            links=links | {command.value: f"{here}/{command}" for command in allowed},
        )


def public_params(params: dict[str, Any]) -> dict[str, Any]:
    """Without the address of the object in the store, which is nobody's business."""
    source = params.get("source")
    if not isinstance(source, dict):
        return params
    return {**params, "source": {name: value for name, value in source.items() if name != "object_key"}}


class TaskPage(Page):
    tasks: list[TaskView]


class CommandView(View):
    task_id: int
    command: Command
    delivery: Literal["answered", "queued"] = Field(
        description="queued: the control service did not answer in time; the command waits in its durable queue"
    )
    state: TaskState
    allowed: list[Command]
    links: dict[str, str]

    @classmethod
    def of(
        cls,
        task_id: int,
        command: Command,
        state: TaskState,
        *,
        delivery: Literal["answered", "queued"],
        allowed: Sequence[Command] | None = None,
    ) -> Self:
        return cls(
            task_id=task_id,
            command=command,
            delivery=delivery,
            state=state,
            allowed=list(allowed if allowed is not None else allowed_commands(state)),
            links={"task": f"/v1/tasks/{task_id}"},
        )


class RejectView(View):
    line: int = Field(description="where the record begins in the file, from 1")
    column: str | None
    reason: str
    raw: str = Field(description="the record as it stands in the file, shortened if it is long")

    @classmethod
    def of(cls, reject: Reject) -> Self:
        return cls(
            line=reject.line,
            column=reject.column_name,
            reason=reject.reason,
            raw=reject.raw,
        )


class RejectPage(Page):
    rejects: list[RejectView]


class AuditView(View):
    event_id: int
    event: str
    from_state: TaskState | None
    to_state: TaskState
    epoch: int
    actor: str
    reason: str | None
    occurred_at: datetime

    @classmethod
    def of(cls, entry: AuditEntry) -> Self:
        return cls(
            event_id=entry.event_id,
            event=entry.event,
            from_state=entry.from_state,
            to_state=entry.to_state,
            epoch=entry.epoch,
            actor=entry.actor,
            # Workers are called name@host, people are not.
            reason=public_reason(entry.reason) if "@" in entry.actor else entry.reason,
            occurred_at=entry.occurred_at,
        )


class AuditPage(Page):
    events: list[AuditView]


# --- datasets


class LoadView(View):
    load_id: int = Field(description="the number of the import that made it")
    rows: int
    rejects: int
    bytes: int
    file_id: int | None
    file_name: str | None
    attached_at: datetime

    @classmethod
    def of(cls, load: Load) -> Self:
        return cls(
            load_id=load.load_id,
            rows=load.rows,
            rejects=load.rejects,
            bytes=load.bytes,
            file_id=load.file_id,
            file_name=load.file_name,
            attached_at=load.attached_at,
        )


class DatasetView(View):
    name: str
    sql_table: str = Field(description="what to write after FROM")
    columns: list[dict[str, Any]]
    rows: int
    loads: int
    bytes: int
    created_at: datetime
    updated_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, dataset: Dataset, **more: Any) -> Self:
        here = f"/v1/datasets/{quote(dataset.name)}"
        return cls(
            name=dataset.name,
            sql_table=dataset.sql_table,
            columns=dataset.columns,
            rows=dataset.rows,
            loads=dataset.loads,
            bytes=dataset.bytes,
            created_at=dataset.created_at,
            updated_at=dataset.updated_at,
            links={"self": here, "rows": f"{here}/rows"},
            **more,
        )


class DatasetDetail(DatasetView):
    load_list: list[LoadView] = Field(description="newest first, 1000 at most")


class DatasetPage(Page):
    datasets: list[DatasetView]


class RowList(View):
    """Each row is an object with the dataset's columns, as PostgreSQL writes it in JSON."""

    columns: list[dict[str, Any]]
    rows: list[dict[str, Any]]


# --- process


class Health(View):
    status: Literal["ok"] = "ok"


class Readiness(View):
    status: Literal["ready", "unavailable"]
    checks: dict[str, str] = Field(description="by server: ready, or what is wrong")


class Index(View):
    name: str = "Sluice"
    openapi: str = "/openapi.json"
    health: str = "/healthz"
    ready: str = "/readyz"
