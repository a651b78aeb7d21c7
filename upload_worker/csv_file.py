"""CSV, plain or gzip: the bytes of the file go to COPY as they are."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, cast

from shared.domain.import_params import ImportParams
from upload_worker.cutter import CsvBatch, cut
from upload_worker.loading import RAW_CHARACTERS, Reject
from upload_worker.plan import CsvPlan, FilePlan
from upload_worker.records import last_record_end, printable, record_at_line
from upload_worker.sniffing import sniff
from upload_worker.sources import RangeReader
from upload_worker.text_file import TextFile

_UNCLOSED = (
    "the record has a quote that is never closed; correct it there, or set csv.quote and csv.escape to what the file "
    "uses"
)


class CsvPiece:
    """A batch of the cutter, as the loader sees it."""

    def __init__(self, batch: CsvBatch) -> None:
        self._batch = batch
        self.start = batch.start
        self.end = batch.end
        self.lines = batch.lines
        self.data = b"" if batch.open_quote else batch.data
        self.rejects: list[Reject] = []
        if batch.open_quote:
            self.rejects.append(Reject(batch.line, None, _UNCLOSED, _text(batch.data)))

    def holds(self, rows: int) -> bool:
        return self._batch.holds(rows) if self.data else rows == 0

    def records_end(self, start: int, size: int) -> int:
        end = last_record_end(self.data[start : start + size], self._batch.dialect)
        return start + end if end else 0

    def record_at(self, start: int, end: int, line: int) -> tuple[int, int] | None:
        found = record_at_line(self.data[start:end], self._batch.dialect, line)
        return (start + found[0], start + found[1]) if found else None

    def source_of(self, start: int, end: int) -> tuple[int, str]:
        return self._batch.line_of(start), _text(self.data[start:end])


class CsvFormat:
    async def look(self, reader: RangeReader, size: int, params: ImportParams) -> CsvPlan:
        options = params.csv
        if params.columns:
            options = options.model_copy(update={"columns": params.columns})
        return await sniff(reader, size, options)

    def restore(self, plan: Mapping[str, Any]) -> CsvPlan:
        return CsvPlan.model_validate(plan)

    def open(
        self, reader: RangeReader, size: int, plan: FilePlan, cursor: Mapping[str, Any], batch_bytes: int
    ) -> "CsvFile":
        return CsvFile(reader, size, cast(CsvPlan, plan), cursor, batch_bytes)


class CsvFile(TextFile[CsvPlan]):
    @property
    def first_line(self) -> int:
        return 1 + self.plan.header_lines

    @property
    def copy_options(self) -> Mapping[str, Any]:
        dialect = self.plan.dialect
        return {
            "format": "csv",
            "delimiter": dialect.delimiter,
            "quote": dialect.quote,
            "escape": dialect.escape,
            "null": self.plan.null,
            "force_null": self.plan.force_null or None,
        }

    async def pieces(self, start: int, end: int | None, line: int) -> AsyncGenerator[CsvPiece, None]:
        batches = cut(self._source, self.plan, start, end, line=line, batch_bytes=self._batch_bytes)
        async with aclosing(batches):
            async for batch in batches:
                yield CsvPiece(batch)


def _text(record: bytes) -> str:
    return printable(record[:RAW_CHARACTERS].rstrip(b"\r\n"))
