"""Files: bytes in, bytes out, and what is there."""

import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from urllib.parse import unquote

from aiohttp import web
from pydantic import Field

from gateway import bodies, paging
from gateway.file_names import attachment, check_file_name
from gateway.files import FileFilter, StoredFile, no_check
from gateway.operations import Answer, Call, Operation, Query, Reply, created, refuse_content_encoding
from gateway.problems import Malformed, UnsupportedMediaType
from gateway.ranges import Part, check_write, is_unmodified, wanted_part
from gateway.schemas import FilePage, FileView
from shared.domain.errors import (
    NotFound,
    ObjectMissing,
    PreconditionFailed,
    RangeNotSatisfiable,
    SourceChanged,
    StoreUnavailable,
    TooLarge,
    TooSlow,
)
from shared.domain.schedule import Moment
from shared.domain.task import BIGINT_MAX

LINK_SECONDS = 300
_MEDIA_TYPE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+/[!#$%&'*+.^_`|~0-9A-Za-z-]+(?:[ \t]*;[\x20-\x7e]*)?")


class FileQuery(paging.PageQuery):
    prefix: str | None = Field(default=None, max_length=1024, description="the name begins so")
    contains: str | None = Field(default=None, max_length=1024, description="the name has it somewhere")
    created_from: Moment | None = Field(default=None, description="not older")
    created_to: Moment | None = Field(default=None, description="older")
    min_bytes: int | None = Field(default=None, ge=0, le=BIGINT_MAX)
    max_bytes: int | None = Field(default=None, ge=0, le=BIGINT_MAX)


class ContentQuery(Query):
    redirect: bool = Field(
        default=False, description=f"answer with a link into the object store, good for {LINK_SECONDS} seconds"
    )


async def put_file(call: Call) -> Reply:
    """Store the body as a file. One of the same name is replaced, once all of the new one has arrived.

    `If-None-Match: *` keeps what is there, and `If-Match` replaces that one only; they are looked at both before the
    body is taken and when it has arrived.
    """
    request, gateway = call.request, call.gateway
    name = check_file_name(_name_in_path(request))
    refuse_content_encoding(request)
    if "Content-Range" in request.headers:
        raise Malformed(
            "a part of a file cannot be put (RFC 9110, section 14.5); send all of it, without Content-Range"
        )
    is_conditional = "If-Match" in request.headers or "If-None-Match" in request.headers
    check = partial(check_write, request.headers) if is_conditional else no_check
    body = bodies.chunks(
        request, max_bytes=gateway.settings.max_file_bytes, idle_seconds=gateway.settings.body_idle_seconds
    )
    file, replaced = await gateway.uploads.receive(
        call.account.account_id, name, _media_type(request), _counted(call, body), check
    )
    reply = created(f"/v1/files/{file.file_id}", FileView.of(file))
    return Reply(reply.body, 200 if replaced else 201, {**reply.headers, "ETag": f'"{file.etag}"'})


async def list_files(call: Call, query: FileQuery) -> Reply:
    """List files, newest first."""
    wanted = FileFilter(
        query.prefix, query.contains, query.created_from, query.created_to, query.min_bytes, query.max_bytes
    )
    found = await call.gateway.files.page(call.account.account_id, wanted, before=query.position, limit=query.limit + 1)
    files, more = paging.split(found, query.limit)
    cursor = paging.encode_cursor(files[-1].file_id) if more else None
    page = FilePage(files=[FileView.of(file) for file in files], next_cursor=cursor)
    return Reply(page, headers=paging.link_header(call.request, cursor))


async def show_file(call: Call) -> Reply:
    """Show what is known of a file."""
    return Reply(FileView.of(await _file(call)))


async def delete_file(call: Call) -> Reply:
    """Delete a file."""
    file_id = call.id("file")
    check = partial(check_write, call.request.headers)
    if not await call.gateway.files.delete(call.account.account_id, file_id, check):
        raise NotFound(f"there is no file {file_id}")
    return Reply(status=204)


async def download_file(call: Call, query: ContentQuery) -> web.StreamResponse:
    """Download a file, or one range of it."""
    file = await _file(call)
    headers = call.request.headers
    there = file.representation
    common = {"ETag": there.quoted_etag, "Last-Modified": there.last_modified, "Cache-Control": "private, no-cache"}
    if is_unmodified(headers, there):
        return web.Response(status=304, headers=common)
    if query.redirect and call.request.method == "GET":
        link = call.gateway.objects.presign_get(file.object_key, LINK_SECONDS, filename=file.name.rpartition("/")[2])
        return web.Response(status=307, headers={"Location": link, "Cache-Control": "no-store"})
    # HEAD has no ranges (RFC 9110, section 14.2).
    part = wanted_part(headers, there) if call.request.method == "GET" else None
    response = web.StreamResponse(status=200 if part is None else 206, headers=common)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Content-Type"] = file.content_type
    response.headers["Content-Disposition"] = attachment(file.name)
    # Whatever a user has stored must never run as a page of this origin.
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Content-Security-Policy"] = "sandbox"
    if part is not None:
        response.headers["Content-Range"] = f"bytes {part.start}-{part.end - 1}/{file.bytes}"
    part = part or Part(0, file.bytes)
    response.content_length = part.end - part.start
    if call.request.method == "GET":
        await _send(call, file, part, response)
    return response


async def _send(call: Call, file: StoredFile, part: Part, response: web.StreamResponse) -> None:
    content = call.gateway.objects.read(file.object_key, etag=file.etag, start=part.start, end=part.end)
    async with aclosing(content) as chunks:
        try:
            chunk = await anext(chunks, b"")  # before the head goes out: the store may be away
        except (ObjectMissing, SourceChanged) as error:
            raise StoreUnavailable("the bytes of this file are not in the object store any more") from error
        await response.prepare(call.request)
        while chunk:
            await response.write(chunk)
            call.gateway.metrics.sent(len(chunk))
            chunk = await anext(chunks, b"")
    await response.write_eof()


async def _file(call: Call) -> StoredFile:
    file_id = call.id("file")
    file = await call.gateway.files.get(call.account.account_id, file_id)
    if file is None:
        raise NotFound(f"there is no file {file_id}")
    return file


async def _counted(call: Call, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for chunk in body:
        call.gateway.metrics.received(len(chunk))
        yield chunk


def _name_in_path(request: web.Request) -> str:
    # From the raw path: the router's own decoding lets what is no UTF-8 pass as it is.
    raw = request.rel_url.raw_path.split("/", 3)[3]
    try:
        return unquote(raw, errors="strict")
    except UnicodeDecodeError as error:
        raise Malformed("the file name in the address is not UTF-8; percent-encode its UTF-8 bytes") from error


def _media_type(request: web.Request) -> str:
    given = request.headers.get("Content-Type")
    if given is None:
        return "application/octet-stream"
    if len(given) > 255 or not _MEDIA_TYPE.fullmatch(given):
        raise UnsupportedMediaType("the Content-Type is not a media type such as text/csv")
    return given


_CONTENT = Answer("All of it.", media_type="*/*", headers=["ETag", "Last-Modified", "Content-Disposition"])
_CONTENT_ANSWERS = {
    200: _CONTENT,
    206: Answer("The range.", media_type="*/*", headers=["ETag", "Content-Range"]),
    304: Answer("The client's copy is still good."),
}
_CONTENT_PROBLEMS = [NotFound, PreconditionFailed]
_IF_MATCH = "only if the file that is there has one of these ETags"

OPERATIONS = [
    Operation(
        "PUT",
        "/v1/files/{file}",
        put_file,
        {
            201: Answer("A new file.", FileView, headers=["Location", "ETag"]),
            200: Answer("The file of that name was replaced.", FileView, headers=["Location", "ETag"]),
        },
        problems=[Malformed, PreconditionFailed, StoreUnavailable, TooLarge, TooSlow, UnsupportedMediaType],
        request_headers={"If-Match": _IF_MATCH, "If-None-Match": "`*`: only if there is no file of that name"},
        streams_body=True,
        tail="file",
    ),
    Operation("GET", "/v1/files", list_files, {200: Answer("A page.", FilePage, headers=["Link"])}),
    Operation("GET", "/v1/files/{file}", show_file, {200: Answer("The file.", FileView)}, problems=[NotFound]),
    Operation(
        "DELETE",
        "/v1/files/{file}",
        delete_file,
        {204: Answer("It is deleted.")},
        problems=[NotFound, PreconditionFailed],
        request_headers={"If-Match": _IF_MATCH},
    ),
    Operation(
        "GET",
        "/v1/files/{file}/content",
        download_file,
        {**_CONTENT_ANSWERS, 307: Answer("A link into the object store.", headers=["Location"])},
        problems=[*_CONTENT_PROBLEMS, RangeNotSatisfiable, StoreUnavailable],
    ),
    Operation(
        "HEAD",
        "/v1/files/{file}/content",
        download_file,
        {status: answer for status, answer in _CONTENT_ANSWERS.items() if status != 206},
        problems=_CONTENT_PROBLEMS,
    ),
]
