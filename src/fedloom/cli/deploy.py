"""The commands of a deployment: `fedloom serve`, `region`, `join`, `worker`, `status`, `shards`, `keys`, and what they show."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import ConsoleRenderable, Group
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import out
from fedloom.cli.site import TermsPrompt, site_app
from fedloom.core.text import printable

keys_app = typer.Typer(no_args_is_help=True, help="Certificates and keys: the server's certificate, the keys of sites.")
HEADINGS = {"since": "for s", "stale": "versions behind", "counted": "counts as"}

Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Without TLS and keys, to try things on one machine: loopback addresses only."),
]
Of = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The server's folder.")]
Hosts = Annotated[
    list[str],
    typer.Option(
        "--host", metavar="NAME", help="Host name or address by which sites reach the server; may be repeated."
    ),
]
Quota = Annotated[
    int | None,
    typer.Option(
        "--quota", metavar="MB", min=1, help="Megabytes of answers that a site may send a day (default 34000)."
    ),
]
Days = Annotated[int, typer.Option("--days", min=1, help="Days until the server's certificate ends.")]


def serve(  # noqa: PLR0913  # they are its options
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
    clients: Annotated[int, typer.Option(min=1, help="Begin when so many clients are there; more may join later.")] = 1,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of this machine at which Prometheus may ask.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the deployment in this folder.")] = False,
    more: Annotated[
        int | None, typer.Option("--more", metavar="N", help="Add N versions to the finished run in this folder.")
    ] = None,
    kept_megabytes: Annotated[
        int,
        typer.Option(
            "--keep", metavar="MB", min=1, help="Megabytes of answers to keep, the latest: for fedloom rollback."
        ),
    ] = 2000,
    port: Annotated[str, typer.Option(metavar="[HOST:]PORT", help="Where sites connect to.")] = "8080",
    insecure: Insecure = False,
    quota: Quota = None,
) -> None:
    """Carry out a Run on real machines: the server. Sites come with [bold]fedloom join[/bold], at any time.

    RUNFILE is Python code and is executed, also by [bold]--resume[/bold], which goes by deployment.json in DIR: run only files that
    you trust, and let nobody else write into DIR.

    What is killed is started again and goes on from the last checkpoint; Ctrl-C ends all, [bold]--resume[/bold] goes on. With
    [bold]--more N[/bold] a finished run makes N more versions; its sites come as before.

    Example: [bold]fedloom keys new DIR --host server.example.org[/bold], then [bold]fedloom serve mine.py --folder DIR[/bold]
    """
    facts = _facts(file, settings, clients) | {"metrics_port": metrics_port, "kept_megabytes": kept_megabytes}
    if more is not None:
        from fedloom.deploy.server.config import RUN_FOLDER
        from fedloom.runs.resume import version_to_reach

        facts["until"] = version_to_reach(folder / RUN_FOLDER, more)
    _carry_out(file, folder, port, insecure, resume or more is not None, facts, quota)


def region(  # noqa: PLR0913  # they are its options
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
    quota: Quota = None,
) -> None:
    """Lead a region: the server of its own sites, and a site of the server above. For a Run with a hierarchy.

    RUNFILE is Python code and is executed, also by [bold]--resume[/bold], which goes by deployment.json in DIR.

    Its keys are two: those of a server in its folder, for its sites, and that of a site in its settings. Runs until stopped.
    """
    from fedloom.deploy.flower.join import region_processes

    facts = _facts(file, settings, clients) | {"above": str(config.resolve())}
    _carry_out(file, folder, port, insecure, resume, facts, quota, region_processes(config, insecure))


def _facts(file: Path, settings: list[str] | None, clients: int) -> dict[str, object]:
    """Return the configuration of a deployment. Settings of `patience` are its timeouts, all others the run's.

    A mistake in them is refused before anything starts.
    """
    from fedloom.core.errors import Refused
    from fedloom.deploy.server.config import Timeouts
    from fedloom.hierarchy.hierarchy import need_lasting_groups
    from fedloom.runs.run_file import load_run_file, override

    timeouts = [one for one in settings or [] if one.startswith("patience.")]
    rest = [one for one in settings or [] if one not in timeouts]
    need_lasting_groups(override(load_run_file(file), rest).hierarchy)
    try:
        patience = {one[9:].partition("=")[0].strip(): float(one.partition("=")[2]) for one in timeouts}
        Timeouts(**patience)
    except (TypeError, ValueError) as error:
        raise Refused("--set", " ".join(timeouts), f"{error}; for instance patience.task=3600, in seconds") from error
    return {"runfile": str(file.resolve()), "settings": rest, "clients": clients, "patience": patience}


def _carry_out(
    file: Path,
    folder: Path,
    port: str,
    insecure: bool,
    resume: bool,
    facts: dict[str, object],
    quota: int | None,
    more: Any = (),
) -> None:
    from fedloom.deploy.flower.address import parse_address
    from fedloom.deploy.flower.serve import serve_deployment
    from fedloom.deploy.flower.server_processes import ServerSetup

    address = parse_address("--port", port, "127.0.0.1" if insecure else "0.0.0.0")
    limit = None if quota is None else quota * 10**6
    server = ServerSetup(folder, address.host, address.port, insecure, quota=limit)
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
    accept: Annotated[
        bool, typer.Option("--accept", help="Accept the first terms that the server offers from now on, and no others.")
    ] = False,
) -> None:
    """Take part in a deployment: one site. Runs what is installed here, on the data named in the settings, until stopped.

    Before the first task it shows the terms of the run, and does nothing until they are accepted: in the terminal, with
    [bold]--accept[/bold], with [bold]fedloom site accept[/bold], or by their hash in the settings. Other terms are shown anew.
    """
    from fedloom.deploy.flower.join import join_deployment as take_part
    from fedloom.deploy.flower.join import site_setup
    from fedloom.deploy.site.settings import read_site

    setup, site = site_setup(config, insecure, idle), read_site(config)
    take_part(setup, _say, TermsPrompt(site, config, accept).look)


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
    os.umask(0o077)  # what it writes is its owner's alone
    from fedloom.deploy import json_log
    from fedloom.deploy.site.settings import read_site

    site = read_site(config)  # a mistake is refused before anything is loaded
    from fedloom.deploy.site.worker import serve_worker

    json_log.to_stderr()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    serve_worker(site)


def status(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder, as given to `fedloom serve`.")],
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew every second, until Ctrl-C.")] = False,
) -> None:
    """Show what a deployment is doing: versions, who is there and at work, staleness, bytes, and what it waits for."""
    import time

    from rich.live import Live

    from fedloom.deploy.server.status import read_status

    def now() -> ConsoleRenderable:
        written = read_status(folder)
        return status_view(written, time.time() - written["at"])

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

    So a run that was simulated can be repeated with real processes, and a deployment tried on one machine. Each site draws batches
    and held-out rows from its own secret: the same tasks on the same rows, and numbers that differ as those of two seeds do.

    Example: [bold]fedloom shards mine.py --out sites[/bold], then [bold]fedloom join --config sites/c00/site.toml --insecure[/bold]
    """
    from fedloom.deploy.site.export_sites import export_sites
    from fedloom.runs.run_file import load_run_file, override

    for site in export_sites(override(load_run_file(file), settings or []), folder):
        out.print(site, soft_wrap=True)
    out.print(
        "Limits   [limits] in each file are those that this run needs; a comment says where they are looser than the default"
    )
    out.print("Accept   fedloom join shows the terms of the run and waits; to try it here: fedloom join ... --accept")


