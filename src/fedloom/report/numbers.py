"""Numbers in words: percent, bytes, seconds, each with its unit and no more digits than it deserves.

The space before a unit does not break (U+00A0), so that no line starts with a lone unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
NONE = "\u2013"
BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
SPANS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"))


def to_float(value: object) -> float:
    """Return a number of the log as a float; what is absent or no number is NaN, which plots as a gap."""
    return float(value) if isinstance(value, int | float) else math.nan


def percent(share: float) -> str:
    """Format a share in percent.

    >>> percent(0.8734)
    '87.3\\xa0%'
    """
    return NONE if math.isnan(share) else f"{100 * share:.1f}\u00a0%"


def format_bytes(count: float) -> str:
    """Format a number of bytes.

    >>> format_bytes(14_200_000)
    '14.2\\xa0MB'
    """
    if math.isnan(count):
        return NONE
    divisor, unit = next((pair for pair in BYTES if abs(count) >= pair[0]), BYTES[-1])
    return f"{short(count / divisor)}\u00a0{unit}"


def short(value: float) -> str:
    """Format a number to three significant digits, with thousands set apart.

    >>> [short(x) for x in (0.0123, 1.5, 14.24, 812.4, 12345.6)]
    ['0.012', '1.50', '14.2', '812', '12,346']
    """
    if math.isnan(value):
        return NONE
    large = abs(value)
    digits = 0 if large >= 100 or value == int(value) else 1 if large >= 10 else 2 if large >= 1 else 3
    return f"{value:,.{digits}f}"


def format_count(many: float) -> str:
    """Format a whole number.

    >>> format_count(1200.0)
    '1,200'
    """
    return NONE if math.isnan(many) else f"{int(many):,}"


def format_seconds(span: float) -> str:
    """Format a span of time in seconds.

    >>> format_seconds(812.4)
    '812\\xa0s'
    """
    return NONE if math.isnan(span) else f"{short(span)}\u00a0s"


def format_duration(span: float) -> str:
    """Format a span of time in the unit that fits.

    >>> format_duration(26.07), format_duration(5400), format_duration(259_200)
    ('26.1\\xa0s', '90\\xa0min', '72\\xa0h')
    """
    if math.isnan(span):
        return NONE
    second, unit = axis_unit([span], SPANS)
    return f"{short(span / second)}\u00a0{unit}"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun.

    >>> plural(1, "round"), plural(1200, "round")
    ('1 round', '1,200 rounds')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """Choose at most `limit` of the items, evenly over their order.

    >>> evenly(range(10), 4)
    [0, 2, 5, 7]
    """
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def axis_unit(values: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """Choose the unit of an axis: the largest in which the longest value is still at least two."""
    top = max((value for value in values if math.isfinite(value)), default=0.0)
    return next((pair for pair in units if top >= 2 * pair[0]), units[-1])
