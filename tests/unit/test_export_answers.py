"""What Parquet and XLSX make of single answers: nothing lost, little held, and an end that fits its beginning."""

import asyncio
import io
import json
import subprocess
import sys
import tracemalloc
import zipfile

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export_worker.formats import workbook
from export_worker.formats.answers import tables
from export_worker.formats.format import Encoded
from export_worker.formats.parquet import Parquet
from export_worker.formats.parquet_footer import joined_footer, take_apart
from export_worker.formats.workbook import MAX_CELL_CHARACTERS, Workbook
from shared.adapters.catalog import Column
from shared.domain.errors import InvalidData

MB = 2**20
MARK = "\ufeff"


@pytest.mark.parametrize("text", [MARK, MARK + "a", 2 * MARK, f'"{MARK}"', "a" + MARK])
@pytest.mark.parametrize("block_bytes", [1, MB])
def test_a_byte_order_mark_is_a_character_like_any_other(text: str, block_bytes: int) -> None:
    answer = f"{text}\n{text}\n".encode()
    [*found] = tables(answer, [Column("s", "text")], {}, block_bytes=block_bytes)
    assert [value for rows in found for value in rows.column("s").to_pylist()] == [text.strip('"')] * 2


VALUES = st.none() | st.text(st.sampled_from('a",\n\r '))


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1), st.integers(1, 40))
def test_an_answer_is_cut_between_rows_into_blocks_of_that_size(
    rows: list[tuple[str | None, str | None]], block_bytes: int
) -> None:
    lines = [",".join(_field(value) for value in row).encode() + b"\n" for row in rows]
    columns = [Column("a", "text"), Column("b", "text")]
    found = list(tables(b"".join(lines), columns, {}, block_bytes=block_bytes))
    assert [(row["a"], row["b"]) for block in found for row in block.to_pylist()] == rows
    for block in found[:-1]:
        size = sum(len(line) for line in lines[: block.num_rows])
        assert size <= max(block_bytes, 2 * len(lines[0]))
        del lines[: block.num_rows]


def _field(value: str | None) -> str:
    """As COPY writes it."""
    return "" if value is None else '"' + value.replace('"', '""') + '"'


def test_answers_that_are_encoded_side_by_side_take_the_memory_of_one() -> None:
    program = """
import asyncio, pyarrow
from export_worker.formats.parquet import Parquet
from shared.adapters.catalog import Column

async def peak_bytes(answers: int) -> int:
    form = Parquet([Column("n", "bigint"), Column("s", "text")], {})
    answer = b"".join(b"%d,%d\\n" % (n, n * n) for n in range(100_000))
    await asyncio.gather(*(form.encode(answer) for _ in range(answers)))
    return pyarrow.default_memory_pool().max_memory()

one = asyncio.run(peak_bytes(1))
assert one <= asyncio.run(peak_bytes(4)) < 1.2 * one
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def encoded(form: Parquet | Workbook, answer: bytes) -> Encoded:
    return asyncio.run(form.encode(answer))


def peak_bytes_of(form: Parquet | Workbook, answer: bytes) -> int:
    tracemalloc.start()
    try:
        encoded(form, answer)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_workbook_of_small_numbers_takes_little_memory() -> None:
    columns = [Column(f"n{number}", "bigint") for number in range(8)]
    assert peak_bytes_of(Workbook(columns), b"1,2,3,4,5,6,7,8\n" * 50_000) < 20 * MB


def test_a_workbook_that_another_version_ends_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = [Column("n", "bigint"), Column("s", "text")]
    head = Workbook(columns).head()
    rows = encoded(Workbook(columns), b"1,a\n2,b\n")
    # As if another ISA-L packed differently from now on.
    monkeypatch.setattr(workbook, "_LEVEL", 0)
    kept = json.loads(json.dumps([head.detail, rows.detail]))
    body = head.data + rows.data + asyncio.run(Workbook(columns).tail(kept))
    assert zipfile.ZipFile(io.BytesIO(body)).testzip() is None
    sheet = openpyxl.load_workbook(io.BytesIO(body)).active
    assert list(sheet.iter_rows(values_only=True)) == [("n", "s"), (1, "a"), (2, "b")]


@pytest.mark.parametrize(("character", "units"), [("x", 1), ("é", 1), ("🎉", 2)])
def test_a_cell_is_as_long_as_excel_counts(character: str, units: int) -> None:
    form = Workbook([Column("s", "text")])
    most = MAX_CELL_CHARACTERS // units
    encoded(form, (character * most).encode())
    with pytest.raises(InvalidData, match=f"a text has {(most + 1) * units} characters"):
        encoded(form, (character * (most + 1)).encode())


def test_the_footer_of_many_row_groups_takes_little_more_memory_than_it_is_long() -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({f"c{number}": [1, 2, None] for number in range(20)}), out)
    pages = take_apart(out.getvalue())
    tracemalloc.start()
    try:
        footer = joined_footer(out.getvalue(), [(len(pages.data), pages.rows, pages.groups)] * 50)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * len(footer)
