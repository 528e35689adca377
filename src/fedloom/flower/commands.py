"""The commands of a deployment: `fedloom worker`, `fedloom shards`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False)


def worker(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The site's settings, site.toml.")],
) -> None:
    """The part of a site that trains; [bold]fedloom join[/bold] starts it, beside what talks to the server.

    It keeps the model and the data in memory and listens at a Unix socket in the site's folder, which only its user can open. It asks
    nobody for anything: what it trains, it is sent, and only as far as the settings allow. A task that was done is not done again,
    also if the worker was killed in between. A line of JSON on stderr tells each thing that happens.

    The least that the settings say:

    \b
        name = "ward-7"
        server = "fed.example.org:8080"
        ca = "ca.crt"
        key = "ward-7"
        \\[model]
        path = "/models/all-MiniLM-L6-v2"
        \\[table]
        path = "notes.csv"
        text = "note"
        label = "diagnosis"

    All fields, and how to limit what a server may ask for: docs/site.md.
    """
    import os
    import signal
    import sys

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a site asks no hub
    from fedloom.flower import logs
    from fedloom.flower.site import read

    site = read(config)  # a slip is told before anything is loaded
    from fedloom.flower.worker import serve

    logs.to_stderr()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve(site)


def shards(
    file: Annotated[Path, typer.Argument(metavar="RUNFILE", help="A Python file with a value `run = Run(...)`.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to; must not exist yet.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the Run; may be repeated."),
    ] = None,
) -> None:
    """Write each simulated client's training examples and settings to a folder of its own, as if it were a site.

    So a run that was simulated can be repeated with real processes, to the same numbers, and a deployment tried on one machine.

    Example: [bold]fedloom shards mine.py --out sites[/bold], then [bold]fedloom join --config sites/c00/site.toml --insecure[/bold]
    """
    from fedloom.flower.shards import write
    from fedloom.override import override
    from fedloom.runfile import run_of

    for site in write(override(run_of(file), settings or []), folder):
        out.print(site, soft_wrap=True)


def mount(app: typer.Typer) -> None:
    """Add the commands of a deployment to `fedloom`."""
    app.command()(worker)
    app.command()(shards)
