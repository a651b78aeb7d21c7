import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.csv_objects import records_by_postgres
from upload_worker.plan import NO_QUOTE, Dialect
from upload_worker.records import (
    fragments,
    last_record_end,
    line_count,
    parse_fields,
    printable,
    ready_for_copy,
    record_at_line,
    record_count,
    split_records,
)

PLAIN = Dialect()
BACKSLASH = Dialect(escape="\\")
DIALECTS = st.sampled_from([PLAIN, BACKSLASH, Dialect(quote="'", escape="'"), Dialect(quote=NO_QUOTE, escape=NO_QUOTE)])
CSV_BYTES = st.text(alphabet="a,\"'\\\n.é", max_size=60).map(str.encode)


def records(data: bytes, dialect: Dialect = PLAIN) -> list[bytes]:
    return [data[start:end] for start, end in split_records(data, dialect)]


@given(CSV_BYTES, DIALECTS)
def test_records_end_where_postgres_ends_them(data: bytes, dialect: Dialect) -> None:
    expected = list(records_by_postgres(data, dialect))
    assert records(data, dialect) == expected
    assert record_count(data, dialect) == len(expected)


@given(CSV_BYTES, DIALECTS, st.booleans())
def test_fragments_put_together_are_the_data(data: bytes, dialect: Dialect, in_quotes: bool) -> None:
    joined = dialect.quote_byte.join(fragments(data, dialect, in_quotes))
    assert joined == (dialect.quote_byte + data if in_quotes else data)


@given(CSV_BYTES, DIALECTS)
def test_the_last_record_end_is_the_end_of_the_last_record_with_a_newline(data: bytes, dialect: Dialect) -> None:
    end = 0
    for record in records_by_postgres(data, dialect):
        closed = len(fragments(record, dialect)) % 2 == 1
        if record.endswith(b"\n") and closed:
            end += len(record)
    assert last_record_end(data, dialect) == end


@given(st.lists(st.lists(st.text(alphabet='a,"\n\r \\', max_size=5), min_size=2, max_size=4), max_size=8))
def test_well_formed_rows_read_as_the_csv_module_wrote_them(rows: list[list[str]]) -> None:
    written = io.StringIO()
    csv.writer(written, lineterminator="\r\n").writerows(rows)
    data = written.getvalue().encode()
    parsed = [[field.decode() for field in parse_fields(record, PLAIN)] for record in records(data)]
    assert parsed == rows


def test_escaped_quotes_inside_quotes_become_quotes() -> None:
    assert parse_fields(rb'1,"say \"a, b\" \\ ok",2', BACKSLASH) == [b"1", rb'say "a, b" \ ok', b"2"]


def test_a_quote_inside_a_field_opens_quotes_as_in_postgres() -> None:
    assert parse_fields(b'a"b,c"d,e', PLAIN) == [b"ab,cd", b"e"]


@pytest.mark.parametrize(
    ("raw", "ready"),
    [
        (b"1,a\n2,b\n", b"1,a\n2,b\n"),
        (b"1,a\r\n2,b\r\n", b"1,a\r\n2,b\r\n"),
        (b"1,a\r2,b\r", b"1,a\r2,b\r"),
        (b"1,a\r\n2,b\n3,c\r4,d", b"1,a\n2,b\n3,c\n4,d"),
        (b'1,"a\nb"\r\n2,b\r\n', b'1,"a\nb"\r\n2,b\r\n'),
        (b'1,"a\r\nb\rc"\n2,b\n', b'1,"a\r\nb\rc"\n2,b\n'),
        (b'1,"a\r\nb"\n2,b\r\n', b'1,"a\r\nb"\n2,b\n'),
        (b"\n\n1,a\n\n\n2,b\n\n", b"1,a\n2,b\n"),
        (b"\r\n1,a\r\n\r\n2,b\r\n", b"1,a\r\n2,b\r\n"),
        (b'1,"a\n\n\nb"\n\n2,"\n\n"\n', b'1,"a\n\n\nb"\n2,"\n\n"\n'),
        (b"\n\n", b""),
        (b"\\.\n1,\\.\n", b'"\\."\n1,\\.\n'),
        (b"1,a\r\n\\.\r\n2,b\r\n", b'1,a\r\n"\\."\r\n2,b\r\n'),
        (b"1,a\n\\.", b'1,a\n"\\."'),
        (b'1,"a\n\\.\nb"\n', b'1,"a\n\\.\nb"\n'),
        (b"\n\\.\r\n", b'"\\."\n'),
        (b"", b""),
    ],
)
def test_a_block_is_made_ready_for_copy(raw: bytes, ready: bytes) -> None:
    assert ready_for_copy(raw, PLAIN, skip_blank_lines=True) == ready


def test_blank_lines_stay_in_a_one_column_file_where_they_are_null() -> None:
    assert ready_for_copy(b"1\n\n2\n\n", PLAIN, skip_blank_lines=False) == b"1\n\n2\n\n"


@given(st.text(alphabet='a,"\n\r\\.', max_size=40).map(str.encode))
def test_ready_blocks_hold_the_same_records_but_the_blank_ones(data: bytes) -> None:
    ready = ready_for_copy(data, PLAIN, skip_blank_lines=True)
    before = [record.rstrip(b"\r\n") for record in records(data) if record.strip(b"\r\n")]
    after = [record.rstrip(b"\r\n") for record in records(ready)]
    assert after == [b'"\\."' if record == b"\\." else record for record in before]


@pytest.mark.parametrize(
    ("data", "line", "record"),
    [
        # What PostgreSQL 15 reports for `x` in a bigint column, asked of a real server.
        (b'x,"l\nl\nl"\n', 1, b'x,"l\nl\nl"\n'),
        (b'1,"l\nl\nl"\nx,"a\nb"\n3,4\n', 3, b'x,"a\nb"\n'),
        (b'1,"l\r\nl\r\nl"\r\nx,"a\r\nb\n\nc\rd"\r\n3,4\r\n', 6, b'x,"a\r\nb\n\nc\rd"\r\n'),
        (b'1,"l\r\nl\nl"\n2,"r\rr\nn"\nx,"a\nb\nc\rd"\n3,4\n', 7, b'x,"a\nb\nc\rd"\n'),
        (b'1,ok\n2,"b\n\xff"\n3,4\n', 3, b'2,"b\n\xff"\n'),
        (b'1,ok\n2,"b\nc"\n3,"4\nx\ny', 6, b'3,"4\nx\ny'),
        (b"1,a\rx,b\r", 2, b"x,b\r"),
    ],
)
def test_the_line_that_copy_reports_leads_to_its_record(data: bytes, line: int, record: bytes) -> None:
    found = record_at_line(data, PLAIN, line)
    assert found is not None
    assert data[slice(*found)] == record


def test_a_line_beyond_the_block_leads_nowhere() -> None:
    assert record_at_line(b"1,a\n", PLAIN, 2) is None


def test_every_kind_of_newline_ends_a_line() -> None:
    assert line_count(b"a\nb\r\nc\rd") == 3


def test_a_rejected_record_is_printable_whatever_bytes_it_holds() -> None:
    stand_in = b"\x81".decode("ascii", "surrogateescape").encode("utf-8", "surrogatepass")
    assert printable(b"a\x00\xff\xc3\xa9" + stand_in) == "a\\x00\\xffé\\x81"
