"""JSON Lines: one object a row, as PostgreSQL writes it; numbers keep every digit."""

from collections.abc import Sequence
from typing import Any

from export_worker.formats.format import Copy, Encoded
from shared.adapters.catalog import Column
from shared.adapters.postgres import quoted

# JSON escapes all control characters. With these as marks COPY finds nothing to quote, and sends each text as it is.
_AS_IT_IS = {"format": "csv", "delimiter": "\x02", "quote": "\x01"}


class JsonLines:
    """The `Format` JSON Lines."""

    content_type = "application/x-ndjson"

    def __init__(self, columns: Sequence[Column]) -> None:
        self._select = ", ".join(quoted(column.name) for column in columns)

    def head(self) -> Encoded:
        return Encoded(b"")

    def rows(self, source: str) -> Copy:
        # r alone could be a column.
        return Copy(f"SELECT row_to_json(r.*)::text FROM (SELECT {self._select} {source}) r", _AS_IT_IS)  # noqa: S608 - made of quoted names

    async def encode(self, answer: bytes) -> Encoded:
        return Encoded(answer)

    async def tail(self, details: Sequence[Any]) -> bytes:
        return b""
