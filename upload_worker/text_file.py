"""What the text formats share: positions are byte offsets of the uncompressed object, plain or gzip."""

import base64
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from shared.domain.csv_options import Compression
from upload_worker.loading import Piece
from upload_worker.plan import Column
from upload_worker.sources import GzipSource, RangeReader, open_source


class TextPlan(Protocol):
    @property
    def columns(self) -> list[Column]: ...
    @property
    def compression(self) -> Compression: ...
    @property
    def data_start(self) -> int: ...
    @property
    def record_bytes(self) -> float: ...


P = TypeVar("P", bound=TextPlan)


class TextFile(Generic[P]):
    """The positions, totals and seek points of an `OpenFile`."""

    def __init__(self, reader: RangeReader, size: int, plan: P, cursor: Mapping[str, Any], batch_bytes: int) -> None:
        state = cursor.get("seek_point")
        self.plan = plan
        self.start = plan.data_start
        self._source = open_source(reader, size, plan.compression, base64.b85decode(state) if state else None)
        self._stored_bytes = size
        self._batch_bytes = batch_bytes

    @property
    def end(self) -> int | None:
        return self._source.size

    @property
    def bytes_total(self) -> int | None:
        return None if self.end is None else self.end - self.start

    @property
    def rows_total(self) -> int | None:
        if self.bytes_total is None or not self.plan.record_bytes:
            return None
        return int(self.bytes_total / self.plan.record_bytes)

    def bytes_of(self, piece: Piece) -> int:
        return piece.end - piece.start

    def expected_bytes(self, piece: Piece) -> int | None:
        """The uncompressed size, as far as the part that was read lets one guess it."""
        if not isinstance(self._source, GzipSource) or not self._source.compressed_position:
            return None
        return max(piece.end, round(piece.end * self._stored_bytes / self._source.compressed_position))

    def cursor(self, position: int) -> dict[str, Any] | None:
        if not isinstance(self._source, GzipSource):
            return None
        state = self._source.resume_state(position)
        return {"seek_point": base64.b85encode(state).decode()} if state else None
