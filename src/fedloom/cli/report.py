"""`fedloom report`: the page of a run, or the comparison of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson
from fedloom.cli.run_view import print_summary, run_values
from fedloom.core.errors import Refused


def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="A run folder; several of them, or that of a sweep, are compared."),
    ],
    page: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The page to write; by default report.html in the run folder, or here."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the HTML report of one run, or a comparison of several, and print a summary.

    Example: [bold]fedloom report runs/hlora runs/fedit --out comparison.html[/bold]
    """
    from fedloom.report.page import write_report
    from fedloom.report.run_log import run_folders

    runs = [run for folder in folders for run in run_folders(folder)]
    target = page or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    if page is None and len(folders) > 1 and target.exists():
        raise Refused("--out", str(target), "it exists already; name another file with --out")
    written = write_report(runs, target)
    if as_json:
        print_json({"report": written, "runs": run_values(runs)})
        return
    print_summary(runs)
    out.print(f"\nReport   {written}", soft_wrap=True)
