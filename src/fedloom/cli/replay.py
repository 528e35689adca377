"""`fedloom replay` and `fedloom rollback`: a run repeated from its trace and the answers that it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.exit_codes import ExitCode
from fedloom.cli.options import AsJson
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
    as_json: AsJson = False,
) -> None:
    """Check that a recorded run is reproducible: replay its events and compare every byte.

    Nothing is trained and no model is needed. The run must be recorded with [bold]fedloom run FILE --keep-updates[/bold]. The exit
    code is 1 if a line of the trace differs. A private run is repeated whole with its secret. Without the secret, the part that was
    not verified is named.

    Example: [bold]fedloom replay runs/mine[/bold]
    """
    from fedloom.report.numbers import plural
    from fedloom.runs.replay import replay

    result = replay(folder.parent if folder.is_file() else folder, secret=read_secret_file(secret))
    same = f"{plural(result.events, 'event')} gave the same bytes"
    if as_json:
        print_json(result)
    elif result.difference:
        out.print(f"{same}, then a difference\n{result.difference}", soft_wrap=True)
    else:
        since = f", from version {result.version} on: earlier answers are not kept" if result.version else ""
        out.print(f"{same}{since}", soft_wrap=True)
    if result.difference:
        raise typer.Exit(ExitCode.DIFFERS)
    if result.unverified and not as_json:
        out.print(result.unverified, soft_wrap=True)


def read_secret_file(path: Path | None) -> bytes | None:
    """Return the secret in a file that `fedloom serve` made; None without one. Raises Refused."""
    if path is None:
        return None
    try:
        return bytes.fromhex(read_regular(path, most=1000).decode("ascii"))
    except (FileNotFoundError, ValueError) as error:
        raise Refused("--secret", str(path), "it holds no secret; give secret/noise.key of the deployment") from error