def status_view(status: Mapping[str, Any], age: float) -> Group:
    """Return the status of a deployment as the terminal shows it; for `age` seconds nothing was written."""
    traffic, scores = status["traffic"], status["scores"]
    running = f"{status['seconds']:,.0f} s, start {status['incarnation']} of the server"
    lines: list[str | Text] = [
        Text.assemble((status["run"], "bold"), f"  version {status['version']} of {status['versions']}, {running}"),
        f"Waits {printable(status['waits'], lines=False)}",
        f"{status['accepted']} answers accepted, {status['rejected']} refused, {status['failed']} tasks failed, "
        f"mean staleness {status['mean_staleness'] or 0:g}",
        f"{traffic['bytes_down'] / 1e6:,.1f} MB down, {traffic['bytes_up'] / 1e6:,.1f} MB up, "
        f"{traffic['resent']} tasks sent again",
    ]
    if scores:
        lines.append("Scores " + ", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    if status["calls_refused"]:
        counts = ", ".join(f"{name} {calls}" for name, calls in status["calls_refused"].items())
        lines.append(printable(f"Calls refused by the gate: {counts}", lines=False))
    if age > 60 and not status["ended"]:
        lines.append(Text(f"Nothing was written for {age:,.0f} s: is the server still running?", "yellow"))
    clients = status["clients"].items()
    why = [printable(f"{name}: {client['why']}", lines=False) for name, client in clients if client.get("why")]
    why += [printable(f"{name}: {what}", lines=False) for name, what in status["set_aside"].items()]
    return Group(*lines, _client_table(status["clients"]), *why)


def _client_table(clients: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each client, or region."""
    regions = any("rounds" in client for client in clients.values())
    keys = ("counted", "answers", "task", "since", "rank", *(("depth", "rounds", "steps") if regions else ()), "stale")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("region" if regions else "client", "reached", *keys):
        table.add_column(HEADINGS.get(heading, heading), justify="right" if heading in ("reached", *keys) else "left")
    for name, client in clients.items():
        cells = (client[key] if isinstance(client.get(key), str) else _number(client.get(key)) for key in keys)
        table.add_row(name, "yes" if client["reached"] else "no", *cells)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


@keys_app.command("new")
def keys_new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], hosts: Hosts, days: Days = 397
) -> None:
    """Make a certificate authority and the server's certificate, at the server."""
    from fedloom.deploy.flower import keys

    certificate = keys.new(folder, hosts, days)
    out.print(f"Give     {certificate} to every site (it is no secret)", soft_wrap=True)
    out.print(f"Ends     {keys.expiry(folder / 'keys' / 'server.crt'):%Y-%m-%d}; fedloom keys renew makes a new one")


@keys_app.command("renew")
def keys_renew(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], hosts: Hosts, days: Days = 397
) -> None:
    """Make a new certificate, at the server; sites need nothing new. Restart the server after it."""
    from fedloom.deploy.flower import keys

    out.print(f"Ends     {keys.expiry(keys.renew(folder, hosts, days)):%Y-%m-%d}")


@keys_app.command("site")
def keys_site(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the site is called.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the two halves.")] = Path(),
) -> None:
    """Make the key of a site, at the site."""
    from fedloom.deploy.flower import keys

    private, public = keys.site(name, folder)
    out.print(f"Keep     {private} (secret)", soft_wrap=True)
    out.print(
        f"Send     {public} to the server, for: fedloom keys add {public.name} --name {name} --folder DIR",
        soft_wrap=True,
    )


@keys_app.command("add")
def keys_add(
    public: Annotated[Path, typer.Argument(metavar="PUB", help="The public half of a site's key.")],
    name: Annotated[str, typer.Option("--name", help="What the server calls the site.")],
    folder: Of,
    region: Annotated[bool, typer.Option("--region", help="It is the key of a region, not of a site.")] = False,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            help="Examples that count for it. Left out: what it registers, at most three times the median of all.",
        ),
    ] = None,
) -> None:
    """Register a site at the server, so that it may join. A server that runs needs no restart."""
    from fedloom.deploy.flower import keys
    from fedloom.deploy.server.key_facts import KeyFacts

    entry = keys.add(public, name, folder, KeyFacts(region, examples))
    who = f"the region {entry.name}" if region else entry.name
    out.print(f"{who} may join, with key {entry.fingerprint}", soft_wrap=True)


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site, as the server calls it.")], folder: Of
) -> None:
    """Remove a site at the server, which may then no longer join. If it is to come back, it needs a new key."""
    from fedloom.deploy.flower import keys

    keys.remove(name, folder)
    out.print(f"{name} may no longer join")


@keys_app.command("list")
def keys_list(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]) -> None:
    """List the sites that may join, at the server."""
    from fedloom.deploy.flower import keys

    for entry in keys.listed(folder):
        out.print(f"{entry.name:20s} {entry.fingerprint}", soft_wrap=True)


def mount(app: typer.Typer) -> None:
    """Add the commands of a deployment to `fedloom`."""
    app.command()(serve)
    app.command()(region)
    app.command()(join)
    app.command()(worker)
    app.command()(status)
    app.command()(shards)
    app.add_typer(keys_app, name="keys")
    app.add_typer(site_app, name="site")


def _say(line: str) -> None:
    out.print(Text.assemble((f"{datetime.now():%H:%M:%S}", "dim"), f" {printable(line, lines=False)}"), soft_wrap=True)
