"""Figures for people and machines."""

import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

MB = 1_000_000


def say(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all do not exceed (nearest rank): of 50, the 99th is the greatest."""
    ranked = sorted(values)
    return ranked[max(0, -int(-percent * len(ranked) // 100) - 1)]


def milliseconds(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """`name_p50_ms` and `name_p99_ms`."""
    return {f"{name}_p{percent}_ms": round(percentile(seconds, percent) * 1000, 1) for percent in (50, 99)}


def latency_line(title: str, seconds: Sequence[float], goal: float | None = None) -> str:
    """One row of a table in milliseconds: p50, p99, the greatest, how many, and the goal for p99."""
    figures = (statistics.median(seconds), percentile(seconds, 99), max(seconds))
    row = "".join(f"{figure * 1000:9.1f}" for figure in figures)
    return f"{title:<38}{row}{len(seconds):6d}" + (f"   {goal * 1000:.0f}" if goal is not None else "")


def table(rows: Mapping[str, Any]) -> None:
    for title, value in rows.items():
        say(f"  {title:<34} {value}")
