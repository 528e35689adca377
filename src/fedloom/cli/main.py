"""The command line. An error of the user's is one sentence and exit code 2, without a traceback."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedloom.cli.deploy import mount
from fedloom.cli.inspect import inspect_command
from fedloom.cli.progress import resume_command, progress_observer
from fedloom.core.errors import Refused
from fedloom.core.files import disk_full_error

if TYPE_CHECKING:
    from fedloom.runs.execute import Outcome
    from fedloom.runs.prepare import PreparedRun
    from fedloom.runs.run import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated LoRA fine-tuning in which every client brings what it can.\n\nStart with [bold]fedloom demo[/bold].",
    rich_markup_mode="rich",
)
INTERRUPTED = 130
"""What a shell expects of a program that Ctrl-C ended."""

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field, e.g. schedule.cohort_size=5; may be repeated."),
]
OutDir = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder; must not exist yet.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="The run's seed: same seed, same bytes.")]

Who = Annotated[
    str,
    typer.Option(
        metavar="WHO",
        help="Who trains: [bold]1[/bold] this process; [bold]2[/bold] or more local processes, each on the run's threads, over "
        "one copy of the base in memory; [bold]ray[/bold] or [bold]ray:ADDRESS[/bold] actors of a Ray cluster, as many as it has "
        "room for ([bold]4@ray[/bold]: four). The numbers do not depend on it. Processes take seconds to start: for long runs.",
    ),
]


@app.command()
def demo_command(settings: Settings = None, out_dir: OutDir = None, seed: Seed = None) -> None:
    """Fine-tune a real encoder on generated support tickets of eight companies, about two minutes on two cores.

    Compares the default method (ProductDelta: changes of adapters of rank 2, 4 and 8 are added exactly) with FedIT, which
    averages factors apart.
    """
    from fedloom import prepare
    from fedloom.cli.demo import baseline_run
    from fedloom.cli.demo import demo_run as demo_run
    from fedloom.core import files
    from fedloom.report.page import write_report

    parent = files.require_vacant(out_dir or files.numbered_path(Path("runs"), "demo"))
    run = _overridden(demo_run(), settings, seed)
    job = prepare(run)
    _introduce(job)
    ours = _carry_out(job, parent / "product-delta")
    fedit = _carry_out(prepare(baseline_run(run)), parent / "fedit")
    page = write_report([ours.folder, fedit.folder], parent / "report.html")
    _conclude(job, ours, fedit, page)


@app.command()
def run_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Python file with a value `run = Run(...)`.")],
    settings: Settings = None,
    out_dir: OutDir = None,
    seed: Seed = None,
    workers: Who = "1",
    pictures: Annotated[bool, typer.Option("--report/--no-report", help="Write report.html at the end.")] = True,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the unfinished run in this folder.")
    ] = None,
    keep_updates: Annotated[
        bool, typer.Option("--keep-updates", help="Keep the clients' answers, for [bold]fedloom replay[/bold].")
    ] = False,
) -> None:
    """Carry out the Run value of a Python file on the virtual clock.

    Writes a run folder: manifest.json, metrics.jsonl, trace.jsonl, adapter/ (a PEFT folder) and report.html.
    The file is Python and is executed: run only files you trust.

    A run that was interrupted or killed goes on with the same command and [bold]--resume DIR[/bold], to the same bytes.

    Example: [bold]fedloom run experiments/tickets.py --set schedule.cohort_size=2 --workers 2 --out runs/mine[/bold]
    """
    from fedloom import prepare
    from fedloom.core import files
    from fedloom.runs.run_file import load_run_file
    from fedloom.train.workers.worker import Workers

    Workers.parse(workers)  # a slip is told before anything is loaded
    if resume and out_dir:
        raise Refused("--out", str(out_dir), "a run goes on in its own folder; give --resume alone")
    value = _overridden(load_run_file(file), settings, seed)
    target = resume or files.require_vacant(out_dir or files.numbered_path(Path("runs"), value.name))
    job = prepare(value, resume)
    _introduce(job)
    try:
        outcome = _carry_out(job, target, workers, pictures, keep_updates=keep_updates)
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(error, KeyboardInterrupt) or disk_full_error(error):
            err.print(_escaped(_what_is_left(target)), soft_wrap=True)
        raise
    _summarise([outcome.folder])
    page = outcome.folder / "report.html" if pictures else f"{sys.argv[0]} report {outcome.folder}"
    out.print(f"\nReport   {page}\nAdapter  {outcome.folder / 'adapter'}", soft_wrap=True)


@app.command()
def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders; several are compared.")],
    page: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where to write the page.")] = None,
) -> None:
    """Write the HTML report of one run, or the comparison of several, and print the summary."""
    from fedloom.report.page import write_report

    target = page or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    if page is None and len(folders) > 1 and target.exists():
        raise Refused("--out", str(target), "it exists already; name another file with --out")
    written = write_report(folders, target)
    _summarise(folders)
    out.print(f"\nReport   {written}")


@app.command()
def replay_command(
    place: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, or the trace in it.")],
) -> None:
    """Feed the events of a run to a fresh server: the same bytes must come out. Nothing is trained and no model is needed.

    The run has to be recorded with [bold]fedloom run FILE --keep-updates[/bold]. Exit code 1 if a line of the trace differs.
    """
    from fedloom.runs.replay import replay

    found = replay(place.parent if place.is_file() else place)
    if found.difference:
        out.print(
            f"{found.events} events gave the same bytes, then a difference\n{_escaped(found.difference)}",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    out.print(f"{found.events} events gave the same bytes")


@app.command()
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    client: Annotated[str | None, typer.Option(metavar="ID", help="At the rank of this client.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="At this rank: the best approximation of it.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merged into the base: a plain transformers folder.")
    ] = False,
    target: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to; must not exist yet.")] = None,
) -> None:
    """Write the run's adapter for one client, at one rank, or merged into the base model."""
    from fedloom.core.files import create_folder
    from fedloom.report.run_log import read_run_log
    from fedloom.train.export import truncate_adapter, open_run, save_adapter, save_merged

    if sum([client is not None, rank is not None, merged]) != 1:
        raise Refused("export", str(folder), "say exactly one of --client ID, --rank R, --merged")
    log = read_run_log(folder)
    if client is not None:
        ranks = {str(line["client"]): int(line["rank"]) for line in log.clients}
        if client not in ranks:
            raise Refused("--client", client, f"the run scored {', '.join(sorted(ranks)) or 'no clients'}")
        rank = ranks[client]
    base, adapter, names = open_run(folder)
    top = max(factor.rank for factor in adapter.factors.values())
    if rank is not None and not 1 <= rank <= top:
        raise Refused("--rank", rank, f"the run's adapter has rank {top}; choose 1 to {top}")
    name = "merged" if merged else f"adapter-{client}" if client else f"adapter-r{rank}"
    place = create_folder(target or folder / name)
    done = save_adapter(base, truncate_adapter(adapter, rank), names, place) if rank else save_merged(base, adapter, names, place)
    out.print(f"{'Model' if merged else 'Adapter'}  {done}")


