"""Joined footers: what Thrift's compact protocol says comes back, and offsets move to where the pages are."""

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export_worker.formats.parquet_footer import MAGIC, joined_footer, take_apart
from export_worker.formats.thrift_compact import Field, Items, Struct, Type, read_struct, write_struct

NUMBERS = {Type.I16: 15, Type.I32: 31, Type.I64: 63}
SCALARS: list[st.SearchStrategy[Field]] = [
    *(
        st.integers(-(2**bits), 2**bits - 1).map(lambda value, type_=type_: Field(type_, value))
        for type_, bits in NUMBERS.items()
    ),
    st.binary(max_size=300).map(lambda value: Field(Type.BINARY, value)),
    st.binary(min_size=8, max_size=8).map(lambda value: Field(Type.DOUBLE, value)),
    st.sampled_from([Field(Type.TRUE, None), Field(Type.FALSE, None)]),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20).map(lambda v: Field(Type.LIST, Items(Type.I64, v))),
]


def structs(inner: st.SearchStrategy[Field]) -> st.SearchStrategy[Struct]:
    return st.dictionaries(st.integers(1, 200), inner, max_size=5)


FIELDS = st.recursive(
    st.one_of(SCALARS),
    lambda inner: (
        structs(inner).map(lambda value: Field(Type.STRUCT, value))
        | st.lists(structs(inner), max_size=20).map(lambda values: Field(Type.LIST, Items(Type.STRUCT, values)))
    ),
    max_leaves=10,
)


@given(structs(FIELDS))
def test_any_struct_comes_back(struct: Struct) -> None:
    assert read_struct(write_struct(struct)) == struct


@given(structs(FIELDS), st.data())
def test_a_struct_that_is_cut_off_is_refused(struct: Struct, data: st.DataObject) -> None:
    written = write_struct(struct)
    with pytest.raises(ValueError, match="cut off"):
        read_struct(written[: data.draw(st.integers(0, len(written) - 1))])


def test_the_footer_that_arrow_writes_comes_back_byte_by_byte() -> None:
    file = parquet(pa.table({"n": [1, None, 3], "s": ["a", "b", None], "d": [1.5, None, 2.5]}))
    length = int.from_bytes(file[-8:-4], "little")
    footer = file[-8 - length : -8]
    assert write_struct(read_struct(footer)) == footer


@given(st.lists(st.lists(st.none() | st.text(max_size=5), min_size=1, max_size=50), max_size=5))
def test_the_pages_of_many_files_are_one_file(texts: list[list[str | None]]) -> None:
    tables = [pa.table({"s": pa.array(each, pa.string()), "n": range(len(each))}) for each in texts]
    empty = pa.schema([("s", pa.string()), ("n", pa.int64())]).empty_table()
    parts = [take_apart(parquet(table)) for table in tables]
    footer = joined_footer(parquet(empty), [(len(part.data), part.rows, part.groups) for part in parts])
    whole = MAGIC + b"".join(part.data for part in parts) + footer
    assert pq.read_table(io.BytesIO(whole)) == pa.concat_tables([empty, *tables])


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


@pytest.mark.parametrize("worker", ["upload_worker", "export_worker"])
def test_a_worker_loads_arrow_only_when_a_file_needs_it(worker: str) -> None:
    loaded = f"import sys, {worker}.main; print([name for name in ('pyarrow', 'xlsxwriter') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
