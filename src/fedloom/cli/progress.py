"""What the command line shows of a run while it goes on, and how to go on with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedloom.core.events import Command, Event
    from fedloom.core.policies import Observer
    from fedloom.runs.job import Job


def resume_command(arguments: list[str], folder: Path) -> str:
    """The command that goes on with an interrupted run: the same one, with --resume in the place of --out."""
    kept, skip = list[str](), False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in ("--out", "--resume"):
            kept.append(argument)
        skip = not skip and argument in ("--out", "--resume")
    return shlex.join([*kept, "--resume", str(folder)])


def progress_observer(progress: Progress, job: Job) -> Observer:
    """An observer that moves a bar: versions or virtual time, whichever ends the run first, and what it has reached."""
    from fedloom.core.events import Publish, ScoresReady

    limits, version = job.run.limits, job.resumed_from.version if job.resumed_from else 0
    bar = progress.add_task(f"{type(job.run.aggregator).__name__:8s}", total=1.0, now="")
    progress.update(bar, completed=version / limits.versions)
    shown = {"version": f"{version}/{limits.versions}", "time": "", "accuracy": "", "loss": "", "stale": ""}

    def watch(now: float, event: Event, commands: list[Command]) -> None:
        nonlocal version
        shown["time"] = f"{now:,.0f} virtual s"
        if isinstance(event, ScoresReady):
            shown["accuracy"] = f"acc {100 * event.metrics['accuracy']:.1f} %"
            if "perplexity" in event.metrics:
                shown["accuracy"] = f"ppl {event.metrics['perplexity']:.1f}"
        for command in commands:
            if isinstance(command, Publish):
                version = command.version
                shown["version"] = f"{version}/{limits.versions}"
                shown["loss"] = f"loss {mean(u.result.metrics.get('loss', 0.0) for u in command.updates):.2f}"
                stale = mean(version - 1 - update.task.version for update in command.updates)
                shown["stale"] = f"{stale:.0f} stale" if stale >= 1 else ""
        done = max(version / limits.versions, now / limits.seconds if limits.seconds else 0.0)
        progress.update(bar, completed=min(done, 1.0), now="  ".join(filter(None, shown.values())))

    return watch
