"""Exports as tasks: commanded, refused, and run while their dataset changes."""

import asyncio
import random
from typing import Any

import pytest

from shared.domain.export_params import ExportRequest
from shared.domain.task import Command, LoadId, TaskId, TaskState
from shared.ports.objects import MIN_PART_BYTES
from tests.exports import (
    add_load,
    add_numbers,
    add_rare,
    begin_export,
    content,
    export,
    export_fails,
    leftovers,
    out_of_reach,
    planned,
    reads,
    reference,
    succeeded,
)
from tests.faults.scene import Scene

# About 60 MB: ten parts.
ROWS = 280_000
SLOWLY = 3 * MIN_PART_BYTES


async def paused(scene: Scene, task_id: TaskId) -> None:
    await scene.command(task_id, Command.PAUSE)
    await scene.until(task_id, TaskState.PAUSED)


async def begin_slowly(scene: Scene, **params: Any) -> TaskId:
    """An export of which a part is written, and much is not."""
    task_id = await begin_export(scene, max_bytes_per_second=SLOWLY, **params)
    await scene.when(task_id, lambda task: task.bytes_done > 0)
    return task_id


@pytest.mark.parametrize("form", ["csv", "jsonl.gz"])
async def test_an_export_paused_and_resumed_writes_the_same_bytes(exporting: Scene, form: str) -> None:
    load = await add_numbers(exporting, ROWS)
    undisturbed = await content(exporting, await export(exporting, format=form))
    if form == "csv":
        assert undisturbed == await reference(exporting, [load], ["n", "filling"])
    task_id = await begin_export(exporting, format=form, max_bytes_per_second=4 * SLOWLY)
    for _ in range(3):
        await asyncio.sleep(random.uniform(0, 0.3))
        await exporting.command(task_id, Command.PAUSE)
        task = await exporting.until(task_id, TaskState.PAUSED, TaskState.SUCCEEDED)
        if task.state is TaskState.SUCCEEDED:
            break
        assert [upload async for upload in exporting.objects.list_uploads(f"exports/{task_id}/")] == []
        await exporting.command(task_id, Command.RESUME)
    assert await content(exporting, await succeeded(exporting, task_id)) == undisturbed


@pytest.mark.parametrize("form", ["csv", "parquet", "xlsx"])
async def test_a_pause_keeps_what_a_scan_has_found_though_it_fills_no_part(exporting: Scene, form: str) -> None:
    loads = [await add_rare(exporting, 100) for _ in range(3)]
    asked: dict[str, Any] = {"format": form, "conditions": [{"column": "n", "op": ">", "value": 0}]}
    undisturbed = await content(exporting, await export(exporting, **asked))
    task_id = await planned(exporting, **asked)
    for number, load in enumerate(loads):
        # What was read in no time is not worth keeping.
        for seconds in (1, 2, 4):
            async with out_of_reach(exporting, load):
                await exporting.command(task_id, Command.RESUME)
                await reads(exporting, load)
                await asyncio.sleep(seconds)
                await paused(exporting, task_id)
            task = await exporting.until(task_id, TaskState.PAUSED)
            if task.rows_done == 10 * number:
                break
        assert task.rows_done == 10 * number
    await exporting.command(task_id, Command.RESUME)
    assert await content(exporting, await succeeded(exporting, task_id)) == undisturbed


async def test_segments_are_joined_inside_the_store(exporting: Scene) -> None:
    load = await add_numbers(exporting, ROWS)
    task_id = await begin_slowly(exporting)
    await paused(exporting, task_id)
    sealed = await exporting.fetch("SELECT object_key, upload_id FROM sluice.object_ledger WHERE task_id = $1", task_id)
    assert [row["upload_id"] for row in sealed] == [None]
    await exporting.command(task_id, Command.RESUME)
    task = await succeeded(exporting, task_id)
    assert await content(exporting, task) == await reference(exporting, [load], ["n", "filling"])
    assert task.result is not None
    assert "/whole-" in await exporting.value(
        "SELECT object_key FROM sluice.files WHERE file_id = $1", task.result["file_id"]
    )


@pytest.mark.parametrize("when", ["running", "paused", "sealed twice", "failed"])
async def test_an_abort_leaves_nothing(exporting: Scene, when: str) -> None:
    await add_numbers(exporting, ROWS)
    if when == "failed":
        await exporting.file(b"", "taken.csv")
        task_id = await begin_export(exporting, file_name="taken.csv")
        await exporting.until(task_id, TaskState.FAILED)
    else:
        task_id = await begin_slowly(exporting)
    if when in ("paused", "sealed twice"):
        await paused(exporting, task_id)
    if when == "sealed twice":
        before = (await exporting.until(task_id, TaskState.PAUSED)).bytes_done
        await exporting.command(task_id, Command.RESUME)
        await exporting.when(task_id, lambda task: task.bytes_done > before)
        await paused(exporting, task_id)
    await exporting.abort(task_id)
    assert await leftovers(exporting, task_id) == {}
    assert await exporting.value("SELECT count(*) FROM sluice.files WHERE task_id = $1", task_id) == 0


async def _revert(scene: Scene, load: LoadId) -> None:
    await scene.catalog.revert(scene.account_id, "data", load)


async def _drop(scene: Scene, _: LoadId) -> None:
    await scene.catalog.drop(scene.account_id, "data")


async def _replace(scene: Scene, _: LoadId) -> None:
    await add_load(scene, {"other": "date"}, "VALUES ('2024-01-01'::date)", mode="replace")


