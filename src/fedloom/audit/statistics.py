"""Figures of attacks, and how sure they are: areas under the ROC curve, shares, means, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import mean

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedloom.core.mean_interval import Z95

HALVINGS = 40
"""Of an interval of length 1 until its middle is right to twelve digits."""


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Chance that a positive scores higher than a negative; a tie counts half (0.5: the score tells nothing).

    >>> auc([2.0, 1.0], [1.0, 0.0])
    0.875
    """
    gaps = np.subtract.outer(np.asarray(positive, float), np.asarray(negative, float))
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def auc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """Return the 95 % interval of an area under the ROC curve, which is of use at 0 and 1, too.

    Source: Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2", Statistics in
    Medicine 25, 2006, method 5: the areas whose own standard error (Hanley and McNeil 1982) reaches the one that was seen.

    >>> [round(end, 2) for end in auc_interval(1.0, 20, 20)]
    [0.9, 1.0]
    """
    more = (positives + negatives) / 2 - 1

    def error(true: float) -> float:
        spread = 1 + more * ((1 - true) / (2 - true) + true / (1 + true))
        return math.sqrt(max(0.0, true * (1 - true) * spread) / (positives * negatives))

    low = _boundary(0.0, area, lambda true: area - true > Z95 * error(true))
    return low, _boundary(1.0, area, lambda true: true - area > Z95 * error(true))


@lru_cache(maxsize=1024)
def share_interval(right: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share, from how many trials went right (Clopper and Pearson, Biometrika 26, 1934).

    >>> [round(end, 4) for end in share_interval(0, 10)]
    [0.0, 0.3085]
    """
    tail = (1 - confidence) / 2
    seen = right / trials
    low = 0.0 if right == 0 else _boundary(0.0, seen, lambda true: at_least(right, trials, true) < tail)
    high = 1.0 if right == trials else _boundary(1.0, seen, lambda true: 1 - at_least(right + 1, trials, true) < tail)
    return low, high


def at_least(count: int, trials: int, chance: float) -> float:
    """Return the chance that of so many trials, each right with this chance, at least `count` are right.

    >>> round(at_least(2, 3, 0.5), 6)
    0.5
    """
    return float(binomial_tails(trials, chance)[min(max(count, 0), trials + 1)])


def binomial_tails(trials: int, chance: float) -> NDArray[np.float64]:
    """Return the chances that at least 0, 1, ... `trials` + 1 of so many trials are right: the first is 1, the last 0."""
    k, of = np.arange(trials + 1), _log_factorials(trials)
    if not 0 < chance < 1:
        return np.append(np.where(k == 0, 1.0, float(chance >= 1)), 0.0)
    ways = of[trials] - of[k] - of[trials - k]
    terms = np.exp(ways + k * math.log(chance) + (trials - k) * math.log1p(-chance))
    return np.append(np.minimum(1.0, np.cumsum(terms[::-1])[::-1]), 0.0)


@lru_cache(maxsize=8)
def _log_factorials(count: int) -> NDArray[np.float64]:
    """Return the logarithms of 0! to count!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])


def _boundary(outside: float, inside: float, excluded: Callable[[float], bool]) -> float:
    """Return where `excluded` turns from true, at `outside`, to false, at `inside`; `outside` itself where it is not excluded."""
    if not excluded(outside + (inside - outside) * 1e-12):
        return outside
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if excluded(middle) else (outside, middle)
    return inside


def mean_of(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return mean(values) if values else math.nan
