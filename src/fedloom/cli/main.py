"""The command line: `fedloom demo`, `run`, `report`, `replay`, `export`, `inspect`, `audit`, and the commands of a deployment.

An error of the user's is one sentence and exit code 2, without a traceback. Each command imports what it needs when it is called, so
that `fedloom --help` takes no longer than typer.
"""

from __future__ import annotations

import codecs
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fedloom.cli.audit import audit_command
from fedloom.cli.console import err, out, print_traceback
from fedloom.cli.deploy import mount
from fedloom.cli.inspect import inspect_command
from fedloom.cli.privacy import privacy_command
from fedloom.cli.replay import replay_command, rollback_command
from fedloom.core.errors import Refused, refuse_damaged
from fedloom.core.files import disk_full_error, read_json
from fedloom.runs.public_names import collector_paused

if TYPE_CHECKING:
    from fedloom.core.events import Command, Event
    from fedloom.core.policies import Observer
    from fedloom.runs.execute import Outcome
    from fedloom.runs.job import Job
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
ESCAPED = "fedloom.escaped"
"""Name of the error handler for letters that the encoding of a terminal lacks."""
PLAIN_MARKS = str.maketrans(
    {"\u00a0": " ", "\u2013": "-", "\u2026": "...", "\u00b1": "+-", "\u00d7": "x", "\u2192": "->"}
)

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Replace a field of the run, for example schedule.cohort_size=5; may be repeated.",
    ),
]
OutDir = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; must not exist yet.")]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="The seed of the run: the same seed gives the same bytes.")
]

WorkerPool = Annotated[
    str,
    typer.Option(
        metavar="WORKERS",
        help="Where clients are trained. [bold]1[/bold]: in this process. [bold]2[/bold] or more: in so many processes with one "
        "copy of the base model in memory, each with the run's number of threads; they take seconds to start. [bold]ray[/bold] or "
        "[bold]ray:ADDRESS[/bold]: on a Ray cluster, with as many actors as it has room for ([bold]4@ray[/bold]: with four). The "
        "results do not depend on it.",
    ),
]


def demo_run() -> Run:
    """Return the demo's run: ranks 2, 4 and 8 by device, synchronous rounds, ProductDelta; 144 steps of 16 tickets in all."""
    from fedloom.core.limits import Limits
    from fedloom.data.partition import ByClient
    from fedloom.data.tickets import Tickets
    from fedloom.plan.budget import Plan
    from fedloom.plan.rank import RankByCapability
    from fedloom.runs.run import Run
    from fedloom.schedule.rounds import Rounds
    from fedloom.train.demo_model import minilm
    from fedloom.train.settings import Training

    return Run(
        name="demo-product-delta",
        model=str(minilm()),
        data=Tickets(tangled=0.1, alpha=3.0),
        partition=ByClient(),
        schedule=Rounds(cohort_size=3),
        plan=Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=0.5), local_steps=8),
        training=Training(learning_rate=5e-3, max_length=64),
        limits=Limits(versions=6, evaluate_every=2),
        test_limit=240,
        threads=2,
    )


@app.command("demo")
def demo_command(settings: Settings = None, out_dir: OutDir = None, seed: Seed = None) -> None:
    """Fine-tune a real encoder on generated support tickets of eight companies, about two minutes on two cores.

    Compares the default method (ProductDelta: changes of adapters of rank 2, 4 and 8 are added exactly) with FedIT, which averages
    the two factors of adapters separately.

    Example: [bold]fedloom demo --seed 1 --out runs/demo[/bold]
    """
    with collector_paused():
        from fedloom.runs.prepare import prepare
    from fedloom.aggregate.fedit import FedIT
    from fedloom.core import files
    from fedloom.report.page import write_report

    parent = files.require_vacant(out_dir or files.numbered_path(Path("runs"), "demo"))
    run = _overridden(demo_run(), settings, seed)
    job = prepare(run)
    _introduce(job)
    ours = _carry_out(job, parent / "product-delta")
    baseline = replace(run, name="demo-fedit", aggregator=FedIT())
    fedit = _carry_out(prepare(baseline), parent / "fedit")
    page = write_report([ours.folder, fedit.folder], parent / "report.html")
    _conclude(job, ours, fedit, page)


