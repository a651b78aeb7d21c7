"""What is done of a task and what is left: disjoint ranges of positions. Pure; a value, never changed in place."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Positions `start <= p < end`, with the number of lines in them (0 where a kind of task has no lines)."""

    start: int
    end: int
    lines: int = 0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The durable record from which any worker can go on.

    `done` is sorted, disjoint, and as short as it can be: neighbours are one range. With n lanes it has at most
    n + 1 entries, however long the task. `cursor` is what a kind needs besides (a seek point, say); it is replaced,
    not merged.
    """

    done: tuple[Range, ...] = ()
    cursor: dict[str, Any] = field(default_factory=dict)

    def add(self, new: Range) -> "Checkpoint":
        """With `new` done as well.

        Raises ValueError when a part of `new` was done before: a batch that is done twice is a lost invariant.
        """
        if new.start > new.end:
            raise ValueError(f"a range that ends before it starts: {new}")
        if new.start == new.end and not new.lines:
            return self
        before = [r for r in self.done if r.end <= new.start]
        after = [r for r in self.done if r.start >= new.end]
        if len(before) + len(after) != len(self.done):
            raise ValueError(f"{new} overlaps what is done: {self.done}")
        return Checkpoint(_joined([*before, new, *after]), self.cursor)

    def missing(self, start: int, end: int | None) -> Iterator[tuple[int, int | None]]:
        """What is not done between `start` and `end`, in order; an unknown `end` (None) leaves the last one open."""
        position = start
        for r in self.done:
            if end is not None and r.start >= end:
                break
            if r.start > position:
                yield position, r.start
            position = max(position, r.end)
        if end is None or position < end:
            yield position, end

    def covers(self, start: int, end: int) -> bool:
        return not list(self.missing(start, end))

    def prefix(self, start: int) -> int:
        """The position up to which everything from `start` on is done."""
        return next(self.missing(start, None))[0]

    def lines_before(self, position: int) -> int:
        """Lines in the done ranges before `position`."""
        return sum(r.lines for r in self.done if r.end <= position)

    @property
    def positions(self) -> int:
        return sum(r.end - r.start for r in self.done)

    def done_as_json(self) -> list[list[int]]:
        return [list(r) for r in self.done]

    def as_json(self) -> dict[str, Any]:
        return {"done": self.done_as_json(), "cursor": self.cursor}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Checkpoint":
        done = tuple(Range(*r) for r in stored.get("done", ()))
        return cls(done, stored.get("cursor") or {})


def _joined(ranges: Sequence[Range]) -> tuple[Range, ...]:
    joined: list[Range] = []
    for r in ranges:
        if joined and joined[-1].end == r.start:
            last = joined.pop()
            r = Range(last.start, r.end, last.lines + r.lines)
        joined.append(r)
    return tuple(joined)
