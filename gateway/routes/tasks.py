"""Tasks: made, watched, commanded."""

import hashlib
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Literal

from aiohttp import web
from pydantic import AfterValidator, Field

from gateway import paging
from gateway.intake import INTAKES, TaskRequest
from gateway.operations import Answer, Body, Call, Handler, Operation, Query, Reply, created
from gateway.reject_csv import reject_csv
from gateway.routes.accounts import printable
from gateway.schemas import AuditPage, AuditView, CommandView, RejectPage, RejectView, TaskPage, TaskView
from gateway.task_queries import TaskFilter
from shared.domain.errors import (
    BusUnavailable,
    CommandRefused,
    Conflict,
    InvalidRequest,
    NotFound,
)
from shared.domain.messages import CONTROL_COMMANDS
from shared.domain.schedule import Moment
from shared.domain.task import SETTLED, Command, Kind, Task, TaskId, TaskState

MAX_WAIT_SECONDS = 60
MAX_KEY_LENGTH = 255


class TaskQuery(paging.PageQuery):
    state: list[TaskState] | None = Field(default=None, description="one of these; may be given several times")
    kind: Kind | None = None
    created_from: Moment | None = Field(default=None, description="not older")
    created_to: Moment | None = Field(default=None, description="older")


class WaitQuery(Query):
    wait: float = Field(default=0, ge=0, le=MAX_WAIT_SECONDS, description="seconds to wait for `until`")
    until: Literal["settled", "change"] = Field(
        default="settled", description="settled: paused or ended; change: in another state than when asked"
    )


class RejectQuery(paging.PageQuery):
    format: Literal["json", "csv"] | None = Field(
        default=None, description="csv: all of them as a download; else what Accept asks for"
    )


class Because(Body):
    reason: Annotated[str, AfterValidator(printable)] | None = Field(default=None, max_length=1000)


async def create_task(call: Call, body: TaskRequest) -> Reply:
    """Make a task. It waits in the queue until a worker has room.

    With an `Idempotency-Key` header a repeated request answers with the task that the first one made.
    """
    gateway, account, wanted = call.gateway, call.account, body.root
    key = _idempotency_key(call.request)
    request_hash = hashlib.sha256(body.model_dump_json(exclude_unset=True).encode()).digest()
    # Before the checks: a repeat must find its task even if the file is gone by now, or the dataset there.
    task = await gateway.task_queries.made_before(account.account_id, key, request_hash)
    is_new = False
    if task is None:
        new = await INTAKES[wanted.kind](gateway, account.account_id, wanted)
        new = replace(
            new,
            max_bytes_per_second=wanted.max_bytes_per_second,
            not_before=wanted.not_before,
            run_window=wanted.run_window,
            idempotency_key=key,
            request_hash=request_hash,
        )
        task, is_new = await gateway.tasks.create(new, actor=account.username)
    reply = created(f"/v1/tasks/{task.task_id}", TaskView.of(task))
    return replace(reply, status=202 if is_new else 200)


async def list_tasks(call: Call, query: TaskQuery) -> Reply:
    """List tasks, newest first."""
    wanted = TaskFilter(query.state, query.kind, query.created_from, query.created_to)
    found = await call.gateway.task_queries.page(
        call.account.account_id, wanted, before=query.position, limit=query.limit + 1
    )
    tasks, more = paging.split(found, query.limit)
    cursor = paging.encode_cursor(tasks[-1].task_id) if more else None
    page = TaskPage(tasks=[TaskView.of(task) for task in tasks], next_cursor=cursor)
    return Reply(page, headers=paging.link_header(call.request, cursor))


async def show_task(call: Call, query: WaitQuery) -> Reply:
    """Show a task, now or as soon as it has settled or moved."""
    task = await _task(call)
    before = task.state

    def done(now: Task) -> bool:
        return now.state in SETTLED if query.until == "settled" else now.state is not before

    def given_up() -> bool:
        return call.request.transport is None

    if query.wait and not done(task):
        seen = await call.gateway.watch.wait(
            task.task_id, call.account.account_id, seconds=query.wait, done=done, given_up=given_up
        )
        task = seen or task
    return Reply(TaskView.of(task))


async def pause_task(call: Call, body: Because | None = None) -> Reply:
    """Pause a task at its next batch boundary. It then holds nothing, for as long as you like."""
    return await _command(call, Command.PAUSE, body)


async def resume_task(call: Call, body: Because | None = None) -> Reply:
    """Let a paused or failed task go on from its checkpoint."""
    return await _command(call, Command.RESUME, body)


async def abort_task(call: Call, body: Because | None = None) -> Reply:
    """Abort a task and undo all that it did."""
    return await _command(call, Command.ABORT, body)


