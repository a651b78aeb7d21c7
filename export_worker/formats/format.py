"""What a file format is to an export: how PostgreSQL is asked for rows, and how its answer becomes the file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Copy:
    """`COPY (query) TO STDOUT` with PostgreSQL's options."""

    query: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Bytes of the file; `detail` (JSON) is kept for `Format.tail`, however often the worker dies in between."""

    data: bytes
    detail: Any = None


class Format(Protocol):
    """The file is the head, the encoded answers for all ranges of rows in order, and the tail.

    Each is made apart from the others and may be made again: the same rows must give the same bytes.
    """

    @property
    def content_type(self) -> str: ...

    def head(self) -> Copy | Encoded:
        """What the file begins with: this, or what the server answers, encoded."""
        ...

    def rows(self, source: str) -> Copy:
        """How to ask for the rows of `source`, which is everything from FROM on."""
        ...

    async def encode(self, answer: bytes) -> Encoded:
        """What a range's answer is in the file; heavy work belongs into a thread."""
        ...

    async def tail(self, details: Sequence[Any]) -> bytes:
        """What closes the file, given the details of all that is in it, in order."""
        ...
