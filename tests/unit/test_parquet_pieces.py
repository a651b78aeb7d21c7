"""Parquet files are decoded a little at a time, however long the rows are that few bytes stand for."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upload_worker.parquet_file import _pieces

MB = 2**20
ROWS = 4096
LONG = 10_000


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """Arrow's memory while this test runs."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    yield pool
    pa.set_memory_pool(before)


def texts() -> pa.Array:
    few = pa.array([f"{number}" * LONG for number in range(5)])
    return pa.DictionaryArray.from_arrays(pa.array([row % 5 for row in range(ROWS)]), few)


@pytest.mark.parametrize(
    ("values", "options"),
    [
        pytest.param(lambda: texts().cast(pa.string()), {}, id="dictionary"),
        pytest.param(texts, {}, id="read as a dictionary"),
        pytest.param(lambda: texts().cast(pa.string()).cast(pa.binary()).cast(pa.binary(LONG)), {}, id="fixed width"),
        pytest.param(lambda: pa.ListArray.from_arrays(range(ROWS + 1), texts().cast(pa.string())), {}, id="lists"),
        pytest.param(
            lambda: texts().cast(pa.string()).sort(),
            {"use_dictionary": False, "column_encoding": {"s": "DELTA_BYTE_ARRAY"}},
            id="common prefix",
        ),
    ],
)
def test_few_bytes_that_stand_for_long_rows_are_decoded_a_few_rows_at_a_time(
    pool: pa.MemoryPool, values: Callable[[], pa.Array], options: dict[str, Any]
) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"s": values()}), out, **options)
    assert out.tell() < MB
    reading = pa.proxy_memory_pool(pool)
    pa.set_memory_pool(reading)
    file = pq.ParquetFile(out, buffer_size=MB, pre_buffer=False)
    sizes = [(piece.end - piece.start, len(piece.data)) for piece in _pieces(file, 0, ROWS, MB)]
    assert sum(rows for rows, _ in sizes) == ROWS
    assert sum(size for _, size in sizes) > ROWS * LONG
    assert reading.max_memory() < 16 * MB