async def _command(call: Call, command: Command, body: Because | None) -> Reply:
    """Ask the control service; its answer is the answer."""
    task = await _task(call)
    message = CONTROL_COMMANDS[command](
        task_id=task.task_id,
        account_id=call.account.account_id,
        actor=call.account.username,
        reason=body.reason if body else None,
    )
    reply = await call.gateway.control.ask(message, timeout_seconds=call.gateway.settings.command_reply_seconds)
    if reply is None:
        return Reply(CommandView.of(task.task_id, command, task.state, delivery="queued"), 202)
    if reply.state is None:
        raise _no_task(task.task_id)
    if reply.status == CommandRefused.status:
        raise CommandRefused(
            f"a task that is {reply.state} cannot be told to {command}",
            state=reply.state,
            allowed=reply.allowed,
        )
    view = CommandView.of(task.task_id, command, reply.state, delivery="answered", allowed=reply.allowed)
    return Reply(view, reply.status)


async def list_rejects(call: Call, query: RejectQuery) -> Reply | web.StreamResponse:
    """List the records that an import skipped, in the order of the file; or download them all as CSV."""
    task = await _task(call)
    if query.format == "csv" or (query.format is None and _prefers_csv(call.request)):
        return await _send_csv(call, task.task_id)
    rejects, more = await call.gateway.task_queries.rejects(task.task_id, after=query.position, limit=query.limit)
    cursor = paging.encode_cursor(rejects[-1].line) if more else None
    page = RejectPage(rejects=[RejectView.of(reject) for reject in rejects], next_cursor=cursor)
    return Reply(page, headers=paging.link_header(call.request, cursor) | {"Vary": "Accept"})


async def list_events(call: Call, query: paging.PageQuery) -> Reply:
    """List what happened to a task: when, by whom and why; oldest first."""
    task = await _task(call)
    found = await call.gateway.task_queries.audit(task.task_id, after=query.position, limit=query.limit + 1)
    events, more = paging.split(found, query.limit)
    cursor = paging.encode_cursor(events[-1].event_id) if more else None
    page = AuditPage(events=[AuditView.of(entry) for entry in events], next_cursor=cursor)
    return Reply(page, headers=paging.link_header(call.request, cursor))


async def _send_csv(call: Call, task_id: TaskId) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/csv; charset=utf-8; header=present",
            "Content-Disposition": f'attachment; filename="rejects-{task_id}.csv"',
            "X-Content-Type-Options": "nosniff",
            "Vary": "Accept",
        }
    )
    async with aclosing(reject_csv(call.gateway.task_queries, task_id)) as lines:
        await response.prepare(call.request)
        async for piece in lines:
            await response.write(piece)
    await response.write_eof()
    return response


async def _task(call: Call) -> Task:
    task_id = TaskId(call.id("task"))
    task = await call.gateway.tasks.get(task_id, call.account.account_id)
    if task is None:
        raise _no_task(task_id)
    return task


def _no_task(task_id: int) -> NotFound:
    return NotFound(f"there is no task {task_id}")


def _prefers_csv(request: web.Request) -> bool:
    accepted = [part.partition(";")[0].strip().lower() for part in request.headers.get("Accept", "").split(",")]
    return "text/csv" in accepted and "application/json" not in accepted


def _idempotency_key(request: web.Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (1 <= len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"the Idempotency-Key must be 1 to {MAX_KEY_LENGTH} printable ASCII characters",
            errors=[{"in": "header", "field": "Idempotency-Key", "fault": "not 1 to 255 printable ASCII characters"}],
        )
    return key


def _command_operation(command: Command, handler: Handler) -> Operation:
    return Operation(
        "POST",
        f"/v1/tasks/{{task}}/{command}",
        handler,
        {
            200: Answer("Done, or fulfilled already.", CommandView),
            202: Answer("On its way; or, with delivery queued, waiting for the control service.", CommandView),
        },
        problems=[NotFound, CommandRefused, InvalidRequest, BusUnavailable],
    )


OPERATIONS = [
    Operation(
        "POST",
        "/v1/tasks",
        create_task,
        {
            202: Answer("A new task.", TaskView, headers=["Location"]),
            200: Answer("The task that this Idempotency-Key made before.", TaskView, headers=["Location"]),
        },
        problems=[NotFound, Conflict],
        request_headers={"Idempotency-Key": "the same key with the same body makes one task, however often it is sent"},
    ),
    Operation("GET", "/v1/tasks", list_tasks, {200: Answer("A page.", TaskPage, headers=["Link"])}),
    Operation("GET", "/v1/tasks/{task}", show_task, {200: Answer("The task.", TaskView)}, problems=[NotFound]),
    _command_operation(Command.PAUSE, pause_task),
    _command_operation(Command.RESUME, resume_task),
    _command_operation(Command.ABORT, abort_task),
    Operation(
        "GET",
        "/v1/tasks/{task}/rejects",
        list_rejects,
        {200: Answer("A page, or all of them.", RejectPage, "text/csv", headers=["Link"])},
        problems=[NotFound],
    ),
    Operation(
        "GET",
        "/v1/tasks/{task}/events",
        list_events,
        {200: Answer("A page.", AuditPage, headers=["Link"])},
        problems=[NotFound],
    ),
]
