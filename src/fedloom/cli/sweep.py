"""`fedloom sweep`: a run with every combination of some values, compared at the end."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from fedloom.cli.console import err, notes, out, print_json
from fedloom.cli.options import AsJson, RunFile, Settings, TrackerNames
from fedloom.cli.run import resume_command
from fedloom.cli.run_view import explain_stop
from fedloom.runs.public_names import collector_paused

if TYPE_CHECKING:
    from fedloom.runs.sweep.grid import PlannedRun
    from fedloom.runs.sweep.processes import State


def sweep_command(
    file: RunFile,
    grid: Annotated[
        list[str],
        typer.Option(
            "--grid",
            metavar="FIELD=VALUES",
            help="Values of a field, separated by commas: aggregator=HLoRA,FedIT or seed=range(3). May be repeated.",
        ),
    ],
    settings: Settings = None,
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="DIR", help="The folder of the sweep. In one that exists, only what is missing is run."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", metavar="N", min=1, help="How many runs at once, each in its own process.")
    ] = 1,
    pictures: Annotated[
        bool, typer.Option("--report/--no-report", help="Whether to write report.html of each run, too.")
    ] = True,
    to: TrackerNames = None,
    as_json: AsJson = False,
) -> None:
    """Simulate a run with every combination of the values of a grid, and compare the results.

    Writes a folder for each run, and a page that compares them: means over seeds, and what each value changes, pair by pair.

    A sweep that was interrupted or killed continues with the same command and its folder as [bold]--out[/bold]. So does one that gets
    more values or seeds. A Python file is executed: run only files that you trust.

    Example: [bold]fedloom sweep run.py --grid aggregator=ProductDelta,FedIT --grid "seed=range(3)" --jobs 2 --out runs/methods[/bold]
    """
    with collector_paused():
        from fedloom.runs.sweep.sweep import carry_out_sweep
    from fedloom.cli.tables import fitting_table
    from fedloom.core.files import numbered_path
    from fedloom.report.paired_differences import best_cell_sentence, cells_grid, differences_grid
    from fedloom.runs.comparison import difference_rows, run_rows
    from fedloom.runs.sweep.grid import grid_values, load_run, plan_file

    folder = out_dir
    try:
        values = grid_values(grid)
        folder = out_dir or numbered_path(Path("runs"), f"{load_run(file, settings or []).name}-sweep")
        planned = plan_file(file, settings or [], values, folder)
        with SweepBars(len(planned)) as bars:
            comparison = carry_out_sweep(planned, folder, jobs, bars.show, pictures, to)
    except (KeyboardInterrupt, Exception) as error:
        explain_stop(error, folder, resume_command(sys.argv, folder, "--out") if folder else "")
        raise
    logs, page = [result.log for result in comparison.results], folder / "report.html"
    if as_json:
        print_json({"folder": folder, "report": page, "runs": run_rows(logs), "paired": difference_rows(logs)})
        return
    for table in (cells_grid(logs), differences_grid(logs)):
        if table.rows:
            names = [name for name in table.head if name in ("Setting", "Value", "Instead of") or name.islower()]
            out.print(fitting_table(table, names, out.width))
    if sentence := best_cell_sentence(logs):
        out.print(sentence)
    out.print(f"Report   {page}", soft_wrap=True)


class SweepBars:
    """A bar for the whole sweep, and one for each run that is going on."""

    def __init__(self, count: int) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(8),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=err, disable=notes.quiet)
        self.count, self.finished = count, 0
        self.whole = self.progress.add_task("Sweep", total=float(count), now=f"0/{count} runs")
        self.bars = dict[str, TaskID]()

    def __enter__(self) -> SweepBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

    def show(self, planned: PlannedRun, state: State, share: float, text: str) -> None:
        """Take the state of a run; the first one shows the bars."""
        self.progress.start()
        name = planned.name
        if state == "running":
            if name not in self.bars:
                self.bars[name] = self.progress.add_task(name, total=1.0, now="")
            self.progress.update(self.bars[name], completed=share, now=text)
            return
        if name in self.bars:
            self.progress.remove_task(self.bars.pop(name))
        self.finished += state == "finished"
        self.progress.update(self.whole, completed=self.finished, now=f"{self.finished}/{self.count} runs")
        if state == "failed":
            err.print(Text.assemble(("Failed", "bold red"), f"   {name}: {text}"), soft_wrap=True)
