"""When a run is at a test loss: the place among its scores, in a straight line between two, and what any figure is there."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor
from statistics import mean

from grid import Line

LAST = 2
"""Scores at the end whose mean counts there."""


def losses(line: Line) -> list[float]:
    """Mean cross-entropy of a test answer's token, of the base and of each scored version."""
    return [float(score["loss"]) for score in line["scores"]]


def times(line: Line) -> list[float]:
    """Virtual seconds of each score."""
    return [float(time) for _, time, _ in line["curve"]]


def reached(line: Line, target: float) -> float | None:
    """Where the test loss first is at the target: a place among the scores, in a straight line between two; None: nowhere."""
    found = losses(line)
    at = next((at for at, loss in enumerate(found) if loss <= target), None)
    return at if not at else at - (target - found[at]) / (found[at - 1] - found[at])


def between(figures: Sequence[float], at: float) -> float:
    """A figure of each score at a place between two of them."""
    before, after = figures[floor(at)], figures[ceil(at)]
    return before + (at - floor(at)) * (after - before)


def until(line: Line, figures: Sequence[float], target: float) -> float:
    """A figure of each score, at the target; at the end of the run if it never gets there, which is too little."""
    at = reached(line, target)
    return figures[-1] if at is None else between(figures, at)


def curve(line: Line) -> float:
    """The mean of the test losses of all scored versions but the base: by tasks, not by time."""
    return mean(losses(line)[1:])


def final(line: Line) -> float:
    """The mean of the last `LAST` test losses."""
    return mean(losses(line)[-LAST:])


def accuracy(line: Line) -> float:
    """The share of answers that are right among the words that are allowed, in percent, over the last `LAST` scores."""
    return 100 * mean(float(score["label_accuracy"]) for score in line["scores"][-LAST:])
