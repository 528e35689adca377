"""`fedloom audit`: what somebody who looks could learn from a run, before it is made or after."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.exit_codes import ExitCode
from fedloom.cli.options import AsJson
from fedloom.core.errors import Refused

if TYPE_CHECKING:
    from fedloom.audit.findings import AuditReport


def audit_command(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|FILE", help="A run folder; or a run file, which is made small and audited before it runs."
        ),
    ],
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The run file of the folder, where its manifest cannot say all of the settings."
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The page to write, with the figures as .json beside it; by default audit.html in the run folder, or here.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a run as a curious server, another member and a reader of the published model, and report what each could learn.

    The data of a finished run must still be where they were. Answers of single clients are attacked where they were kept
    ([bold]fedloom run FILE --keep-updates[/bold]), else the published model alone. A Python file is executed: use only files that you
    trust. The noise of a private run is tested with canaries; the exit code is 1 where it is too small.

    The page holds no text, label or other value of anybody's data.

    Example: [bold]fedloom audit runs/mine[/bold]

    Before a run: [bold]fedloom audit experiments/tickets.py --out audit.html[/bold]
    """
    from fedloom.audit.audit_page import audit_sentence, figures_of, noise_sentence, write_audit
    from fedloom.audit.run_audit import audit_folder, audit_plan
    from fedloom.runs.run_file import load_run_file

    if run.is_dir():
        report = audit_folder(run, load_run_file(file) if file else None)
    elif file is not None:
        raise Refused("--file", str(file), "it belongs to a run folder; a run file is audited as it is")
    else:
        report = audit_plan(load_run_file(run))
    written, data = write_audit(report, page or (run if run.is_dir() else Path()) / "audit.html")
    _show(report)
    out.print(f"\n{audit_sentence(report)}", soft_wrap=True)
    if report.noise is not None:
        out.print(
            f"{noise_sentence(report.noise)} {'' if report.noise.sound else 'THE NOISE IS TOO SMALL.'}", soft_wrap=True
        )
    out.print(f"\nPage     {written}\nFigures  {data}", soft_wrap=True)
    if as_json:
        print_json({"page": written, **figures_of(report)})
    if report.noise is not None and not report.noise.sound:
        raise typer.Exit(ExitCode.DIFFERS)


def _show(report: AuditReport) -> None:
    """Print a line for each attack."""
    from fedloom.audit.findings import ADVERSARIES, Finding

    for note in report.notes:
        out.print(note, soft_wrap=True)
    for one in report.outcomes:
        who = f"{ADVERSARIES[one.adversary]}, {one.attack}: "
        if isinstance(one, Finding):
            out.print(f"{who}{one.value:.2f} (by chance {one.chance:.2f}), {one.verdict}", soft_wrap=True)
        else:
            out.print(f"{who}not measured: {one.reason}", soft_wrap=True)
