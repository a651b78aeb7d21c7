"""What the import asks of a file format, which formats there are, and how a file without a name for one is told."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol

from shared.domain.errors import InvalidData
from shared.domain.import_params import FileFormat, ImportParams
from upload_worker.loading import Piece
from upload_worker.plan import FilePlan
from upload_worker.sniffing import MAGIC_BYTES, guess_compression, read_head
from upload_worker.sources import RangeReader, open_source

_HEAD_BYTES = 64 << 10
_PARQUET = b"PAR1"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class OpenFile(Protocol):
    """A file whose plan is made: its records in pieces, readable from any position where a piece ended."""

    @property
    def plan(self) -> FilePlan: ...

    @property
    def start(self) -> int:
        """The first position."""

    @property
    def end(self) -> int | None:
        """The position after the last record, None while unknown."""

    @property
    def first_line(self) -> int:
        """The number of the line at `start`."""

    @property
    def bytes_total(self) -> int | None: ...

    @property
    def rows_total(self) -> int | None:
        """How many records there are, or probably are."""

    @property
    def copy_options(self) -> Mapping[str, Any]:
        """COPY's options for the data of the pieces."""

    def pieces(self, start: int, end: int | None, line: int) -> AsyncGenerator[Piece, None]:
        """The records from `start`, which is on line `line`, up to `end`.

        Raises InvalidData when the file is broken there.
        """
        ...

    def bytes_of(self, piece: Piece) -> int:
        """What the piece adds to the bytes done."""

    def expected_bytes(self, piece: Piece) -> int | None:
        """What the bytes in total will probably be, where that only shows while reading; None otherwise."""

    def cursor(self, position: int) -> dict[str, Any] | None:
        """What helps a later worker to go on from `position`; None for nothing new."""


class Format(Protocol):
    """How files of one format are looked at and opened."""

    async def look(self, reader: RangeReader, size: int, params: ImportParams) -> FilePlan:
        """The plan for an object of `size` stored bytes.

        Raises InvalidData for a file that is not of this format, that holds nothing, or that `params` do not fit.
        """
        ...

    def restore(self, plan: Mapping[str, Any]) -> FilePlan:
        """The plan from the JSON that was stored."""
        ...

    def open(
        self, reader: RangeReader, size: int, plan: FilePlan, cursor: Mapping[str, Any], batch_bytes: int
    ) -> OpenFile: ...


def format_of(name: FileFormat) -> Format:
    """The format of that name; its libraries are loaded when it is first asked for."""
    match name:
        case FileFormat.CSV:
            from upload_worker.csv_file import CsvFormat

            return CsvFormat()
        case FileFormat.JSONL:
            from upload_worker.jsonl_file import JsonlFormat

            return JsonlFormat()
        case FileFormat.PARQUET:
            from upload_worker.parquet_file import ParquetFormat

            return ParquetFormat()


async def guess_format(reader: RangeReader, size: int) -> FileFormat:
    """By the first bytes, never by the name. Raises InvalidData for what is certainly none of them."""
    magic = await read_head(reader(0, min(size, MAGIC_BYTES)), MAGIC_BYTES)
    if magic.startswith(_PARQUET):
        return FileFormat.PARQUET
    source = open_source(reader, size, guess_compression(magic))
    head = (await read_head(source.read(0, _HEAD_BYTES), _HEAD_BYTES)).removeprefix(_BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"[") and head[1:].lstrip().startswith(b"{"):
        raise InvalidData(
            "The file is one JSON array. Write one JSON object a line, as `jq -c .[]` does, and upload it again."
        )
    return FileFormat.JSONL if head.startswith(b"{") else FileFormat.CSV
