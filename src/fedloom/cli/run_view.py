"""What a run shows in the terminal: what it is made of, a bar while it goes on, and its summary at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from fedloom.cli.console import command_name, complain, err, notes, out
from fedloom.cli.exit_codes import ExitCode
from fedloom.cli.stop_signals import stops
from fedloom.core.errors import refuse_damaged
from fedloom.core.files import disk_full_error, read_json

if TYPE_CHECKING:
    from fedloom.runs.prepare import PreparedRun
    from fedloom.runs.run import Run
    from fedloom.runs.run_result import RunResult
    from fedloom.runs.trackers.tracker import Tracker


def overridden(value: Run, settings: list[str] | None, seed: int | None) -> Run:
    """Return the run with the settings of `--set` and `--seed`."""
    from fedloom.runs.run_file import override

    return override(value, [*(settings or []), *([f"seed={seed}"] if seed is not None else [])])


def introduce_run(job: PreparedRun) -> None:
    """Print what a run is made of: its model, its clients and what each of them has."""
    from fedloom.cli.tables import partition_table, partition_words
    from fedloom.data.partition import partition_statistics
    from fedloom.report.numbers import plural
    from fedloom.train.device import describe_device

    run, shape = job.run, job.server.shape
    size = (shape.parameters + shape.embeddings) / 1e6
    aggregator, schedule = type(run.aggregator).__name__, type(run.schedule).__name__
    place = describe_device(run.device, run.threads or 1)
    notes.print(Text.assemble("Run      ", (run.name, "bold"), f": {aggregator}, {schedule}, seed {run.seed}; {place}"))
    notes.print(f"Model    {run.model}, frozen ({size:.3g} M parameters)", soft_wrap=True)
    statistics = partition_statistics(job.split.train, job.shards)
    notes.print(f"Clients  {len(job.profiles):,}; {partition_words(statistics)}")
    if groups := job.server.manifest_sections().get("groups"):
        sizes = [len(clients) for clients in groups.values()]
        notes.print(
            f"Groups   {plural(len(sizes), 'group')} of {min(sizes)} to {max(sizes)} clients, one edge server each"
        )
    fleet = job.server.fleet()
    ranks = Counter(run.plan(profile, fleet).rank for profile in job.profiles.values())
    counts = ", ".join(f"{rank} ({plural(count, 'client')})" for rank, count in sorted(ranks.items()))
    notes.print(f"Rank{'s' if len(ranks) > 1 else ''}".ljust(9) + counts)
    about: Mapping[str, Any] = job.describe()
    if (majority := about["baselines"].get("majority")) is not None:
        right = f"{100 * majority:.1f} % of the test examples"
        notes.print(f"Majority always answering {about['metrics']['majority_label']!r} is right for {right}")
    if job.resumed_from:
        notes.print(f"Resumed  {job.resumed_from.resume_point}")
    notes.print(partition_table(statistics, notes.width))
    for note in about["notes"]:
        notes.print(Text.assemble(("Note", "yellow"), f"     {note}"), soft_wrap=True)
    notes.print()


def execute_with_bar(
    job: PreparedRun,
    folder: Path,
    workers: str = "1",
    report: bool = True,
    trackers: Sequence[Tracker] = (),
    **more: Any,
) -> RunResult:
    """Execute with a progress bar: versions or virtual time, whichever ends the run first, and what it has reached."""
    from fedloom.runs.progress import progress_observer

    words = TextColumn(
        "{task.fields[now]}", table_column=Column(ratio=1, no_wrap=True)
    )  # is cut where a terminal is narrow
    columns = (TextColumn("{task.description}"), BarColumn(6), TimeRemainingColumn(elapsed_when_finished=True), words)
    with Progress(*columns, console=err, disable=notes.quiet, expand=True) as progress:
        bar = progress.add_task(f"{type(job.run.aggregator).__name__:8s}", total=1.0, now="")
        observer = progress_observer(job, lambda done, now: progress.update(bar, completed=done, now=now))
        return job.execute(folder, [observer, *trackers], workers, report, **more)


def print_summary(folders: list[Path]) -> None:
    """Print a table of the runs in these folders."""
    from fedloom.cli.tables import runs_in_terminal

    with refuse_damaged("run folder", ", ".join(map(str, folders))):
        shown = runs_in_terminal(folders, out.width)
    out.print(shown)


def run_values(folders: list[Path]) -> list[dict[str, Any]]:
    """Return the figures of the runs in these folders, for `--json`."""
    from fedloom.report.run_log import read_run_log
    from fedloom.report.tables import run_figures

    with refuse_damaged("run folder", ", ".join(map(str, folders))):
        logs = [read_run_log(folder) for folder in folders]
        return [
            {"folder": folder, "name": log.manifest["name"], **run_figures(log)}
            for folder, log in zip(folders, logs, strict=True)
        ]


def explain_stop(error: BaseException, folder: Path | None, command: str = "") -> None:
    """Say where a run was stopped by Ctrl-C, by SIGTERM or by a full disk, what is there and how to continue; else do nothing.

    Args:
        error: what stopped it.
        folder: the run folder (None: none was chosen yet).
        command: the command that continues it ("": there is none).

    Raises:
        typer.Exit: it was one of these three.
    """
    lack = disk_full_error(error)
    if (code := stops.exit_code(error)) is not None:
        complain(f"interrupted. {_what_is_left(folder, command)}", "bold yellow")
        raise typer.Exit(code) from error
    if lack and folder is not None and folder.is_dir():
        place = lack.filename or "a file"
        complain(f"the disk is full: {place} could not be written. Make room. {_what_is_left(folder, command)}")
        raise typer.Exit(ExitCode.REFUSED) from error


def _what_is_left(folder: Path | None, command: str) -> str:
    """Say what a run that was stopped has left, and how to continue."""
    if folder is None or not folder.is_dir() or not any(folder.iterdir()):
        return "Nothing was written."
    path = folder / "manifest.json"
    if path.exists() and read_json(path).get("status") == "finished":
        return f"The run in {folder} is finished; write its report with: {command_name()} report {folder}"
    return f"Saved to {folder}" + (f"; continue with: {command}" if command else ".")
