"""`fedloom worker`: the part of a site that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def worker_command(
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
        key = "ward-7.key"
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
    os.umask(0o077)  # what it writes is its owner's alone
    from fedloom.deploy import json_log
    from fedloom.deploy.site.settings import read_site

    site = read_site(config)  # a mistake is refused before anything is loaded
    from fedloom.deploy.site.worker import serve_worker

    json_log.to_stderr()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve_worker(site)
