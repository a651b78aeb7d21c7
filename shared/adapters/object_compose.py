"""How objects are joined inside a store whose parts, but for the last, must have 5 MiB; pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.ports.objects import MIB, MIN_PART_BYTES

COPY_BYTES = 16 * MIB
"""A copied part, unless there would be too many: a pause waits for those that are being made."""
MOST_COPIES = 8_000
"""S3 takes 10,000 parts; where sources meet there are smaller ones."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes `start` to `end` of source number `source`."""

    source: int
    start: int
    end: int
    source_bytes: int

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end == self.source_bytes

    @property
    def copyable(self) -> bool:
        """S3 copies a range only of an object larger than 5 MiB, but any object as a whole."""
        return self.whole or self.source_bytes > MIN_PART_BYTES


def plan_parts(sizes: Sequence[int]) -> list[list[Piece]]:
    """The parts that join sources of these sizes; one of several pieces is small and carried by hand."""
    copy_bytes = max(COPY_BYTES, -(-sum(sizes) // MOST_COPIES))
    plan: list[list[Piece]] = []
    small: list[Piece] = []
    small_bytes = 0
    for source, size in enumerate(sizes):
        at = 0
        while at < size:
            left = size - at
            if small or left < MIN_PART_BYTES:
                take = min(left, MIN_PART_BYTES - small_bytes)
            else:
                take = min(left, copy_bytes)
                if left - take < MIN_PART_BYTES:
                    take = left  # no crumb: it would have to be carried
            small.append(Piece(source, at, at + take, size))
            small_bytes += take
            at += take
            if small_bytes >= MIN_PART_BYTES:
                plan.append(small)
                small, small_bytes = [], 0
    if small:
        plan.append(small)
    return plan
