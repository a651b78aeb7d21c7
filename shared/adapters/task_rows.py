"""Rows of `sluice.tasks` as tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from shared.domain.schedule import RunWindow
from shared.domain.task import Kind, Task, TaskState

TASK_COLUMNS = ", ".join(f"t.{f.name}" for f in fields(Task))


def task_of(row: Mapping[str, Any]) -> Task:
    values = {f.name: row[f.name] for f in fields(Task)}
    window = values["run_window"]
    return Task(
        **{
            **values,
            "kind": Kind(values["kind"]),
            "state": TaskState(values["state"]),
            "run_window": RunWindow.model_validate(window) if window else None,
        }
    )


def rows_to_tasks(rows: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Rows of `SELECT` over the columns of `Task`, as tasks."""
    return [task_of(row) for row in rows]
