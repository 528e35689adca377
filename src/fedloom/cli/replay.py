"""`fedloom replay` and `fedloom rollback`: a run repeated from its trace and the answers that it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out
from fedloom.core.errors import Refused
from fedloom.core.files import read_regular

SecretPath = Annotated[
    Path | None,
    typer.Option(
        "--secret",
        metavar="FILE",
        help="The secret of the noise of a private run's server: secret/noise.key in the folder of its deployment.",
    ),
]


def replay_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or the trace.jsonl in it.")],
    secret: SecretPath = None,
) -> None:
    """Feed the events of a run to a new server and compare what it does with the trace: it must be the same bytes.

    Nothing is trained and no model is needed. The run has to be recorded with [bold]fedloom run FILE --keep-updates[/bold]. The exit
    code is 1 if a line of the trace differs. Of a private run everything is repeated with its secret; without it the rest, and what
    was not verified is said.

    Example: [bold]fedloom replay runs/mine[/bold]
    """
    from fedloom.runs.replay import replay

    result = replay(folder.parent if folder.is_file() else folder, secret=read_secret_file(secret))
    if result.difference:
        out.print(f"{result.events} events gave the same bytes, then a difference\n{result.difference}", soft_wrap=True)
        raise typer.Exit(1)
    since = f", from version {result.version} on: earlier answers are not kept" if result.version else ""
    out.print(f"{result.events} events gave the same bytes{since}")
    if result.unverified:
        out.print(result.unverified, soft_wrap=True)


def rollback_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or the folder of a deployment.")],
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="Go back to this version.")] = None,
    without: Annotated[
        str | None, typer.Option("--without", metavar="SITE", help="Merge all answers again but those of this site.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--out", metavar="NEW", help="The folder to write; by default rollback-001 in the run folder."),
    ] = None,
    secret: SecretPath = None,
) -> None:
    """Write the adapter of an earlier version of a run, or of the run without one site, into a new folder. DIR stays as it is.

    The answers must have been kept: a deployment keeps the latest, a simulation with [bold]--keep-updates[/bold]. Answers of others
    stay as they were sent, also where their tasks came from versions with the site in them.

    Example: [bold]fedloom rollback DIR --without ward-7[/bold]
    """
    from fedloom.runs.rollback import roll_back

    result = roll_back(folder, to, without, target, read_secret_file(secret))
    out.print("\n".join(result.notes), soft_wrap=True)
    out.print(
        f"\nAdapter  {result.folder / 'adapter'}\nGo on    with a new run from it: --set start={result.folder}",
        soft_wrap=True,
    )


def read_secret_file(path: Path | None) -> bytes | None:
    """Return the secret in a file that `fedloom serve` made; None without one. Raises Refused."""
    if path is None:
        return None
    try:
        return bytes.fromhex(read_regular(path, most=1000).decode("ascii"))
    except (FileNotFoundError, ValueError) as error:
        raise Refused("--secret", str(path), "it holds no secret; give secret/noise.key of the deployment") from error
