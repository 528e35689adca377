"""What the terminal shows of a run while it goes on, and the command that goes on with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from rich.progress import Progress

if TYPE_CHECKING:
    from fedloom.core.events import Command, Event
    from fedloom.core.policies import Observer
    from fedloom.runs.job import Job


def resume_command(arguments: list[str], folder: Path) -> str:
    """Return the command that goes on with an interrupted run: the same one, with --resume in the place of --out."""
    rest, skip = list[str](), False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in ("--out", "--resume"):
            rest.append(argument)
        skip = not skip and argument in ("--out", "--resume")
    return shlex.join([*rest, "--resume", str(folder)])


def progress_observer(progress: Progress, job: Job) -> Observer:
    """Return an observer that moves a bar: versions or virtual time, whichever ends the run first, and what it has reached."""
    from fedloom.core.events import ScoresReady
    from fedloom.runs.observation import RunObservation, VersionMade

    limits, version = job.run.limits, job.resumed_from.version if job.resumed_from else 0
    observation = RunObservation(version=version)
    bar = progress.add_task(f"{type(job.run.aggregator).__name__:8s}", total=1.0, now="")
    progress.update(bar, completed=version / limits.versions)
    shown = {"version": f"{version}/{limits.versions}", "time": "", "accuracy": "", "loss": "", "stale": ""}

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        shown["time"] = f"{now:,.0f} virtual s"
        for fact in observation.read(now, event, commands):
            match fact:
                case ScoresReady(_, metrics) if "perplexity" in metrics:
                    shown["accuracy"] = f"ppl {metrics['perplexity']:.1f}"
                case ScoresReady(_, metrics):
                    shown["accuracy"] = f"acc {100 * metrics['accuracy']:.1f} %"
                case VersionMade():
                    shown["version"] = f"{fact.version}/{limits.versions}"
                    shown["loss"] = f"loss {mean(u.result.metrics.get('loss', 0.0) for u in fact.updates):.2f}"
                    stale = mean(fact.staleness)
                    shown["stale"] = f"{stale:.0f} stale" if stale >= 1 else ""
        done = max(observation.version / limits.versions, now / limits.seconds if limits.seconds else 0.0)
        progress.update(bar, completed=min(done, 1.0), now="  ".join(filter(None, shown.values())))

    return observe
