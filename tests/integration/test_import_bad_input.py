"""What an import says to input that it cannot load, and that nothing of it is left after an abort."""

import gzip
import random
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.domain.task import Command, TaskState
from sluice.stack import Stack
from tests.faults.scene import Scene, open_scene

MIB = 1 << 20


def zipped_field(mebibytes: int) -> bytes:
    """gzip of a CSV file whose second record has one field of that length; a small object."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    packed = [packer.compress(b"a,b\n1,x\n2,")]
    packed += [packer.compress(b"y" * MIB) for _ in range(mebibytes)]
    return b"".join([*packed, packer.compress(b"\n3,z\n"), packer.flush()])


def late(bad: bytes) -> bytes:
    """1.2 MB in which `bad`, on line 40, is in none of the samples that types are guessed from."""
    padding = b"p" * 20_000
    records = [b"%d,%b" % (number, padding) for number in range(60)]
    records[38] = bad + b"," + padding
    return b"n,padding\n" + b"\n".join(records) + b"\n"


GZIPPED = gzip.compress(b"a,b\n" + random.Random(1).randbytes(3000).hex("\n", 20).encode().replace(b"\n", b",1\n"))


@pytest.mark.parametrize(
    ("content", "params", "code", "line", "column", "said"),
    [
        pytest.param(b"", {}, "invalid-data", None, None, "empty", id="empty file"),
        pytest.param(b"\xef\xbb\xbf", {}, "invalid-data", None, None, "empty", id="nothing but a byte order mark"),
        pytest.param(b"\n\n\n", {}, "invalid-data", None, None, "blank lines", id="blank lines alone"),
        pytest.param(b",".join(b"c%d" % n for n in range(1700)), {}, "invalid-data", None, None, "1599", id="wide"),
        pytest.param(b"a,b\n1,2\n3\n4,5\n", {}, "bad-record", 3, None, 'missing data for column "b"', id="short"),
        pytest.param(b"a,b\n1,2\n3,4,5\n6,7\n", {}, "bad-record", 3, None, "extra data", id="long"),
        pytest.param(b'a,b\n1,2\n3,"4\n5,6\n', {}, "bad-record", 3, None, "never closed", id="unbalanced quote"),
        pytest.param(
            b"a,b\n1,x\n2,\xff\xe4\xb8\xad\xe6\x96\x87\n",
            {"encoding": "utf-8"},
            "bad-record",
            3,
            None,
            "UTF8",
            id="UTF-8",
        ),
        pytest.param(b"a,b\n1,x\n2,\x00\n", {}, "bad-record", 3, None, "0x00", id="NUL"),
        pytest.param(late(b"9" * 19), {}, "bad-record", 40, "n", "out of range", id="number out of range"),
        pytest.param(late(b"n/a"), {}, "bad-record", 40, "n", "csv.columns", id="word among numbers"),
        pytest.param(
            b"a,at\n1,2024-02-29\n2,2023-02-29\n",
            {"columns": {"at": "date"}},
            "bad-record",
            3,
            "at",
            "2023-02-29",
            id="date",
        ),
        pytest.param(GZIPPED[:-20], {}, "invalid-data", None, None, "upload it again", id="truncated gzip"),
        pytest.param(GZIPPED[:-6] + b"\0\0" + GZIPPED[-4:], {}, "invalid-data", None, None, "gzip", id="corrupt gzip"),
        pytest.param(b"PK\x03\x04" + bytes(100), {}, "invalid-data", None, None, "ZIP", id="Excel workbook"),
        pytest.param(
            b"a,b\n1,2\n", {"columns": {"nope": "text"}}, "invalid-data", None, None, "nope", id="no such column"
        ),
        # --- the line is the physical one, whatever came before
        pytest.param(b"\n\na,b\n\n1,2\n\n\n9\n", {}, "bad-record", 8, None, "missing", id="after blank lines"),
        pytest.param(b'a,b\n1,"x\ny\nz"\n2,"\n"\n9\n', {}, "bad-record", 7, None, "missing", id="after inner newlines"),
        pytest.param(b'a,b\n1,"x\n\n\ny","z\n"\n', {}, "bad-record", 2, None, "extra", id="with inner newlines"),
        pytest.param(b'a,b\r\n1,"x\r\ny"\r\n2,3\r\n9\r\n4,5\r\n', {}, "bad-record", 5, None, "missing", id="CRLF"),
        pytest.param(b'a,b\r1,"x\ry"\r2,3\r9\r4,5\r', {}, "bad-record", 5, None, "missing", id="CR"),
        pytest.param(b"a,b\n1,2\r\n3,4\r9\n5,6\n", {}, "bad-record", 4, None, "missing", id="mixed newlines"),
        pytest.param('a,b\n1,"ä\nö"\n9\n'.encode("utf-16"), {}, "bad-record", 4, None, "missing", id="UTF-16"),
        pytest.param(
            gzip.compress(b"a,b\n" + b"1,2\n" * 999 + b"9\n"), {}, "bad-record", 1001, None, "missing", id="gzip"
        ),
        pytest.param(b"a,b\n" + b"1,2\n" * 999 + b"9\n", {}, "bad-record", 1001, None, "missing", id="many batches"),
    ],
)
async def test_bad_input_fails_with_code_place_and_advice_and_an_abort_leaves_nothing(
    scene: Scene,
    content: bytes,
    params: dict[str, Any],
    code: str,
    line: int | None,
    column: str | None,
    said: str,
) -> None:
    error = await scene.fail(content, csv=params)
    assert (error["code"], error.get("line"), error.get("column")) == (code, line, column), error["detail"]
    assert said in error["detail"]
    if line is not None:
        assert f"line {line}" in error["detail"]
    assert await scene.value("SELECT count(*) FROM sluice.datasets WHERE account_id = $1", scene.account_id) == 0
    await scene.abort(error["task_id"])
    assert await scene.leftovers(error["task_id"]) == {}


async def test_a_huge_field_is_refused_with_its_line_and_bounded_memory(
    services: Stack, environment: dict[str, str]
) -> None:
    """200 MiB in one field, from a gzip object of 200 KiB."""
    services.spawn("control")
    [worker] = services.spawn("upload-worker")
    async with open_scene(environment) as scene:
        await scene.succeed(b"a,b\n1,2\n")  # the worker is warm
        before = psutil.Process(worker.pid).memory_info().rss
        error = await scene.fail(zipped_field(200), "huge")
        assert error["code"] == "invalid-data"
        assert error["line"] == 3
        assert "64" in error["detail"] or "67108864" in error["detail"]
        status = Path(f"/proc/{worker.pid}/status").read_text()  # noqa: ASYNC240 - the kernel answers at once
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        assert peak - before < 400 * MIB


# --- rejects


async def test_bad_records_are_skipped_kept_and_placed(scene: Scene) -> None:
    content = (
        b"id,at,word\n"
        b"1,2024-01-01,a\n"
        b"2,2024-02-30,b\n"  # line 3: no such day
        b'3,2024-01-03,"c\nc"\n'
        b"4,2024-01-04\n"  # line 6: too short
        b"\n"
        b"5,2024-01-05,d,e\n"  # line 8: too long
        b"x,2024-01-06,f\n"  # line 9: no number
        b"6,2024-01-07,\xff\n"  # line 10: not UTF-8
        b"7,2024-01-08,\x00\n"  # line 11: NUL
        b'"8\n8",2024-01-09,g\n'  # line 12: no number, two lines
        b"9,2024-01-10,h\n"
        b'10,2024-01-11,"open\n'  # line 15: never closed
        b"11,2024-01-12,i\n"
    )
    types = {"id": "bigint", "at": "date"}
    task = await scene.succeed(content, on_error="skip", csv={"columns": types, "encoding": "utf-8", "quote": '"'})
    assert [row[0] for row in sorted(await scene.rows())] == [1, 3, 9]
    rejects = await scene.rejects(task.task_id)
    assert [(line, column) for line, column, _, _ in rejects] == [
        (3, "at"),
        (6, None),
        (8, None),
        (9, "id"),
        (10, None),
        (11, None),
        (12, "id"),
        (15, None),
    ]
    assert [raw for _, _, _, raw in rejects] == [
        "2,2024-02-30,b",
        "4,2024-01-04",
        "5,2024-01-05,d,e",
        "x,2024-01-06,f",
        "6,2024-01-07,\\xff",
        "7,2024-01-08,\\x00",
        '"8\n8",2024-01-09,g',
        '10,2024-01-11,"open\n11,2024-01-12,i',
    ]
    reasons = [reason for _, _, reason, _ in rejects]
    for reason, said in zip(
        reasons, ["2024-02-30", "missing", "extra", '"x"', "UTF8", "0x00", "invalid input", "never closed"], strict=True
    ):
        assert said in reason
    assert (task.rows_done, task.rejects) == (3, 8)
    assert task.result is not None
    assert (task.result["rows"], task.result["rejects"]) == (3, 8)


async def test_many_bad_records_in_one_batch_are_each_found(services: Stack, environment: dict[str, str]) -> None:
    """Batches of 4 MiB: the bad records have to be searched for."""
    chance = random.Random(2)
    lines, good, bad = [b"id,word"], [], []
    for number in range(10_000):
        line = 1 + sum(1 for _ in lines)
        kind = chance.choices(["good", "inner newline", "blank", "word", "short"], [93, 4, 2, 0.5, 0.5])[0]
        match kind:
            case "good":
                lines.append(b"%d,word" % number)
            case "inner newline":
                lines += [b'%d,"two' % number, b'lines"']
            case "blank":
                lines.append(b"")
            case "word":
                lines.append(b"x%d,word" % number)
            case "short":
                lines.append(b"%d" % number)
        if kind in ("good", "inner newline"):
            good.append(number)
        elif kind != "blank":
            bad.append((line, lines[-1].decode()))
    services.spawn("control")
    services.spawn("upload-worker")
    async with open_scene(environment) as scene:
        task = await scene.succeed(b"\n".join(lines), on_error="skip", csv={"columns": {"id": "bigint"}})
        assert [(line, raw) for line, _, _, raw in await scene.rejects(task.task_id)] == bad
        assert sorted(row[0] for row in await scene.rows()) == good
        assert (task.rows_done, task.rejects) == (len(good), len(bad))


async def test_more_rejects_than_allowed_fail_and_an_abort_removes_those_that_were_kept(scene: Scene) -> None:
    content = b"id,w\n" + b"".join(b"%d,aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\nx%d,b\n" % (n, n) for n in range(50))
    error = await scene.fail(content, on_error="skip", max_rejects=20, csv={"columns": {"id": "bigint"}})
    assert error["code"] == "too-many-rejects"
    assert "max_rejects (20)" in error["detail"]
    assert error["line"] % 2 == 1
    assert 0 < len(await scene.rejects(error["task_id"])) <= 20
    await scene.abort(error["task_id"])
    assert await scene.leftovers(error["task_id"]) == {}


async def test_an_import_stops_at_the_first_reject_that_is_too_many(scene: Scene) -> None:
    """Though the rest of the batch is as bad."""
    error = await scene.fail(b"id\n" + b"x\n" * 20, on_error="skip", max_rejects=3, csv={"columns": {"id": "bigint"}})
    assert (error["code"], error["line"]) == ("too-many-rejects", 5)


async def test_exactly_as_many_rejects_as_allowed_succeed(scene: Scene) -> None:
    content = b"id,w\n" + b"".join(b"%d,a\nx%d,b\n" % (n, n) for n in range(20))
    task = await scene.succeed(content, on_error="skip", max_rejects=20, csv={"columns": {"id": "bigint"}})
    assert (task.rows_done, task.rejects) == (20, 20)


# --- a source that changes under a paused import


@pytest.mark.parametrize("change", ["replaced", "deleted"])
async def test_a_source_that_changed_during_a_pause_is_never_mixed_in(scene: Scene, change: str) -> None:
    body = b"id,w\n" + b"".join(b"%d,aaaaaaaaaaaaaaaa\n" % n for n in range(2000))
    source = await scene.file(body)
    task_id = await scene.begin(source, max_bytes_per_second=2000)
    await scene.when(task_id, lambda task: task.rows_done > 0)
    await scene.command(task_id, Command.PAUSE)
    paused = await scene.until(task_id, TaskState.PAUSED)
    assert 0 < paused.rows_done < 2000
    if change == "replaced":
        await scene.objects.put(source.object_key, body.replace(b"a", b"b"))
    else:
        await scene.objects.delete(source.object_key)
    await scene.command(task_id, Command.RESUME)
    failed = await scene.until(task_id, TaskState.FAILED)
    assert failed.error is not None
    assert failed.error["code"] == "source-changed"
    assert "abort" in failed.error["detail"]
    await scene.abort(task_id)
    assert await scene.leftovers(task_id) == {}


async def test_a_failed_import_goes_on_from_its_checkpoint_when_resumed(scene: Scene) -> None:
    """The same record is bad again, with the same line; what was loaded before is not loaded again."""
    error = await scene.fail(b"id\n" + b"123456789\n" * 200 + b"x\n" + b"1\n" * 50, csv={"columns": {"id": "bigint"}})
    first = await scene.store.get(error["task_id"])
    assert (await scene.command(error["task_id"], Command.RESUME)).status == 202
    again = await scene.when(error["task_id"], lambda task: task.state is TaskState.FAILED and task.claims > 1)
    assert first is not None
    assert again.error is not None
    assert (error["line"], again.error["line"]) == (202, 202)
    assert again.rows_done >= first.rows_done
    counted = await scene.value(f"SELECT count(*) FROM sluice_loads.load_{error['task_id']}")
    assert counted == again.rows_done
