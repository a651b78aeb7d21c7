"""How much of a dataset an export reads at a time."""

import pytest

from shared.domain.task import LoadId
from tests.exports import add_load, content, export
from tests.faults.scene import Scene

NAMES = [f"a_rather_long_name_of_column_{number}" for number in range(12)]


@pytest.fixture
async def named(exporting: Scene) -> LoadId:
    """A load in which names are much longer than values."""
    values = ", ".join(f"n % {number + 2}" for number in range(len(NAMES)))
    return await add_load(
        exporting, dict.fromkeys(NAMES, "bigint"), f"SELECT {values} FROM generate_series(1, 200000) n"
    )


@pytest.mark.parametrize("form", ["csv", "jsonl"])
async def test_an_answer_is_about_a_part(exporting: Scene, named: LoadId, form: str) -> None:
    task = await export(exporting, format=form)
    assert task.plan is not None
    [load] = task.plan["loads"]
    reads = -(-load["blocks"] // load["blocks_per_read"])
    assert len(await content(exporting, task)) / reads < 1.5 * task.plan["part_bytes"]
