"""CPU and wall seconds of calls, and how the benchmarks print them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Time:
    """CPU and wall seconds of one call."""

    cpu: float
    wall: float


def sample(call: Callable[[], object], calls: int = 1) -> Time:
    """The mean of some calls in a row; a millisecond alone is too short for the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return Time((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


def show(name: str, times: Sequence[Time]) -> None:
    """Two lines of a table."""
    print(f"  {name:9s} CPU ms    {spread([t.cpu * 1e3 for t in times])}")
    print(f"  {'':9s} wall ms   {spread([t.wall * 1e3 for t in times])}")


def ratio(theirs: Sequence[Time], ours: Sequence[Time]) -> float:
    """Of the medians of CPU seconds."""
    return median(t.cpu for t in theirs) / median(t.cpu for t in ours)


def spread(values: Sequence[float]) -> str:
    """Median (minimum - maximum)."""
    return f"{median(values):10.2f} ({min(values):.2f} - {max(values):.2f}, n={len(values)})"


def against(figure: float, bar: float | None) -> str:
    """Whether a bar to be reached, if there is one, was."""
    return "" if bar is None else f" (bar {bar:.0f}x: {'met' if figure >= bar else 'MISSED'})"


def under(figure: float, bar: float) -> str:
    """Whether a figure that a bar bounds from above stayed under it."""
    return f"(bar {bar:g}: {'met' if figure <= bar else 'MISSED'})"
