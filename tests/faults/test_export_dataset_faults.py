"""Exports whose dataset is reverted, replaced or dropped, and whose workers die, while they look at its rows."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from shared.domain.task import Command, LoadId
from tests.exports import add_load, begin_export, content, door, planned, reads, succeeded
from tests.faults.fleet import Fleet
from tests.faults.scene import Scene

COLUMNS = {"n": "bigint", "price": "numeric", "at": "timestamp"}
# Parquet asks for a look at all prices first.
PARQUET = {"format": "parquet"}
CHOSEN = {
    "format": "csv",
    "columns": ["price", "n"],
    "time_column": "at",
    "from_date": "2024-01-01T00:00:10",
    "conditions": [{"column": "n", "op": "!=", "value": 20}],
    "limit": 400,
}


async def add_prices(scene: Scene, dataset: str) -> LoadId:
    return await add_load(
        scene,
        COLUMNS,
        "SELECT n, n / 100.0, '2024-01-01'::timestamp + n * interval '1 s' FROM generate_series(1, 100) n",
        dataset,
    )


async def _revert(scene: Scene, dataset: str, load: LoadId) -> None:
    await scene.catalog.revert(scene.account_id, dataset, load)


async def _replace(scene: Scene, dataset: str, _: LoadId) -> None:
    await add_load(scene, {"other": "date"}, "VALUES ('2024-01-01'::date)", dataset, mode="replace")


async def _drop(scene: Scene, dataset: str, _: LoadId) -> None:
    await scene.catalog.drop(scene.account_id, dataset)


@pytest.mark.parametrize("change", [_revert, _replace, _drop])
@pytest.mark.parametrize("asked", [PARQUET, CHOSEN])
async def test_a_dataset_changed_while_its_rows_are_looked_at_is_exported_as_it_was(
    fleet: Fleet, change: Any, asked: dict[str, Any]
) -> None:
    scene = fleet.scene
    dataset = f"prices{change.__name__}_{asked['format']}"
    # More than are read side by side.
    loads = [await add_prices(scene, dataset) for _ in range(5)]
    undisturbed = await content(scene, await succeeded(scene, await begin_export(scene, dataset, **asked)))
    task_id = await planned(scene, dataset, surveyed=False, **asked)
    async with door(scene, loads[1]) as opened:
        await scene.command(task_id, Command.RESUME)
        await reads(scene, loads[1])
        # It waits behind the export, which is in the middle of its rows, and for nothing else.
        changing = asyncio.create_task(change(scene, dataset, loads[1]))
        await scene.when_value(
            "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'", True
        )
        opened.set()
        await changing
        await scene.catalog.purge()
    assert await content(scene, await succeeded(scene, task_id)) == undisturbed
    gone = loads if change is not _revert else loads[1:2]
    for load in gone:
        await scene.when_value("SELECT to_regclass($1) IS NULL", True, f"sluice_loads.load_{load}")


async def test_a_survey_goes_on_where_its_killed_worker_came(fleet: Fleet) -> None:
    scene = fleet.scene
    loads = [await add_prices(scene, "surveyed") for _ in range(3)]
    undisturbed = await content(scene, await succeeded(scene, await begin_export(scene, "surveyed", **PARQUET)))
    task_id = await planned(scene, "surveyed", surveyed=False, **PARQUET)
    surveyed = "SELECT (plan ->> 'surveyed')::bigint FROM sluice.tasks WHERE task_id = $1"
    begun = await scene.value(surveyed, task_id)
    async with AsyncExitStack() as behind:
        doors = [await behind.enter_async_context(door(scene, load)) for load in loads[1:]]
        await scene.command(task_id, Command.RESUME)
        await reads(scene, loads[1])
        # It writes down how far it came every two seconds.
        await asyncio.sleep(2.1)
        doors[0].set()
        await scene.when_value(f"SELECT ({surveyed}) > $2", True, task_id, begun)
        for worker in fleet.workers:
            worker.kill()
        await scene.fetch("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE NOT granted")
        # What was looked at is not to be had any more.
        async with door(scene, loads[0]):
            await fleet.whole()
            await reads(scene, loads[2])
            doors[1].set()
            await scene.when_value(
                "SELECT plan -> 'digits' ? 'price' FROM sluice.tasks WHERE task_id = $1", True, task_id
            )
    assert await content(scene, await succeeded(scene, task_id)) == undisturbed
