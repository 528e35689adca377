"""`fedloom join`: a site that takes part in a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out, print_now
from fedloom.cli.options import Insecure
from fedloom.cli.site import TermsPrompt


def join_command(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The site's settings, site.toml.")],
    insecure: Insecure = False,
    idle: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Ask for work so often when idle, not every 3 s: less for short tasks, more where there are many sites.",
        ),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept the first terms that the server offers from now on, and no others.")
    ] = False,
    stay: Annotated[
        bool, typer.Option("--stay", help="When the run has ended, wait for the next one of this server: for services.")
    ] = False,
) -> None:
    """Take part in a run as one site. Trains on the data named in its settings, with the fedloom installed here.

    Ends when the run has ended, or with Ctrl-C. The site continues where it was when it is started again.

    Before the first task it shows the terms of the run, and does nothing until they are accepted: in the terminal, with
    [bold]--accept[/bold], with [bold]fedloom site accept[/bold], or by their hash in the settings. Changed terms are shown anew.
    """
    import os

    from fedloom.deploy.flower.join import join_deployment as take_part
    from fedloom.deploy.flower.join import site_setup
    from fedloom.deploy.site.settings import read_site

    os.umask(0o077)  # what its processes write is its owner's alone
    setup, site = site_setup(config, insecure, idle), read_site(config)
    take_part(setup, print_now, TermsPrompt(site, config, accept).look, stay)
    out.print(
        f"Record   fedloom site log --config {config}    (all that the server asked for and was sent)", soft_wrap=True
    )