@app.command("run")
def run_command(  # noqa: PLR0913  # they are its options
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A Python file that defines `run = Run(...)`.")],
    settings: Settings = None,
    out_dir: OutDir = None,
    seed: Seed = None,
    workers: WorkerPool = "1",
    pictures: Annotated[
        bool, typer.Option("--report/--no-report", help="Whether to write report.html at the end.")
    ] = True,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Continue the unfinished run in this folder.")
    ] = None,
    more: Annotated[
        int | None,
        typer.Option(
            "--more",
            metavar="N",
            help="Add N versions to a finished run: that of [bold]--resume DIR[/bold], or the latest one of this name in runs/.",
        ),
    ] = None,
    keep_updates: Annotated[
        bool,
        typer.Option(
            "--keep-updates", help="Keep the answers of clients, so that [bold]fedloom replay[/bold] can read them."
        ),
    ] = False,
) -> None:
    """Simulate the run that a Python file defines, on a virtual clock.

    Writes a run folder: manifest.json, metrics.jsonl, trace.jsonl, adapter/ (a PEFT folder) and report.html. The file is Python code
    and is executed: run only files that you trust.

    A run that was interrupted or killed continues with the same command and [bold]--resume DIR[/bold], and ends in the same bytes.
    [bold]--more N[/bold] adds N versions to a finished run, on the same data, as if it had been that long from the beginning. For
    other data (next month's), begin a new run from its adapter: [bold]--set start=DIR[/bold]; any LoRA folder of PEFT will do.

    Example: [bold]fedloom run experiments/tickets.py --set schedule.cohort_size=2 --workers 2 --out runs/mine[/bold]
    """
    with collector_paused():
        from fedloom.runs.prepare import prepare
    from fedloom.core import files
    from fedloom.runs.run_file import load_run_file
    from fedloom.train.workers.worker import Workers

    Workers.parse(workers)  # a mistake is reported before anything is loaded
    if (resume or more is not None) and out_dir:
        raise Refused("--out", str(out_dir), "a run goes on in its own folder; give --resume alone")
    value = _overridden(load_run_file(file), settings, seed)
    if more is not None and resume is None:
        resume = files.latest_path(Path("runs"), value.name)
        if resume is None:
            raise Refused("--more", more, f"there is no run {value.name}-001 in runs/; name its folder: --resume DIR")
    target = resume or files.require_vacant(out_dir or files.numbered_path(Path("runs"), value.name))
    try:
        with refuse_damaged("--resume", str(resume)) if resume else nullcontext():
            job = prepare(value, resume, more)
            _introduce(job)
            outcome = _carry_out(job, target, workers, pictures, keep_updates=keep_updates)
    except (KeyboardInterrupt, Exception) as error:
        if (isinstance(error, KeyboardInterrupt) or disk_full_error(error)) and target.is_dir():
            err.print(_what_is_left(target), soft_wrap=True)
        raise
    _summarise([outcome.folder])
    page = outcome.folder / "report.html" if pictures else f"{sys.argv[0]} report {outcome.folder}"
    out.print(f"\nReport   {page}\nAdapter  {outcome.folder / 'adapter'}", soft_wrap=True)
    _tell_limits(job)


@app.command("report")
def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="One run folder, or several to compare.")],
    page: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="The page to write; by default report.html in the run folder, or here."
        ),
    ] = None,
) -> None:
    """Write the HTML report of one run, or a comparison of several, and print a summary.

    Example: [bold]fedloom report runs/hlora runs/fedit --out comparison.html[/bold]
    """
    from fedloom.report.page import write_report

    target = page or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    if page is None and len(folders) > 1 and target.exists():
        raise Refused("--out", str(target), "it exists already; name another file with --out")
    written = write_report(folders, target)
    _summarise(folders)
    out.print(f"\nReport   {written}")


