"""`fedloom serve`: the server of a deployment; what `fedloom region` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedloom.cli.console import out, print_now
from fedloom.cli.options import Insecure, Quota, RunFile, ServerFolder, TrackerNames, Watch
from fedloom.cli.watch import watching


def serve_command(  # noqa: PLR0913  # they are its options
    file: RunFile,
    folder: ServerFolder,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Replace a field of the Run; may be repeated. Also patience.task=3600: seconds.",
        ),
    ] = None,
    clients: Annotated[
        int, typer.Option(metavar="N", min=1, help="Start the run when N sites are ready; more may join later.")
    ] = 1,
    metrics_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=1, max=65535, help="Port of this machine at which Prometheus may ask."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the deployment in this folder.")] = False,
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
    to: TrackerNames = None,
    watch: Watch = False,
) -> None:
    """Run a federation on real machines, as its server. Sites connect with [bold]fedloom join[/bold], at any time.

    A Python FILE is executed, also by [bold]--resume[/bold], which goes by deployment.json in DIR: run only files that
    you trust, and let nobody else write into DIR.

    A process that is killed is restarted and continues from the last checkpoint. Ctrl-C ends all, [bold]--resume[/bold] continues.
    With [bold]--more N[/bold] a finished run makes N more versions; start its sites again with [bold]fedloom join[/bold].

    When the run has ended, each connected site is told so and ends too.

    Example: [bold]fedloom keys new DIR --host server.example.org[/bold], then [bold]fedloom serve mine.py --folder DIR[/bold]
    """
    from fedloom.runs.trackers.tracker import open_trackers

    open_trackers(to)  # a mistake is found before anything is started
    facts = deployment_facts(file, settings, clients) | {"metrics_port": metrics_port, "kept_megabytes": kept_megabytes}
    facts["trackers"] = to or []
    if more is not None:
        from fedloom.deploy.server.config import RUN_FOLDER
        from fedloom.runs.resume import version_to_reach

        facts["until"] = version_to_reach(folder / RUN_FOLDER, more)
    with watching(watch, folder):
        carry_out_deployment(file, folder, port, insecure, resume or more is not None, facts, quota)


def deployment_facts(file: Path, settings: list[str] | None, clients: int) -> dict[str, object]:
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


def carry_out_deployment(
    file: Path,
    folder: Path,
    port: str,
    insecure: bool,
    resume: bool,
    facts: dict[str, object],
    quota: int | None,
    more: Any = (),
) -> None:
    """Serve a deployment until it ends, and say where its results are; `more` are processes that run beside it (of a region)."""
    from fedloom.deploy.flower.address import parse_address
    from fedloom.deploy.flower.serve import serve_deployment
    from fedloom.deploy.flower.server_processes import ServerSetup

    address = parse_address("--port", port, "127.0.0.1" if insecure else "0.0.0.0")
    limit = None if quota is None else quota * 10**6
    server = ServerSetup(folder, address.host, address.port, insecure, quota=limit)
    try:
        reason = serve_deployment(server, facts, resume, print_now, more)
    except KeyboardInterrupt:
        what = "region" if more else "serve"
        out.print(f"Continue the same fedloom {what} {file} --folder {folder}, with --resume", soft_wrap=True)
        raise
    run = folder / "run"
    out.print(f"Finished {reason}\nReport   {run / 'report.html'}\nAdapter  {run / 'adapter'}", soft_wrap=True)
