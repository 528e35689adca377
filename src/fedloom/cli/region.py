"""`fedloom region`: the server of its own sites, and a site of the server above."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import Insecure, Quota, ServerFolder
from fedloom.cli.serve import carry_out_deployment, deployment_facts


def region_command(  # noqa: PLR0913  # they are its options
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file, the same as at the server above.")],
    folder: ServerFolder,
    config: Annotated[
        Path,
        typer.Option(
            "--config", metavar="FILE", help="How it is a site of the server above: site.toml, region = true."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="As given to the server above; patience is the region's own."
        ),
    ] = None,
    clients: Annotated[int, typer.Option(metavar="N", min=1, help="Start when N sites of the region are ready.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the deployment in this folder.")] = False,
    port: Annotated[str, typer.Option(metavar="[HOST:]PORT", help="Where the region's sites connect to.")] = "8080",
    insecure: Insecure = False,
    quota: Quota = None,
) -> None:
    """Lead a region: the server of its own sites, and a site of the server above. For a Run with a hierarchy.

    A Python FILE is executed, also by [bold]--resume[/bold], which goes by deployment.json in DIR.

    It has two sets of keys: those of a server in its folder, for its sites, and that of a site in its settings. Ends when the server
    above says that the run has ended, or with Ctrl-C.
    """
    from fedloom.deploy.flower.join import region_processes

    facts = deployment_facts(file, settings, clients) | {"above": str(config.resolve())}
    carry_out_deployment(file, folder, port, insecure, resume, facts, quota, region_processes(config, insecure))
