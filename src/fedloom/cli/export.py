"""`fedloom export`: the adapter of a run as others use it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson, RunFolder


def export_command(
    folder: RunFolder,
    client: Annotated[str | None, typer.Option(metavar="NAME", help="Write it at the rank of this client.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="N", help="Write its best approximation at this rank.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge it into the base model: a plain transformers folder.")
    ] = False,
    target: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; must not exist yet.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapter of a run for one client, at one rank, or merged into the base model.

    Example: [bold]fedloom export runs/mine --rank 4 --out adapter-r4[/bold]
    """
    from fedloom.runs.run_result import open_result

    written = open_result(folder).export(target, rank, client, merged)
    if as_json:
        print_json({"folder": written, "merged": merged})
    else:
        out.print(f"{'Model' if merged else 'Adapter':8} {written}", soft_wrap=True)
