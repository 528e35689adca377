"""How far a run is, in words and as a share, while it goes on: for the bar of the command line, a notebook or a script."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from importlib import import_module
from statistics import mean
from typing import Any

from fedloom.core.events import Command, Event, ScoresReady
from fedloom.core.policies import Observer
from fedloom.runs.job import Job
from fedloom.runs.observation import RunObservation, VersionMade

SHOWN_EVERY = 0.2
"""Seconds between two changes of a line."""
WIDTH = 79
"""Characters of a line in a terminal."""


def progress_observer(job: Job, show: Callable[[float, str], None]) -> Observer:
    """Return an observer that calls `show` with the share of the run that is done (0 to 1) and with what it has reached.

    The share is of versions or of virtual time, whichever ends the run first.
    """
    limits, version = job.run.limits, job.resumed_from.version if job.resumed_from else 0
    observation = RunObservation(version=version)
    words = {"version": f"{version}/{limits.versions}", "time": "", "score": "", "loss": "", "stale": ""}

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        words["time"] = f"{now:,.0f} virtual s"
        for fact in observation.read(now, event, commands):
            match fact:
                case ScoresReady(_, metrics) if "perplexity" in metrics:
                    words["score"] = f"ppl {metrics['perplexity']:.1f}"
                case ScoresReady(_, metrics):
                    words["score"] = f"acc {100 * metrics['accuracy']:.1f} %"
                case VersionMade() if fact.updates:
                    words["version"] = f"{fact.version}/{limits.versions}"
                    losses = [u.result.metrics["loss"] for u in fact.updates if "loss" in u.result.metrics]
                    words["loss"] = f"loss {mean(losses):.2f}" if losses else ""
                    stale = mean(fact.staleness)
                    words["stale"] = f"{stale:.0f} stale" if stale >= 1 else ""
        done = max(observation.version / limits.versions, now / limits.seconds if limits.seconds else 0.0)
        show(min(done, 1.0), "  ".join(filter(None, words.values())))

    show(version / limits.versions, words["version"])
    return observe


@contextmanager
def progress_line(job: Job) -> Iterator[Observer]:
    """Show a line on how far the job is."""
    name = type(job.run.aggregator).__name__
    with show_line() as show:
        yield progress_observer(job, lambda done, text: show(f"{name}  {100 * done:3.0f} %  {text}"))


@contextmanager
def show_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text as one line: in a notebook or on standard error; where that is a file, the last."""
    last, shown_at = "", -SHOWN_EVERY
    live, write, end = _notebook_line() or _terminal_line()

    def show(text: str) -> None:
        nonlocal last, shown_at
        last = text
        if live and time.monotonic() - shown_at >= SHOWN_EVERY:
            write(last)
            shown_at = time.monotonic()

    try:
        yield show
    finally:
        write(last)
        end()


def _terminal_line() -> tuple[bool, Callable[[str], object], Callable[[], object]]:
    """Whether a line can be written again, how it is written, and how it is ended: on standard error."""
    stream = sys.stderr
    if not stream.isatty():
        return False, stream.write, lambda: stream.write("\n")

    def write(text: str) -> None:
        stream.write(f"\r{text[:WIDTH]:{WIDTH}s}")
        stream.flush()

    return True, write, lambda: stream.write("\n")


def _notebook_line() -> tuple[bool, Callable[[str], object], Callable[[], object]] | None:
    """The same in a notebook; None where this is no notebook."""
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    shown: Any = import_module("IPython.display")
    place = shown.display(shown.HTML(""), display_id=True)
    return True, lambda text: place.update(shown.HTML(f"<code>{escape(text)}</code>")), lambda: None
