"""PostgreSQL's CSV answers as Arrow tables with the types of the columns, a few rows at a time."""

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.csv

from export_worker.formats.format import Encoded
from shared.adapters.catalog import Column
from shared.domain.errors import InvalidData

# How PostgreSQL is asked, so that NULL and the empty text differ.
COPY_OPTIONS = {"format": "csv"}

# Arrow takes one away from the beginning of whatever it reads; COPY does not quote it.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_TIMES = ("date", "timestamp", "timestamptz")
_REFUSED = re.compile(r"In CSV column #(\d+).*?: ?CSV conversion error to .*?: (.*)", re.DOTALL)


# Arrow works with several times the memory of an answer, and what is freed stays with the thread that had it.
_ENCODING = ThreadPoolExecutor(1, "encoding")


async def in_turn(encode: Callable[[bytes], Encoded], answer: bytes) -> Encoded:
    """`encode(answer)` in a thread, one at a time in this process."""
    return await asyncio.get_running_loop().run_in_executor(_ENCODING, encode, answer)


def tables(
    answer: bytes, columns: Sequence[Column], types: Mapping[str, pa.DataType], *, block_bytes: int
) -> Iterator[pa.Table]:
    """The rows of an answer in order, in tables of `block_bytes` of it at most, or of twice a longer row.

    `types` names the columns that are more than text.

    Raises InvalidData for a value that its type cannot hold, such as an infinite date.
    """
    start = 0
    while start < len(answer):
        size = block_bytes
        while (end := _record_end(answer, start, start + size)) is None:
            size *= 2
        yield _table(answer[start:end], columns, types)
        start = end


def empty_table(columns: Sequence[Column], types: Mapping[str, pa.DataType]) -> pa.Table:
    fields = [(column.name, types.get(column.name, pa.string())) for column in columns]
    # Not `empty_table()`: like whatever is given a Python list, it imports pandas where there is one, for 50 MB.
    return pa.Table.from_batches([], pa.schema(fields))


def _record_end(answer: bytes, start: int, limit: int) -> int | None:
    """Where the last record that begins at `start` or later and ends at `limit` or before ends."""
    if limit >= len(answer):
        return len(answer)
    quotes, end = answer.count(b'"', start, limit), limit
    while (newline := answer.rfind(b"\n", start, end)) >= 0:
        quotes -= answer.count(b'"', newline, end)
        if quotes % 2 == 0:
            return newline + 1
        end = newline
    return None


def _table(answer: bytes, columns: Sequence[Column], types: Mapping[str, pa.DataType]) -> pa.Table:
    names = [column.name for column in columns]
    if answer.startswith(_BYTE_ORDER_MARK):
        answer = _BYTE_ORDER_MARK + answer
    try:
        return pa.csv.read_csv(
            pa.BufferReader(answer),
            # One block: a value may be as long as all of it.
            pa.csv.ReadOptions(use_threads=False, block_size=len(answer) + 1, column_names=names),
            pa.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            pa.csv.ConvertOptions(
                column_types={name: types.get(name, pa.string()) for name in names},
                null_values=[""],
                true_values=["t"],
                false_values=["f"],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid as error:
        raise _refused(error, columns) from error


def _refused(error: pa.ArrowInvalid, columns: Sequence[Column]) -> InvalidData:
    found = _REFUSED.search(str(error))
    if found is None:
        return InvalidData(f"the rows cannot be written in this format: {error}")
    column = columns[int(found[1])]
    hint = "infinite times and years outside 1 to 9999 cannot be written in it; " if column.type in _TIMES else ""
    return InvalidData(
        f"column {column.name!r} ({column.type}): {found[2].strip()}; {hint}leave these rows out with a condition, or "
        "export as csv or jsonl",
        column=column.name,
    )


def each(values: pa.ChunkedArray, convert: Callable[[str], object], type_: pa.DataType) -> pa.Array:
    """A column of texts as another type, for what Arrow's CSV reader has no converter."""
    return pa.array([None if value is None else convert(value) for value in values.to_pylist()], type_)
