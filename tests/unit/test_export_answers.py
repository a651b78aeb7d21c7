"""What Parquet and XLSX make of single answers: nothing lost, little held, and an end that fits its beginning."""

import asyncio
import io
import json
import tracemalloc
import zipfile

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from export_worker.formats import workbook
from export_worker.formats.answers import table
from export_worker.formats.format import Encoded
from export_worker.formats.parquet import Parquet
from export_worker.formats.parquet_footer import joined_footer, take_apart
from export_worker.formats.workbook import MAX_CELL_CHARACTERS, Workbook
from shared.adapters.catalog import Column
from shared.domain.errors import InvalidData

MB = 2**20
MARK = "\ufeff"


@pytest.mark.parametrize("text", [MARK, MARK + "a", 2 * MARK, f'"{MARK}"', "a" + MARK])
def test_a_byte_order_mark_is_a_character_like_any_other(text: str) -> None:
    rows = table(f"{text}\n{text}\n".encode(), [Column("s", "text")], {})
    assert rows.column("s").to_pylist() == [text.strip('"')] * 2


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
