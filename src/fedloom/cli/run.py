"""`fedloom run`: the run of a run file, simulated on a virtual clock."""

from __future__ import annotations

import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import command_name, notes, out, print_json
from fedloom.cli.options import AsJson, OutDir, RunFile, Seed, Settings, TrackerNames, Watch, WorkerPool
from fedloom.cli.run_view import execute_with_bar, explain_stop, introduce_run, overridden, print_summary, run_values
from fedloom.cli.watch import watching
from fedloom.core.errors import Refused, refuse_damaged
from fedloom.runs.public_names import collector_paused

if TYPE_CHECKING:
    from fedloom.runs.prepare import PreparedRun
    from fedloom.runs.run import Run


def run_command(  # noqa: PLR0913  # they are its options
    file: RunFile,
    settings: Settings = None,
    out_dir: OutDir = None,
    seed: Seed = None,
    workers: WorkerPool = "1",
    pictures: Annotated[
        bool, typer.Option("--report/--no-report", help="Whether to write report.html at the end.")
    ] = True,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue the unfinished run in this folder.")
    ] = None,
    more: Annotated[
        int | None,
        typer.Option(
            "--more",
            metavar="N",
            help="Add N versions to a finished run: that of [bold]--resume DIR[/bold], or the latest one of this name in runs/.",
        ),
    ] = None,
    keep_updates: Annotated[
        bool,
        typer.Option(
            "--keep-updates", help="Keep the answers of clients, so that [bold]fedloom replay[/bold] can read them."
        ),
    ] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run will cost in bytes, time and memory; write nothing.")
    ] = False,
    to: TrackerNames = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Simulate the run that a file defines, on a virtual clock.

    Writes a run folder: manifest.json, metrics.jsonl, trace.jsonl, adapter/ (a PEFT folder) and report.html. A Python file is
    executed: run only files that you trust.

    A run that was interrupted or killed continues with the same command and [bold]--resume DIR[/bold], and ends in the same bytes.
    [bold]--more N[/bold] adds N versions to a finished run, on the same data, as if it had been that long from the beginning. For
    other data (next month's), begin a new run from its adapter: [bold]--set start=DIR[/bold]; any LoRA folder of PEFT will do.

    Example: [bold]fedloom run experiments/tickets.py --set schedule.cohort_size=2 --workers 2 --out runs/mine[/bold]
    """
    target = resume
    try:
        with collector_paused():
            from fedloom.runs.prepare import prepare
        from fedloom.core import files
        from fedloom.runs.run_file import load_run_file
        from fedloom.runs.trackers.tracker import open_trackers
        from fedloom.train.workers.worker import Workers

        Workers.parse(workers)  # a mistake is reported before anything is loaded
        if dry:
            if resume or more is not None:
                remedy = "it is about a whole new run; leave --resume and --more out"
                raise Refused("--dry-run", str(resume or more), remedy)
            print_cost(overridden(load_run_file(file), settings, seed), workers, as_json)
            return
        trackers = open_trackers(to)
        if (resume or more is not None) and out_dir:
            raise Refused("--out", str(out_dir), "a run continues in its own folder; give --resume alone")
        value = overridden(load_run_file(file), settings, seed)
        if more is not None and resume is None:
            resume = files.latest_path(Path("runs"), value.name)
            if resume is None:
                remedy = f"there is no run {value.name}-001 in runs/; name its folder: --resume DIR"
                raise Refused("--more", more, remedy)
        target = resume or files.require_vacant(out_dir or files.numbered_path(Path("runs"), value.name))
        with refuse_damaged("--resume", str(resume)) if resume else nullcontext(), watching(watch, target):
            job = prepare(value, resume, more, workers)
            introduce_run(job)
            result = execute_with_bar(job, target, workers, pictures, trackers, keep_updates=keep_updates)
    except (KeyboardInterrupt, Exception) as error:
        explain_stop(error, target, resume_command(sys.argv, target) if target else "")
        raise
    page = result.folder / "report.html" if pictures else None
    if as_json:
        (values,) = run_values([result.folder])
        print_json({**values, "scores": result.scores, "report": page, "adapter": result.folder / "adapter"})
        return
    print_summary([result.folder])
    unwritten = f"not written; write it with: {command_name()} report {result.folder}"
    out.print(f"\nReport   {page or unwritten}\nAdapter  {result.folder / 'adapter'}", soft_wrap=True)


def print_cost(run: Run, workers: str, as_json: bool) -> None:
    """Print what a run will cost, and what it is made of before that; nothing is written."""
    with collector_paused():
        from fedloom.runs.dry_run.cost_estimate import estimate_cost
        from fedloom.runs.prepare import prepare
    began = time.perf_counter()
    job = prepare(run, workers=workers)
    loading_seconds = time.perf_counter() - began
    introduce_run(job)
    notes.print("Simulates the run without training, then measures some steps and scores.\n")
    estimate = estimate_cost(job, loading_seconds)
    if as_json:
        print_json({**asdict(estimate), "real_seconds": estimate.real_seconds, "exact": estimate.exact})
    else:
        out.print(f"Dry run of {run.name}: nothing was written\n\n{estimate}", soft_wrap=True)
        print_needed_limits(job)


def print_needed_limits(job: PreparedRun) -> None:
    """Say which limits of a site would have to be loosened for this run: a simulation has none."""
    from fedloom.deploy.site.export_sites import needed_limits

    rows = min(len(shard.train) + len(shard.held_out) for shard in job.shards)
    needed = needed_limits(job.run, rows, None if job.base.labels is None else job.split.train.names)
    if needed:
        lines = ", ".join(f"{name} = {value}" for name, value in needed.items())
        words = f"Deploy   On real sites this run needs limits above the default: {lines} (docs/site.md)"
        notes.print(words, soft_wrap=True)


def resume_command(arguments: list[str], folder: Path, option: str = "--resume") -> str:
    """Return the command that continues an interrupted run: the same one, with this option in the place of --out and --more."""
    rest, skip, replaced = list[str](), False, ("--out", "--resume", "--more")
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in replaced:
            rest.append(argument)
        skip = not skip and argument in replaced
    return f"{command_name()} {shlex.join([*rest[1:], option, str(folder)])}"
