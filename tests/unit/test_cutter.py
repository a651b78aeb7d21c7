import tracemalloc
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.errors import InvalidData
from tests.unit.csv_objects import plan, reader, records_by_postgres, sales, source
from upload_worker.cutter import CsvBatch, cut
from upload_worker.plan import CsvPlan, Dialect
from upload_worker.sources import PlainSource

DIALECTS = st.sampled_from([Dialect(), Dialect(escape="\\"), Dialect(quote="'", escape="'")])
CSV_TEXT = st.text(alphabet="a,\"'\\\n\ré", max_size=80)


async def batches(
    content: bytes, plan: CsvPlan, start: int = 0, end: int | None = None, *, chunk_bytes: int, batch_bytes: int
) -> list[CsvBatch]:
    return [b async for b in cut(source(content, chunk_bytes), plan, start, end, batch_bytes=batch_bytes)]


@given(CSV_TEXT, DIALECTS, st.integers(1, 20), st.integers(1, 40), st.integers(1, 3))
async def test_batches_cover_the_object_and_end_where_records_end(
    text: str, dialect: Dialect, chunk_bytes: int, batch_bytes: int, columns: int
) -> None:
    content = text.encode()
    made = await batches(content, plan(columns, dialect=dialect), chunk_bytes=chunk_bytes, batch_bytes=batch_bytes)
    assert b"".join(batch.raw for batch in made) == content
    ends = [0]
    for record in records_by_postgres(content, dialect):
        ends.append(ends[-1] + len(record))
    assert [batch.start for batch in made] == [0, *(batch.end for batch in made)][: len(made)]
    assert {batch.end for batch in made} <= set(ends)
    assert [batch.line for batch in made] == [1 + sum(b.lines for b in made[:i]) for i in range(len(made))]


@given(CSV_TEXT, st.integers(1, 9), st.integers(1, 20), st.data())
async def test_reading_on_from_any_boundary_gives_the_same_rest(
    text: str, chunk_bytes: int, batch_bytes: int, data: st.DataObject
) -> None:
    content, two = text.encode(), plan()
    made = await batches(content, two, chunk_bytes=chunk_bytes, batch_bytes=batch_bytes)
    boundary = data.draw(st.sampled_from([0, *(batch.end for batch in made)]))
    rest = await batches(content, two, boundary, chunk_bytes=chunk_bytes, batch_bytes=7)
    assert b"".join(batch.raw for batch in rest) == content[boundary:]
    before = await batches(content, two, 0, boundary, chunk_bytes=chunk_bytes, batch_bytes=7)
    assert b"".join(batch.raw for batch in before) == content[:boundary]


@given(
    st.lists(st.tuples(st.text('é"€,😀\n', max_size=4), st.text("xÿ", max_size=3)), max_size=12),
    st.sampled_from(["utf-16-le", "utf-16-be", "utf-32-le", "gb18030"]),
    st.integers(1, 11),
    st.integers(1, 60),
)
async def test_positions_count_bytes_of_the_objects_own_encoding(
    rows: list[tuple[str, str]], encoding: str, chunk_bytes: int, batch_bytes: int
) -> None:
    text = "".join('"{}",{}\n'.format(a.replace('"', '""'), b) for a, b in rows)
    content = text.encode(encoding)
    there = plan(encoding=encoding)
    made = await batches(content, there, chunk_bytes=chunk_bytes, batch_bytes=batch_bytes)
    assert b"".join(batch.data for batch in made).decode() == text
    for batch in made:
        assert content[batch.start : batch.end].decode(encoding) == batch.raw.decode()
        again = await batches(content, there, batch.start, batch.end, chunk_bytes=3, batch_bytes=1 << 20)
        assert b"".join(part.data for part in again) == batch.data


async def test_a_byte_that_the_encoding_does_not_know_stays_with_its_record() -> None:
    made = await batches(b"1,a\n2,\x81\n3,\xe9\n", plan(encoding="cp1252"), chunk_bytes=4, batch_bytes=1)
    with pytest.raises(UnicodeDecodeError):
        made[1].data.decode()
    assert [made[0].data, made[2].data] == [b"1,a\n", "3,é\n".encode()]


async def test_a_cut_off_last_character_stays_with_its_record() -> None:
    content = "1,a\n2,b".encode("utf-16-le")[:-1]
    made = await batches(content, plan(encoding="utf-16-le"), chunk_bytes=5, batch_bytes=1)
    assert [(batch.data, batch.end) for batch in made] == [(b"1,a\n", 8), (b"2,\xff", 13)]


async def test_a_quote_that_is_never_closed_makes_a_batch_of_its_own() -> None:
    made = await batches(b'1,a\n2,"b\nc"\n3,"open\n4,d\n', plan(), chunk_bytes=5, batch_bytes=1 << 20)
    assert [(batch.raw, batch.open_quote) for batch in made] == [
        (b'1,a\n2,"b\nc"\n', False),
        (b'3,"open\n4,d\n', True),
    ]
    assert made[1].records == 1
    assert (made[1].line, made[1].start) == (4, 12)


async def test_a_record_longer_than_the_cap_is_refused_in_bounded_memory() -> None:
    async def huge_field(start: int, end: int | None) -> AsyncIterator[bytes]:
        yield b'1,a\n2,"'
        for _ in range(200):
            yield bytes(1 << 20)

    tracemalloc.start()
    try:
        with pytest.raises(InvalidData, match=r"line 2 \(byte 4\) is longer than 8388608 bytes") as caught:
            async with aclosing(
                cut(PlainSource(huge_field, 200 << 20), plan(), 0, batch_bytes=4, max_record_bytes=8 << 20)
            ) as made:
                assert [batch.end async for batch in made] == [4]
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()
    assert caught.value.extra == {"line": 2, "position": 4}


async def test_a_long_record_does_not_need_to_fit_a_batch() -> None:
    content = b'1,"' + b"x\n" * 5000 + b'"\n2,b\n'
    made = await batches(content, plan(), chunk_bytes=5, batch_bytes=50)
    assert [len(batch.raw) for batch in made] == [len(content) - 4, 4]


async def test_lines_are_those_of_the_file_though_blank_lines_are_gone() -> None:
    (made,) = await batches(b'1,a\n\n\n2,"b\nb"\n\n3,c\n', plan(), chunk_bytes=64, batch_bytes=64)
    assert made.data == b'1,a\n2,"b\nb"\n3,c\n'
    assert [made.line_of(offset) for offset in (0, 4, 12)] == [1, 4, 7]
    assert made.holds(3)
    assert not made.holds(2)


async def test_a_range_of_blank_lines_has_no_data() -> None:
    (made,) = await batches(b"\n\n\n", plan(), chunk_bytes=64, batch_bytes=64)
    assert (made.data, made.records, made.end) == (b"", 0, 3)


async def test_leaving_early_closes_the_read() -> None:
    closed = False
    inner = reader(sales(2000), 1000)

    async def watched(start: int, end: int | None) -> AsyncIterator[bytes]:
        nonlocal closed
        try:
            async for chunk in inner(start, end):
                yield chunk
        finally:
            closed = True

    async with aclosing(cut(PlainSource(watched, 1), plan(3), 0, batch_bytes=5000)) as made:
        async for _ in made:
            break
    assert closed