app.command()(inspect_command)
mount(app)


def main() -> NoReturn:
    """The `fedloom` command."""
    try:
        code = app(standalone_mode=False)  # typer gives back the code of an Exit, and 130 for Ctrl-C
    except Refused as error:
        err.print(f"[bold red]fedloom:[/bold red] {_escaped(str(error))}", soft_wrap=True)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own usage errors
            err.print(f"[bold red]fedloom:[/bold red] {_escaped(error.format_message())}", soft_wrap=True)
            sys.exit(2)
        if not (lack := disk_full_error(error)):
            raise
        reason = f"the disk is full: {lack.filename or 'a file'} could not be written; make room"
        err.print(f"[bold red]fedloom:[/bold red] {_escaped(reason)}", soft_wrap=True)
        sys.exit(2)
    if code == INTERRUPTED:
        err.print(
            "[bold yellow]fedloom:[/bold yellow] interrupted; a run folder made so far says so and can be reported on"
        )
    sys.exit(code or 0)


def _overridden(value: Run, settings: list[str] | None, seed: int | None) -> Run:
    from fedloom.runs.run_file import override

    return override(value, [*(settings or []), *([f"seed={seed}"] if seed is not None else [])])


def _introduce(job: PreparedRun) -> None:
    from fedloom.cli.tables import partition_table
    from fedloom.data.partition import partition_statistics

    run, shape = job.run, job.server.shape
    size = (shape.parameters + shape.embeddings) / 1e6
    out.print(f"[bold]{_escaped(run.name)}[/bold]: {_escaped(run.model)}, {size:.1f} M parameters, kept frozen")
    out.print(
        f"{len(job.profiles)} clients, {type(run.aggregator).__name__}, {type(run.schedule).__name__}, seed {run.seed}"
    )
    if groups := job.server.manifest_sections().get("groups"):
        sizes = [len(clients) for clients in groups.values()]
        out.print(f"{len(sizes)} groups of {min(sizes)} to {max(sizes)} clients, each led by an edge")
    out.print(partition_table(partition_statistics(job.split.train, job.shards)))
    fleet = job.server.fleet()
    ranks = Counter(run.plan(profile, fleet).rank for profile in job.profiles.values())
    out.print("Ranks now: " + ", ".join(f"{rank} at {count} clients" for rank, count in sorted(ranks.items())) + "\n")
    if job.resumed_from:
        out.print(f"Goes on {job.resumed_from.where}\n")
    for note in job.describe()["notes"]:  # type: ignore[attr-defined]
        out.print(f"[yellow]Note[/yellow] {_escaped(note)}\n")


def _carry_out(job: PreparedRun, folder: Path, workers: str = "1", report: bool = True, **more: Any) -> Outcome:
    """Execute with a progress bar: versions or virtual time, whichever ends the run first, and what it has reached."""
    columns = (TextColumn("{task.description}"), BarColumn(8), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as progress:
        return job.execute(folder, [progress_observer(progress, job)], workers, report, **more)


def _what_is_left(folder: Path) -> str:
    """To be done where a run was stopped: the rest of it, or its report alone."""
    path = folder / "manifest.json"
    over = path.exists() and json.loads(path.read_bytes()).get("status") == "finished"
    return f"Report   {sys.argv[0]} report {folder}" if over else f"Go on    {resume_command(sys.argv, folder)}"


def _summarise(folders: list[Path]) -> None:
    from fedloom.cli.tables import runs_in_terminal

    out.print(runs_in_terminal(folders))


def _conclude(job: PreparedRun, ours: Outcome, fedit: Outcome, page: Path) -> None:
    """What the demo learnt, where it is, how to use it."""
    _summarise([ours.folder, fedit.folder])
    start, end, other = ours.scores[0]["accuracy"], ours.scores[-1]["accuracy"], fedit.scores[-1]["accuracy"]
    out.print(
        f"\nThe untrained model classified {100 * start:.1f} % of the test tickets correctly, FedIT reached "
        f"{100 * other:.1f} %, [bold]ProductDelta {100 * end:.1f} %[/bold]; no ticket left its company.\n"
    )
    out.print(
        f"Report   {page}\nAdapter  {ours.folder / 'adapter'} (README.md there shows how to load it with peft)",
        soft_wrap=True,
    )
    out.print(
        f"Next     {sys.argv[0]} export {ours.folder} --rank 2    (the same adapter for the weakest client)",
        soft_wrap=True,
    )


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
