"""How imports meet a dataset: create, append, replace, several at once; and how loads leave it again."""

import asyncio

import pytest

from shared.domain.errors import Conflict, LockTimeout, NotFound
from shared.domain.task import LoadId, TaskState
from tests.faults.scene import Scene


async def load_tables(scene: Scene) -> set[int]:
    """The loads of this account that exist as tables."""
    rows = await scene.fetch(
        "SELECT task_id FROM sluice.tasks WHERE account_id = $1 AND EXISTS"
        " (SELECT FROM pg_class WHERE relname = 'load_' || task_id)",
        scene.account_id,
    )
    return {row["task_id"] for row in rows}


# --- create


async def test_create_refuses_a_dataset_that_is_there_and_leaves_it_alone(scene: Scene) -> None:
    first = await scene.succeed(b"a,b\n1,2\n")
    error = await scene.fail(b"a,b\n3,4\n", mode="create")
    assert error["code"] == "conflict"
    assert "append or replace" in error["detail"]
    await scene.abort(error["task_id"])
    assert await scene.leftovers(error["task_id"]) == {}
    assert await scene.rows() == [(1, 2)]
    assert await load_tables(scene) == {first.task_id}


async def test_of_two_imports_that_create_the_same_dataset_one_wins(scene: Scene) -> None:
    ids = [await scene.begin(b"a,b\n%d,2\n" % n) for n in range(4)]
    tasks = [await scene.until(task_id, TaskState.SUCCEEDED, TaskState.FAILED) for task_id in ids]
    winners = [task for task in tasks if task.state is TaskState.SUCCEEDED]
    assert len(winners) == 1
    assert {task.error["code"] for task in tasks if task.error} == {"conflict"}
    assert await scene.rows() == [(ids.index(winners[0].task_id), 2)]


async def test_first_imports_of_a_new_account_into_several_datasets_run_side_by_side(scene: Scene) -> None:
    ids = [await scene.begin(b"a,b\n%d,2\n" % n, f"data{n}") for n in range(4)]
    for n, task_id in enumerate(ids):
        await scene.until(task_id, TaskState.SUCCEEDED)
        assert await scene.rows(f"data{n}") == [(n, 2)]


# --- append


async def test_append_needs_a_dataset(scene: Scene) -> None:
    error = await scene.fail(b"a,b\n1,2\n", mode="append")
    assert error["code"] == "not-found"
    assert "create" in error["detail"]


async def test_append_takes_the_types_of_the_dataset_and_columns_in_any_order(scene: Scene) -> None:
    await scene.succeed(b"code,n\nA1,1\n")
    await scene.succeed(b"n,code\n2,007\n", mode="append")
    assert await scene.columns() == {"code": "text", "n": "bigint"}
    assert sorted(await scene.rows()) == [("007", 2), ("A1", 1)]


@pytest.mark.parametrize(
    ("content", "said"), [(b"a,c\n1,2\n", ["'b'", "'c'", "evolve"]), (b"a\n1\n", ["'b'"]), (b"a,b,c\n1,2,3\n", ["'c'"])]
)
async def test_a_strict_append_names_the_columns_that_differ(scene: Scene, content: bytes, said: list[str]) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    error = await scene.fail(content, mode="append")
    assert error["code"] == "schema-mismatch"
    assert [word for word in said if word not in error["detail"]] == []
    assert await scene.rows() == [(1, 2)]


