"""`fedloom rollback`: an earlier version of a run, or the run without one site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson
from fedloom.cli.replay import SecretPath, read_secret_file


def rollback_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or the folder of a deployment.")],
    to: Annotated[int | None, typer.Option("--to", metavar="N", help="Go back to this version.")] = None,
    without: Annotated[
        str | None, typer.Option("--without", metavar="NAME", help="Merge all answers again but those of this site.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="The folder to write; by default rollback-001 in the run folder."),
    ] = None,
    secret: SecretPath = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapter of an earlier version of a run, or of the run without one site, into a new folder. DIR stays as it is.

    The answers must have been kept: a deployment keeps the latest, a simulation with [bold]--keep-updates[/bold]. Answers of others
    stay as they were sent, also where their tasks came from versions with the site in them.

    Example: [bold]fedloom rollback DIR --without ward-7[/bold]
    """
    from fedloom.runs.rollback import roll_back

    result = roll_back(folder, to, without, target, read_secret_file(secret))
    if as_json:
        print_json(result)
        return
    out.print("\n".join(result.notes), soft_wrap=True)
    out.print(
        f"\nAdapter  {result.folder / 'adapter'}\nContinue with a new run from it: --set start={result.folder}",
        soft_wrap=True,
    )