@pytest.mark.parametrize("change", [_revert, _drop, _replace])
@pytest.mark.parametrize("state", [TaskState.RUNNING, TaskState.PAUSED])
async def test_a_change_of_the_dataset_neither_waits_for_an_export_nor_shows_in_it(
    exporting: Scene, change: Any, state: TaskState
) -> None:
    load = await add_numbers(exporting, ROWS)
    expected = await reference(exporting, [load], ["n", "filling"])
    task_id = await begin_slowly(exporting)
    if state is TaskState.PAUSED:
        await paused(exporting, task_id)
    await change(exporting, load)
    assert (await exporting.store.get(task_id)).state is state  # type: ignore[union-attr]
    if change is _replace:
        assert await exporting.rows() != []
    await exporting.command(task_id, Command.RESUME)
    assert await content(exporting, await succeeded(exporting, task_id)) == expected
    await exporting.catalog.purge()
    assert await exporting.value("SELECT to_regclass('sluice_loads.load_' || $1::bigint) IS NULL", load)


async def test_what_comes_after_the_snapshot_is_not_in_the_file(exporting: Scene) -> None:
    load = await add_numbers(exporting, ROWS)
    expected = await reference(exporting, [load], ["n", "filling"])
    task_id = await begin_slowly(exporting)
    await add_load(exporting, {"new": "text"}, "VALUES ('later')")
    assert await content(exporting, await succeeded(exporting, task_id)) == expected


async def test_another_file_is_replaced_only_when_asked(exporting: Scene) -> None:
    load = await add_numbers(exporting, 10)
    other = await exporting.file(b"mine", "out.csv")
    assert "there is a file 'out.csv' already" in await export_fails(exporting, file_name="out.csv")
    task = await export(exporting, file_name="out.csv", overwrite=True)
    assert await content(exporting, task) == await reference(exporting, [load], ["n", "filling"])
    assert await exporting.value("SELECT deleted_at IS NOT NULL FROM sluice.files WHERE file_id = $1", other.file_id)


async def test_a_name_taken_meanwhile_fails_the_export_and_a_resume_ends_it(exporting: Scene) -> None:
    await add_numbers(exporting, ROWS)
    task_id = await begin_slowly(exporting, file_name="out.csv")
    await exporting.file(b"mine", "out.csv")
    task = await exporting.until(task_id, TaskState.FAILED)
    assert task.error is not None
    assert task.error["code"] == "conflict"
    async with exporting.database.connection() as connection:
        await connection.execute("UPDATE sluice.files SET deleted_at = now() WHERE name = 'out.csv'")
    await exporting.command(task_id, Command.RESUME)
    await succeeded(exporting, task_id)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"dataset": "nothing"}, "there is no dataset 'nothing'"),
        ({"load_id": 10**9}, "has no load 1000000000"),
        ({"columns": ["n", "m"]}, "there is no column 'm'; there are 'n', 'filling'"),
        ({"time_column": "n", "from_date": "2024-01-01"}, "'n' is bigint; a time range needs date"),
        ({"conditions": [{"column": "x", "op": "is_null"}]}, "there is no column 'x'"),
        ({"conditions": [{"column": "n", "op": "=", "value": True}]}, "'n' is bigint, which True is not"),
        ({"conditions": [{"column": "filling", "op": "=", "value": 1}]}, "'filling' is text, which 1 is not"),
        ({"conditions": [{"column": "n", "op": "=", "value": "one"}]}, 'invalid input syntax for type bigint: "one"'),
        ({"conditions": [{"column": "n", "op": "=", "value": str(2**70)}]}, "out of range for type bigint"),
        (
            {"conditions": [{"column": "n", "op": "in", "value": [1, 1.5]}]},
            'invalid input syntax for type bigint: "1.5',
        ),
    ],
)
async def test_what_does_not_fit_the_dataset_fails_with_the_reason(
    exporting: Scene, asked: dict[str, Any], told: str
) -> None:
    await add_numbers(exporting, 10)
    assert told in await export_fails(exporting, **{"dataset": "data", **asked})


async def test_another_accounts_dataset_is_unknown(exporting: Scene) -> None:
    await add_numbers(exporting, 10)
    stranger = await exporting.another_account()
    assert "there is no dataset 'data'" in await export_fails(stranger)


async def test_totals_are_known_or_guessed_while_it_runs(exporting: Scene) -> None:
    await add_numbers(exporting, ROWS)
    whole = await begin_slowly(exporting)
    some = await begin_slowly(exporting, conditions=[{"column": "n", "op": ">", "value": 10}])
    task = await exporting.store.get(whole)
    assert task is not None
    assert task.rows_total == ROWS
    assert task.bytes_total is not None
    assert 0.5 < task.bytes_total / (ROWS * 213) < 2
    task = await exporting.store.get(some)
    assert task is not None
    assert task.rows_total is not None
    assert 0.5 < task.rows_total / ROWS < 2
    for task_id in (whole, some):
        await exporting.abort(task_id)


def test_the_request_is_stored_as_it_was_asked() -> None:
    asked = {
        "kind": "export",
        "dataset": "d",
        "from_date": "2024-01-01",
        "conditions": [{"column": "n", "op": "in", "value": [1, "2", 2.5]}, {"column": "b", "op": "=", "value": False}],
    }
    once = ExportRequest.model_validate(asked)
    assert ExportRequest.model_validate(once.model_dump(mode="json")) == once