@app.command("export")
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    client: Annotated[str | None, typer.Option(metavar="ID", help="Write it at the rank of this client.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Write its best approximation at this rank.")] = None,
    merged: Annotated[
        bool, typer.Option("--merged", help="Merge it into the base model: a plain transformers folder.")
    ] = False,
    target: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; must not exist yet.")
    ] = None,
) -> None:
    """Write the adapter of a run for one client, at one rank, or merged into the base model.

    Example: [bold]fedloom export runs/mine --rank 4 --out adapter-r4[/bold]
    """
    from fedloom.core.files import create_folder
    from fedloom.report.run_log import read_run_log
    from fedloom.train.export import open_run, save_adapter, save_merged, truncate_adapter

    if sum([client is not None, rank is not None, merged]) != 1:
        raise Refused("export", str(folder), "say exactly one of --client ID, --rank R, --merged")
    log = read_run_log(folder)
    if client is not None:
        with refuse_damaged("run folder", str(folder)):
            ranks = {str(line["client"]): int(line["rank"]) for line in (*log.clients, *log.unscored)}
        if client not in ranks:
            raise Refused("--client", client, f"the run scored {', '.join(sorted(ranks)) or 'no clients'}")
        rank = ranks[client]
    base, adapter, names = open_run(folder)
    top = max(factor.rank for factor in adapter.factors.values())
    if rank is not None and not 1 <= rank <= top:
        raise Refused("--rank", rank, f"the run's adapter has rank {top}; choose 1 to {top}")
    name = "merged" if merged else f"adapter-{client}" if client else f"adapter-r{rank}"
    place = create_folder(target or folder / name)
    if merged:
        out.print(f"Model  {save_merged(base, adapter, names, place)}", soft_wrap=True)
    else:
        assert rank is not None
        written = save_adapter(base, truncate_adapter(adapter, rank), names, place, log.manifest["run"].get("date"))
        out.print(f"Adapter  {written}", soft_wrap=True)


app.command("inspect")(inspect_command)
app.command("audit")(audit_command)
app.command("privacy")(privacy_command)
app.command("replay")(replay_command)
app.command("rollback")(rollback_command)
mount(app)


