"""What the command line shows of a run while it goes on, and how to go on with it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

    from fedloom.job import Job
    from fedloom.simulate import Observer
    from fedloom.types import Command, Event


def resumption(arguments: list[str], folder: Path) -> str:
    """The command that goes on with an interrupted run: the same one, with --resume in the place of --out."""
    kept, skip = list[str](), False
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in ("--out", "--resume"):
            kept.append(argument)
        skip = not skip and argument in ("--out", "--resume")
    return shlex.join([*kept, "--resume", str(folder)])


def watcher(progress: Progress, job: Job) -> Observer:
    """An observer that moves a bar: rounds, virtual time, loss, accuracy."""
    from fedloom.types import Publish, Scored

    begun = job.begun.version if job.begun else 0
    name, versions = f"{type(job.run.aggregator).__name__:8s}", job.run.limits.versions
    bar = progress.add_task(name, total=versions, completed=begun, now="")
    shown = {"loss": "", "accuracy": ""}

    def watch(now: float, event: Event, commands: list[Command]) -> None:
        if isinstance(event, Scored):
            shown["accuracy"] = f"accuracy {100 * event.metrics['accuracy']:.1f} %"
        for command in commands:
            if isinstance(command, Publish):
                losses = [update.result.metrics.get("loss", 0.0) for update in command.updates]
                shown["loss"] = f"loss {sum(losses) / len(losses):.3f}"
                progress.update(bar, completed=command.version)
        progress.update(bar, now=f"{now:,.0f} virtual s  {shown['loss']}  {shown['accuracy']}")

    return watch
