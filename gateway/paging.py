"""Pages by cursor: each page says where the next one begins, however the list changes meanwhile."""

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, TypeVar

from aiohttp import web
from pydantic import AfterValidator, Field

from gateway.operations import Query
from shared.domain.task import BIGINT_MAX

T = TypeVar("T")

MAX_LIMIT = 1000


def encode_cursor(position: int) -> str:
    return base64.urlsafe_b64encode(str(position).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> int:
    """Raises ValueError."""
    try:
        position = int(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (binascii.Error, ValueError) as error:
        raise ValueError("not a cursor that a page gave out") from error
    if not 0 <= position <= BIGINT_MAX or encode_cursor(position) != cursor:
        raise ValueError("not a cursor that a page gave out")
    return position


def _valid(cursor: str) -> str:
    decode_cursor(cursor)
    return cursor


class PageQuery(Query):
    """`limit` and `cursor`, which all lists have."""

    limit: int = Field(default=100, ge=1, le=MAX_LIMIT, description="most items on a page")
    cursor: Annotated[str, AfterValidator(_valid)] | None = Field(
        default=None, max_length=40, description="where the page begins: next_cursor of the page before"
    )

    @property
    def position(self) -> int | None:
        return None if self.cursor is None else decode_cursor(self.cursor)


def split(found: Sequence[T], limit: int) -> tuple[Sequence[T], bool]:
    """The page and whether there are more, of what a query with `limit + 1` found."""
    return found[:limit], len(found) > limit


def link_header(request: web.Request, next_cursor: str | None) -> dict[str, str]:
    """`Link: <…>; rel="next"` (RFC 8288), if there is a next page."""
    if next_cursor is None:
        return {}
    return {"Link": f'<{request.rel_url.update_query(cursor=next_cursor)}>; rel="next"'}
