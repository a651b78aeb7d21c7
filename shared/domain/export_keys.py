"""What the objects of an export are called; whoever writes them and whoever looks after them must agree."""

from shared.domain.task import TaskId

WHOLE = 0
"""The number of what the segments, from 1 on, are joined into."""
_WHOLE_NAME = "whole"


def prefix(task_id: TaskId) -> str:
    """What the keys of a task's objects begin with."""
    return f"exports/{task_id}/"


def key_of(task_id: TaskId, segment: int, nonce: str) -> str:
    return f"{prefix(task_id)}{segment or _WHOLE_NAME}-{nonce}"


def segment_of(key: str) -> int:
    name = key.rpartition("/")[2].partition("-")[0]
    return WHOLE if name == _WHOLE_NAME else int(name)
