import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.errors import InvalidData
from upload_worker.column_names import MAX_COLUMNS, MAX_NAME_BYTES, RESERVED, column_names


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (["id", "Größe", "名前", "select", 'a"b'], ["id", "Größe", "名前", "select", 'a"b']),
        (["", " x ", ""], ["column_1", "x", "column_3"]),
        (["a", "a", "a_2", "a"], ["a", "a_3", "a_2", "a_4"]),
        (["a\0b\nc\t"], ["a b c"]),
        (["ctid", "xmin", "_load", "ctid_"], ["ctid__2", "xmin_", "_load_", "ctid_"]),
        (["x" * 64, "x" * 65], ["x" * 63, "x" * 61 + "_2"]),
        (["é" * 40], ["é" * 31]),
    ],
)
def test_names_stay_as_near_to_the_header_as_they_can(header: list[str], names: list[str]) -> None:
    assert column_names(header)[0] == names


@given(st.lists(st.one_of(st.text(max_size=90), st.sampled_from(["", "a", "a_2", "_load", "column_1"])), max_size=30))
def test_names_are_always_legal_and_unique(header: list[str]) -> None:
    names, notes = column_names(header)
    assert len(set(names)) == len(names) == len(header)
    for name in names:
        assert 0 < len(name.encode()) <= MAX_NAME_BYTES
        assert name not in RESERVED
        assert "\0" not in name
    changed = {number for number, (a, b) in enumerate(zip(header, names, strict=True), 1) if a != b}
    assert {note["column"] for note in notes} == changed


def test_a_table_takes_1599_columns() -> None:
    assert len(column_names([f"c{n}" for n in range(MAX_COLUMNS)])[0]) == MAX_COLUMNS
    with pytest.raises(InvalidData, match="1600 columns"):
        column_names([f"c{n}" for n in range(MAX_COLUMNS + 1)])