def main() -> NoReturn:
    """The `fedloom` command."""
    write_any_text(sys.stdout)
    write_any_text(sys.stderr)
    sys.excepthook = print_traceback
    try:
        code = app(standalone_mode=False)  # typer returns the code of an Exit, and 130 for Ctrl-C
    except Refused as error:
        _complain(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except typer.Exit as stop:
        code = stop.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error of click
            _complain(error.format_message())
            sys.exit(2)
        if disk_full := disk_full_error(error):
            _complain(f"the disk is full: {disk_full.filename or 'a file'} could not be written; make room")
            sys.exit(2)
        if isinstance(error, OSError) and error.filename and error.strerror:
            _complain(f"{error.filename}: {error.strerror}")
            sys.exit(2)
        raise
    if code == INTERRUPTED:
        _complain("interrupted; a run folder made so far says so and can be reported on", "bold yellow")
    sys.exit(code or 0)


def _complain(text: str, style: str = "bold red") -> None:
    err.print(Text.assemble(("fedloom:", style), f" {text}"), soft_wrap=True)


def write_any_text(stream: object) -> None:
    """Let a stream take any text: where it is not in UTF-8, as ASCII with escapes, which every terminal and every reader of a file
    shows alike; where it is, with escapes for what no text holds.
    """
    if isinstance(stream, TextIOWrapper):
        codecs.register_error(ESCAPED, _escape_letters)
        encoding = None if stream.encoding.lower().startswith("utf") else "ascii"
        stream.reconfigure(encoding=encoding, errors=ESCAPED)


def _escape_letters(error: UnicodeError) -> tuple[str, int]:
    """Spell marks of punctuation plainly, and escape all else."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN_MARKS)
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def _overridden(value: Run, settings: list[str] | None, seed: int | None) -> Run:
    from fedloom.runs.run_file import override

    return override(value, [*(settings or []), *([f"seed={seed}"] if seed is not None else [])])


def _introduce(job: PreparedRun) -> None:
    from fedloom.cli.tables import partition_table
    from fedloom.data.partition import partition_statistics
    from fedloom.runs.job import SIMULATED_NOISE

    run, shape = job.run, job.server.shape
    size = (shape.parameters + shape.embeddings) / 1e6
    out.print(Text.assemble((run.name, "bold"), f": {run.model}, {size:.1f} M parameters, kept frozen"))
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
    about: Mapping[str, Any] = job.describe()
    if (majority := about["baselines"].get("majority")) is not None:
        answer = f"Always answering {about['metrics']['majority_label']!r}"
        out.print(f"{answer} would be right for {100 * majority:.1f} % of the test examples\n")
    if run.privacy:
        out.print(f"{SIMULATED_NOISE}\n", soft_wrap=True)
    if job.resumed_from:
        out.print(f"Goes on {job.resumed_from.resume_point}\n")
    for note in about["notes"]:
        out.print(Text.assemble(("Note", "yellow"), f" {note}\n"))


def _tell_limits(job: PreparedRun) -> None:
    """Say which limits of a site would have to be loosened for this run: a simulation has none."""
    from fedloom.deploy.site.export_sites import needed_limits

    rows = min(len(shard.train) + len(shard.held_out) for shard in job.shards)
    needed = needed_limits(job.run, rows, None if job.base.labels is None else job.split.train.names)
    if needed:
        lines = ", ".join(f"{name} = {value}" for name, value in needed.items())
        out.print(
            f"Limits   sites with default limits refuse this run; it needs {lines} (docs/site.md)", soft_wrap=True
        )


def _carry_out(job: PreparedRun, folder: Path, workers: str = "1", report: bool = True, **more: Any) -> Outcome:
    """Execute with a progress bar: versions or virtual time, whichever ends the run first, and what it has reached."""
    columns = (TextColumn("{task.description}"), BarColumn(8), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err) as progress:
        return job.execute(folder, [progress_observer(progress, job)], workers, report, **more)


def progress_observer(progress: Progress, job: Job) -> Observer:
    """Return an observer that moves a bar: versions or virtual time, whichever ends the run first, and what it has reached."""
    from fedloom.core.events import ScoresReady
    from fedloom.runs.observation import RunObservation, VersionMade

    limits, version = job.run.limits, job.resumed_from.version if job.resumed_from else 0
    observation = RunObservation(version=version)
    bar = progress.add_task(f"{type(job.run.aggregator).__name__:8s}", total=1.0, now="")
    progress.update(bar, completed=version / limits.versions)
    shown = {"version": f"{version}/{limits.versions}", "time": "", "accuracy": "", "loss": "", "stale": ""}

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        shown["time"] = f"{now:,.0f} virtual s"
        for fact in observation.read(now, event, commands):
            match fact:
                case ScoresReady(_, metrics) if "perplexity" in metrics:
                    shown["accuracy"] = f"ppl {metrics['perplexity']:.1f}"
                case ScoresReady(_, metrics):
                    shown["accuracy"] = f"acc {100 * metrics['accuracy']:.1f} %"
                case VersionMade() if fact.updates:
                    shown["version"] = f"{fact.version}/{limits.versions}"
                    losses = [u.result.metrics["loss"] for u in fact.updates if "loss" in u.result.metrics]
                    shown["loss"] = f"loss {mean(losses):.2f}" if losses else ""
                    stale = mean(fact.staleness)
                    shown["stale"] = f"{stale:.0f} stale" if stale >= 1 else ""
        done = max(observation.version / limits.versions, now / limits.seconds if limits.seconds else 0.0)
        progress.update(bar, completed=min(done, 1.0), now="  ".join(filter(None, shown.values())))

    return observe


def _what_is_left(folder: Path) -> str:
    """Say how to go on where a run was stopped: with the rest of it, or with its report alone."""
    path = folder / "manifest.json"
    finished = path.exists() and read_json(path).get("status") == "finished"
    return f"Report   {sys.argv[0]} report {folder}" if finished else f"Go on    {resume_command(sys.argv, folder)}"


def resume_command(arguments: list[str], folder: Path) -> str:
    """Return the command that goes on with an interrupted run: the same one, with --resume in the place of --out and --more."""
    rest, skip, replaced = list[str](), False, ("--out", "--resume", "--more")
    for argument in arguments:
        if not skip and argument.partition("=")[0] not in replaced:
            rest.append(argument)
        skip = not skip and argument in replaced
    return shlex.join([*rest, "--resume", str(folder)])


def _summarise(folders: list[Path]) -> None:
    from fedloom.cli.tables import runs_in_terminal

    with refuse_damaged("run folder", ", ".join(map(str, folders))):
        shown = runs_in_terminal(folders)
    out.print(shown)


def _conclude(job: PreparedRun, ours: Outcome, fedit: Outcome, page: Path) -> None:
    """Print what the demo learnt, where it is, and how to use it."""
    _summarise([ours.folder, fedit.folder])
    start, end, other = ours.scores[0]["accuracy"], ours.scores[-1]["accuracy"], fedit.scores[-1]["accuracy"]
    told = (
        f"\nAlways answering the commonest label would be right for {100 * job.baselines()['majority']:.1f} % of the test "
        f"tickets. The untrained model classified {100 * start:.1f} % correctly, FedIT reached {100 * other:.1f} %, "
    )
    out.print(Text.assemble(told, (f"ProductDelta {100 * end:.1f} %", "bold"), "; no ticket left its company.\n"))
    out.print(
        f"Report   {page}\nAdapter  {ours.folder / 'adapter'} (README.md there shows how to load it with peft)",
        soft_wrap=True,
    )
    out.print(
        f"Next     {sys.argv[0]} export {ours.folder} --rank 2    (the same adapter for the weakest client)",
        soft_wrap=True,
    )
