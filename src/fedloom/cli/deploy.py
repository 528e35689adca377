"""The commands of a deployment: `fedloom serve`, `join`, `worker`, `status`, `shards`, `keys`."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleRenderable

from fedloom.cli.keys import keys_app

out = Console(highlight=False)

Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Without TLS and keys, to try things on one machine: loopback addresses only."),
]
Of = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The server's folder.")]


def serve(
    file: Annotated[Path, typer.Argument(metavar="RUNFILE", help="A Python file with a value `run = Run(...)`.")],
    folder: Of,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Replace a field of the Run; may be repeated. Also patience.task=3600: seconds.",
        ),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Begin when so many clients are there; more may come later.")] = 1,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of this machine at which Prometheus may ask.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the deployment in this folder.")] = False,
    port: Annotated[str, typer.Option(metavar="[HOST:]PORT", help="Where sites connect to.")] = "8080",
    insecure: Insecure = False,
) -> None:
    """Carry out a Run on real machines: the server. Sites come with [bold]fedloom join[/bold], at any time.

    What is killed is started again and goes on from the last checkpoint; Ctrl-C ends all, [bold]--resume[/bold] goes on.

    Example: [bold]fedloom keys new DIR --host server.example.org[/bold], then [bold]fedloom serve mine.py --folder DIR[/bold]
    """
    _carry_out(file, folder, port, insecure, resume, _facts(file, settings, clients) | {"metrics_port": metrics_port})


def region(
    file: Annotated[Path, typer.Argument(metavar="RUNFILE", help="The run file, the same as at the server above.")],
    folder: Of,
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
    clients: Annotated[int, typer.Option(min=1, help="Begin when so many sites of the region are there.")] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the deployment in this folder.")] = False,
    port: Annotated[str, typer.Option(metavar="[HOST:]PORT", help="Where the region's sites connect to.")] = "8080",
    insecure: Insecure = False,
) -> None:
    """Lead a region: the server of its own sites, and a site of the server above. For a Run with a hierarchy.

    Its keys are two: those of a server in its folder, for its sites, and that of a site in its settings. Runs until stopped.
    """
    from fedloom.deploy.flower.join import region_processes

    facts = _facts(file, settings, clients) | {"above": str(config.resolve())}
    _carry_out(file, folder, port, insecure, resume, facts, region_processes(config, insecure))


def _facts(file: Path, settings: list[str] | None, clients: int) -> dict[str, object]:
    """What the server is to know. Settings of `patience` are its own, all others the run's; a slip is told before anything starts."""
    from fedloom.core.errors import Refused
    from fedloom.deploy.server.config import Timeouts
    from fedloom.hierarchy.hierarchy import need_lasting_groups
    from fedloom.runs.run_file import override, load_run_file

    own = [one for one in settings or [] if one.startswith("patience.")]
    rest = [one for one in settings or [] if one not in own]
    need_lasting_groups(override(load_run_file(file), rest).hierarchy)
    try:
        patience = {one[9:].partition("=")[0].strip(): float(one.partition("=")[2]) for one in own}
        Timeouts(**patience)
    except (TypeError, ValueError) as error:
        raise Refused("--set", " ".join(own), f"{error}; for instance patience.task=3600, in seconds") from error
    return {"runfile": str(file.resolve()), "settings": rest, "clients": clients, "patience": patience}


def _carry_out(
    file: Path, folder: Path, port: str, insecure: bool, resume: bool, facts: dict[str, object], more: Any = ()
) -> None:
    from fedloom.core.errors import Refused
    from fedloom.deploy.flower.serve import serve_deployment
    from fedloom.deploy.flower.server_processes import ServerSetup

    host, _, number = port.rpartition(":")
    if not number.isdigit():
        raise Refused("--port", port, "give a port, or an address of this machine and a port: 10.0.0.5:8080")
    server = ServerSetup(folder, host or ("127.0.0.1" if insecure else "0.0.0.0"), int(number), insecure)
    try:
        reason = serve_deployment(server, facts, resume, _say, more)
    except KeyboardInterrupt:
        what = "region" if more else "serve"
        out.print(f"Go on    the same fedloom {what} {file} --folder {folder}, with --resume", soft_wrap=True)
        raise
    run = folder / "run"
    out.print(
        f"The run has ended: {reason}\nReport   {run / 'report.html'}\nAdapter  {run / 'adapter'}", soft_wrap=True
    )


def join(
    config: Annotated[Path, typer.Option("--config", metavar="FILE", help="The site's settings, site.toml.")],
    insecure: Insecure = False,
    idle: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Ask for work so often when idle, not every 3 s: less for short tasks, more where there are many sites.",
        ),
    ] = None,
) -> None:
    """Take part in a deployment: one site. Runs what is installed here, on the data named in the settings, until stopped."""
    from fedloom.deploy.flower.join import join_deployment as take_part
    from fedloom.deploy.flower.join import site_setup

    take_part(site_setup(config, insecure, idle), _say)


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
    from fedloom.deploy import json_log
    from fedloom.deploy.site.settings import read_site

    site = read_site(config)  # a slip is told before anything is loaded
    from fedloom.deploy.site.worker import serve_worker

    json_log.to_stderr()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve_worker(site)


def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder, as given to `fedloom serve`.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")] = False,
) -> None:
    """What a deployment is doing: versions, who is there and at work, staleness, bytes, and what it waits for."""
    import time

    from rich.live import Live

    from fedloom.deploy.server.status import read_status, shown

    def now() -> ConsoleRenderable:
        told = read_status(folder)
        return shown(told, time.time() - told["at"])

    if not watch:
        out.print(now())
        return
    with Live(now(), console=out) as live:
        while True:
            time.sleep(1.0)
            live.update(now())


def shards(
    file: Annotated[Path, typer.Argument(metavar="RUNFILE", help="A Python file with a value `run = Run(...)`.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to; must not exist yet.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the Run; may be repeated."),
    ] = None,
) -> None:
    """Write each simulated client's examples and settings to a folder of its own, as if it were a site.

    So a run that was simulated can be repeated with real processes, to the same numbers, and a deployment tried on one machine.

    Example: [bold]fedloom shards mine.py --out sites[/bold], then [bold]fedloom join --config sites/c00/site.toml --insecure[/bold]
    """
    from fedloom.deploy.site.export_sites import export_sites
    from fedloom.runs.run_file import override, load_run_file

    for site in export_sites(override(load_run_file(file), settings or []), folder):
        out.print(site, soft_wrap=True)


def mount(app: typer.Typer) -> None:
    """Add the commands of a deployment to `fedloom`."""
    app.command()(serve)
    app.command()(region)
    app.command()(join)
    app.command()(worker)
    app.command()(status)
    app.command()(shards)
    app.add_typer(keys_app, name="keys")


def _say(line: str) -> None:
    from rich.markup import escape

    out.print(f"[dim]{datetime.now():%H:%M:%S}[/dim] {escape(line)}", soft_wrap=True)