async def test_an_append_may_evolve_the_dataset_by_new_columns(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    await scene.succeed(b"c,a\nx,3\n", mode="append", schema_mode="evolve")
    assert await scene.columns() == {"a": "bigint", "b": "bigint", "c": "text"}
    assert await scene.rows() == [(1, 2, None), (3, None, "x")]


async def test_a_column_never_changes_its_type_by_an_append(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    error = await scene.fail(b"a,b\n1,x\n", mode="append", schema_mode="evolve", csv={"columns": {"b": "text"}})
    assert error["code"] == "schema-mismatch"
    assert "bigint there, text here" in error["detail"]


async def test_loads_side_by_side_into_one_dataset_are_all_there(scene: Scene) -> None:
    await scene.succeed(b"load,n\n0,0\n")
    content = {load: b"load,n\n" + b"".join(b"%d,%d\n" % (load, n) for n in range(300)) for load in range(1, 5)}
    ids = [await scene.begin(body, mode="append") for body in content.values()]
    for task_id in ids:
        await scene.until(task_id, TaskState.SUCCEEDED)
    counted = await scene.fetch(f"SELECT load, count(*), sum(n) FROM {scene.table()} GROUP BY load ORDER BY load")
    assert [tuple(row.values()) for row in counted] == [(0, 1, 0), *((load, 300, 44850) for load in range(1, 5))]


async def test_evolving_appends_side_by_side_each_add_their_column(scene: Scene) -> None:
    await scene.succeed(b"a,b\n0,0\n")
    ids = [
        await scene.begin(b"a,b,c%d\n1,2,3\n" % n, mode="append", schema_mode="evolve", csv={"header": True})
        for n in range(3)
    ]
    for task_id in ids:
        await scene.until(task_id, TaskState.SUCCEEDED)
    assert set(await scene.columns()) == {"a", "b", "c0", "c1", "c2"}
    assert await scene.value(f"SELECT count(*) FROM {scene.table()}") == 4
    assert await scene.value(f"SELECT sum(c0) + sum(c1) + sum(c2) FROM {scene.table()}") == 9


# --- replace


async def test_replace_swaps_rows_and_columns_in_one_moment(scene: Scene) -> None:
    first = await scene.succeed(b"a,b\n1,2\n")
    await scene.succeed(b"a,b\n3,4\n", mode="append")
    await scene.fetch(f"CREATE VIEW data_{scene.username}.kept AS SELECT a FROM {scene.table()}")
    last = await scene.succeed(b"a,c\n5,x\n", mode="replace")
    assert await scene.columns() == {"a": "bigint", "c": "text"}
    assert await scene.rows() == [(5, "x")]
    assert [tuple(row.values()) for row in await scene.fetch(f"SELECT * FROM data_{scene.username}.kept")] == [(5,)]
    assert last.result is not None
    assert first.task_id in last.result["replaced_loads"]
    await scene.catalog.purge()
    assert await load_tables(scene) == {last.task_id}


async def test_replace_makes_the_dataset_where_there_is_none(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n", mode="replace")
    assert await scene.rows() == [(1, 2)]


async def test_a_replace_that_fails_leaves_the_old_rows(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    error = await scene.fail(b"a,b\n3,4\n5\n", mode="replace")
    assert await scene.rows() == [(1, 2)]
    await scene.abort(error["task_id"])
    assert await scene.rows() == [(1, 2)]


async def test_a_replace_that_would_break_a_view_says_so_and_leaves_everything(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    await scene.fetch(f"CREATE VIEW data_{scene.username}.report AS SELECT b FROM {scene.table()}")
    error = await scene.fail(b"a,c\n3,4\n", mode="replace")
    assert error["code"] == "conflict"
    assert "report" in error["detail"]
    assert await scene.rows() == [(1, 2)]


async def test_of_replaces_side_by_side_one_remains_whole(scene: Scene) -> None:
    ids = [await scene.begin(b"a,b\n" + b"%d,2\n" % n * 50, mode="replace") for n in range(4)]
    for task_id in ids:
        await scene.until(task_id, TaskState.SUCCEEDED)
    assert await scene.value(f"SELECT count(*) FROM {scene.table()}") == 50
    assert await scene.value(f"SELECT count(DISTINCT a) FROM {scene.table()}") == 1


# --- leaving again


async def test_a_reverted_load_is_gone_and_the_others_stay(scene: Scene) -> None:
    first = await scene.succeed(b"a,b\n1,2\n")
    second = await scene.succeed(b"a,b\n3,4\n", mode="append")
    await scene.catalog.revert(scene.account_id, "data", LoadId(first.task_id))
    assert await scene.rows() == [(3, 4)]
    assert await load_tables(scene) == {second.task_id}
    with pytest.raises(NotFound):
        await scene.catalog.revert(scene.account_id, "data", LoadId(first.task_id))


async def test_nobody_reverts_or_drops_what_another_account_has(scene: Scene) -> None:
    task = await scene.succeed(b"a,b\n1,2\n")
    other = await scene.another_account()
    for attempt in (
        other.catalog.revert(other.account_id, "data", LoadId(task.task_id)),
        other.catalog.drop(other.account_id, "data"),
    ):
        with pytest.raises(NotFound):
            await attempt
    assert await scene.rows() == [(1, 2)]


async def test_a_dropped_dataset_is_gone_with_all_its_loads_and_its_name_is_free(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    await scene.succeed(b"a,b\n3,4\n", mode="append")
    await scene.catalog.drop(scene.account_id, "data")
    assert await load_tables(scene) == set()
    assert await scene.value("SELECT count(*) FROM sluice.loads WHERE account_id = $1", scene.account_id) == 0
    await scene.succeed(b"x,y\n5,6\n")
    assert await scene.rows() == [(5, 6)]


@pytest.mark.parametrize("what", ["revert", "drop"])
async def test_a_long_query_delays_a_revert_or_drop_which_then_works(scene: Scene, what: str) -> None:
    task = await scene.succeed(b"a,b\n1,2\n")

    async def leave() -> None:
        if what == "revert":
            await scene.catalog.revert(scene.account_id, "data", LoadId(task.task_id))
        else:
            await scene.catalog.drop(scene.account_id, "data")

    async with scene.database.transaction() as reader:
        assert await reader.fetchval(f"SELECT count(*) FROM {scene.table()}") == 1
        with pytest.raises(LockTimeout, match="try again"):
            await leave()
        assert await reader.fetchval(f"SELECT count(*) FROM {scene.table()}") == 1
    await leave()
    assert await load_tables(scene) == set()


async def test_a_long_query_holds_up_no_create_and_no_append(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    async with scene.database.transaction() as reader:
        assert await reader.fetchval(f"SELECT count(*) FROM {scene.table()}") == 1
        await scene.succeed(b"a,b\n3,4\n", mode="append")
    assert await scene.rows() == [(1, 2), (3, 4)]


async def test_a_replace_waits_for_a_long_query_and_is_then_done(scene: Scene) -> None:
    """The lock is not granted in time: a later attempt gets it, and no batch is loaded twice."""
    await scene.succeed(b"a,b\n1,2\n")
    async with scene.database.transaction() as reader:
        assert await reader.fetchval(f"SELECT count(*) FROM {scene.table()}") == 1
        task_id = await scene.begin(b"a,b\n3,4\n", mode="replace")
        waiting = await scene.when(task_id, lambda task: task.error is not None)
        assert waiting.error is not None
        assert waiting.error["code"] == "lock-timeout"
        assert await reader.fetchval(f"SELECT sum(a) FROM {scene.table()}") == 1
    await scene.until(task_id, TaskState.SUCCEEDED)
    assert await scene.rows() == [(3, 4)]


async def test_a_pinned_load_leaves_its_dataset_at_once_and_is_dropped_after_the_last_pin(scene: Scene) -> None:
    task = await scene.succeed(b"a,b\n1,2\n")
    pins = [await scene.begin(b"", f"reader{n}") for n in range(2)]
    for pin in pins:
        await scene.fetch("INSERT INTO sluice.load_pins (load_id, task_id) VALUES ($1, $2)", task.task_id, pin)
    await scene.catalog.revert(scene.account_id, "data", LoadId(task.task_id))
    assert await scene.rows() == []
    for pin in pins:
        await scene.catalog.purge()
        found = await scene.fetch(f"SELECT a, b FROM sluice_loads.load_{task.task_id}")
        assert [tuple(row.values()) for row in found] == [(1, 2)]
        await scene.fetch("DELETE FROM sluice.load_pins WHERE task_id = $1", pin)
    await scene.catalog.purge()
    assert await load_tables(scene) == set()


async def test_what_depends_on_a_dataset_is_named_when_it_is_dropped(scene: Scene) -> None:
    await scene.succeed(b"a,b\n1,2\n")
    await scene.fetch(f"CREATE VIEW data_{scene.username}.report AS SELECT a FROM {scene.table()}")
    with pytest.raises(Conflict, match="report"):
        await scene.catalog.drop(scene.account_id, "data")
    assert await scene.rows() == [(1, 2)]


async def test_a_revert_and_an_append_at_the_same_time_both_happen(scene: Scene) -> None:
    first = await scene.succeed(b"a,b\n1,2\n")
    task_id = await scene.begin(b"a,b\n3,4\n", mode="append")
    async with asyncio.TaskGroup() as group:
        group.create_task(scene.catalog.revert(scene.account_id, "data", LoadId(first.task_id)))
        group.create_task(scene.until(task_id, TaskState.SUCCEEDED))
    assert await scene.rows() == [(3, 4)]
