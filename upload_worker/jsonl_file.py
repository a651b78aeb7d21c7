"""JSONL, plain or gzip: one JSON object a line."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, cast

from shared.domain.errors import InvalidData
from shared.domain.import_params import ImportParams
from upload_worker.jsonl_rows import BadLine, JsonlPiece, RowWriter, decode_object, write_piece
from upload_worker.jsonl_schema import guess_columns
from upload_worker.plan import FilePlan, JsonlPlan
from upload_worker.sniffing import (
    FAR_SAMPLE_BYTES,
    FAR_SAMPLES,
    MAGIC_BYTES,
    SAMPLE_BYTES,
    guess_compression,
    read_head,
)
from upload_worker.sources import ByteSource, RangeReader, closing, open_source
from upload_worker.text_file import TextFile

# A line is held several times over while it is decoded.
MAX_LINE_BYTES = 16 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonlFormat:
    async def look(self, reader: RangeReader, size: int, params: ImportParams) -> JsonlPlan:
        magic = await read_head(reader(0, min(size, MAGIC_BYTES)), MAGIC_BYTES)
        compression = params.csv.compression or guess_compression(magic)
        source = open_source(reader, size, compression)
        for sample_bytes in (SAMPLE_BYTES, MAX_LINE_BYTES):
            head = await read_head(source.read(0, sample_bytes), sample_bytes)
            whole = len(head) < sample_bytes
            if whole or b"\n" in head:
                break
        else:
            raise line_too_long(1)
        start = len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0
        lines = _lines(head[start:], whole)
        objects, fault = await asyncio.to_thread(_objects, lines)
        if not objects and not params.columns:
            raise InvalidData(f"The file has no line that is a JSON object{fault}.")
        if not whole:
            objects += await self._far_objects(source, len(head))
        columns, notes = guess_columns(objects, params.columns)
        return JsonlPlan(
            columns=columns,
            notes=notes,
            compression=compression,
            data_start=start,
            record_bytes=sum(len(line) + 1 for line in lines) / max(1, len(lines)),
        )

    @staticmethod
    async def _far_objects(source: ByteSource, head_bytes: int) -> list[dict[str, Any]]:
        """Objects from further back, so that columns do not rest on the first lines alone."""
        found: list[dict[str, Any]] = []
        for number in range(1, FAR_SAMPLES + 1) if source.size is not None else ():
            assert source.size is not None
            start = max(head_bytes, (source.size - FAR_SAMPLE_BYTES) * number // FAR_SAMPLES)
            block = await read_head(source.read(start, start + FAR_SAMPLE_BYTES), FAR_SAMPLE_BYTES)
            objects, _ = await asyncio.to_thread(_objects, _lines(block, whole=False)[1:])
            found += objects
        return found

    def restore(self, plan: Mapping[str, Any]) -> JsonlPlan:
        return JsonlPlan.model_validate(plan)

    def open(
        self, reader: RangeReader, size: int, plan: FilePlan, cursor: Mapping[str, Any], batch_bytes: int
    ) -> "JsonlFile":
        return JsonlFile(reader, size, cast(JsonlPlan, plan), cursor, batch_bytes)


class JsonlFile(TextFile[JsonlPlan]):
    first_line = 1

    @property
    def copy_options(self) -> Mapping[str, Any]:
        return {"format": "text", "encoding": "utf-8"}

    async def pieces(self, start: int, end: int | None, line: int) -> AsyncGenerator[JsonlPiece, None]:
        writer = RowWriter(self.plan.columns)
        blocks = blocks_of_lines(self._source, start, end, line, self._batch_bytes)
        async with aclosing(blocks):
            async for position, number, block in blocks:
                yield await asyncio.to_thread(write_piece, block, position, position + len(block), number, writer)


async def blocks_of_lines(
    source: ByteSource, start: int, end: int | None, line: int, block_bytes: int
) -> AsyncGenerator[tuple[int, int, bytes], None]:
    """Whole lines of `[start, end)` in blocks: the position and line number of each, and its bytes.

    Only the last line of the file may lack its newline. Raises InvalidData for a line over MAX_LINE_BYTES.
    """
    chunks: list[bytes] = []
    size = 0
    async with closing(source.read(start, end)) as stream:
        async for chunk in stream:
            chunks.append(chunk)
            size += len(chunk)
            cut = chunk.rfind(b"\n") + 1 if size >= block_bytes else 0
            if cut:
                block = b"".join([*chunks[:-1], chunk[:cut]])
                chunks, size = [chunk[cut:]], len(chunk) - cut
                yield start, line, block
                start, line = start + len(block), line + block.count(b"\n")
            elif size > max(block_bytes, MAX_LINE_BYTES):
                raise line_too_long(line + sum(chunk.count(b"\n") for chunk in chunks))
    if size:
        yield start, line, b"".join(chunks)


def line_too_long(line: int) -> InvalidData:
    return InvalidData(
        f"Line {line} is longer than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object a line.", line=line
    )


def _lines(block: bytes, whole: bool) -> list[bytes]:
    lines = block.split(b"\n")
    return lines if whole else lines[:-1]


def _objects(lines: list[bytes]) -> tuple[list[dict[str, Any]], str]:
    """The objects on these lines, and what is wrong with the first line that is none."""
    objects, fault = [], ""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            objects.append(decode_object(line))
        except BadLine as error:
            fault = fault or f"; line {number}: {error}"
    return objects, fault
