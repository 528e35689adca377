"""`fedloom shards`: the simulated clients of a run, each as the folder of a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out
from fedloom.cli.options import RunFile


def shards_command(
    file: RunFile,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to; must not exist yet.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the Run; may be repeated."),
    ] = None,
) -> None:
    """Write each simulated client's examples and settings to a folder of its own, as a site has them.

    So a run that was simulated can be repeated with real processes, and a deployment tried on one machine. Each site draws batches
    and held-out rows from its own secret: the same tasks on the same rows, and numbers that differ as those of two seeds do.

    Example: [bold]fedloom shards mine.py --out sites[/bold], then [bold]fedloom join --config sites/c00/site.toml --insecure[/bold]
    """
    from fedloom.deploy.site.export_sites import export_sites
    from fedloom.runs.run_file import load_run_file, override

    for site in export_sites(override(load_run_file(file.resolve()), settings or []), folder):
        out.print(site, soft_wrap=True)
    out.print(
        "Limits   [limits] in each file allow what this run needs; a comment marks those that are looser than the default"
    )
    out.print(
        "Accept   fedloom join shows the terms of the run and waits until you accept them; for a trial: join ... --accept"
    )
