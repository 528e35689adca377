"""`fedloom demo`: an encoder that sorts support tickets, compared with FedIT; or a language model that does office tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from fedloom.cli.console import command_name, notes, out
from fedloom.cli.options import OutDir, Seed, Settings
from fedloom.cli.run_view import execute_with_bar, explain_stop, introduce_run, overridden, print_summary
from fedloom.runs.public_names import collector_paused

if TYPE_CHECKING:
    from fedloom.report.run_log import RunLog
    from fedloom.runs.prepare import PreparedRun
    from fedloom.runs.run import Run
    from fedloom.runs.run_result import RunResult

SHOWN = 3
"""Test tasks that are printed with their answers."""
INDENT = " " * 9


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


def writing_run() -> Run:
    """Return the run of `fedloom demo --write`: the top two of thirty blocks, six offices; 288 steps of 4 tasks in all."""
    from fedloom.core.limits import Limits
    from fedloom.data.office_tasks import OfficeTasks
    from fedloom.data.partition import ByClient
    from fedloom.plan.budget import Plan
    from fedloom.plan.depth import FixedDepth
    from fedloom.plan.rank import RankByCapability
    from fedloom.runs.run import Run
    from fedloom.schedule.rounds import Rounds
    from fedloom.train.demo_model import smollm2
    from fedloom.train.settings import ALL_LINEAR, Generation, LoRA, Training

    return Run(
        name="demo-write",
        model=str(smollm2()),
        data=OfficeTasks(per_client=32, test=24),
        partition=ByClient(),
        schedule=Rounds(cohort_size=3),
        plan=Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=10.0), local_steps=8, depth=FixedDepth(2)),
        lora=LoRA(target_modules=ALL_LINEAR),
        training=Training(learning_rate=5e-3, batch_size=4),
        limits=Limits(versions=12, evaluate_every=4),
        generation=Generation(examples=6, max_new_tokens=80),
        threads=2,
    )


def demo_command(
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Fine-tune a language model, SmolLM2-135M-Instruct, on tasks of six offices: about four minutes on two cores.",
        ),
    ] = False,
    settings: Settings = None,
    out_dir: OutDir = None,
    seed: Seed = None,
) -> None:
    """Fine-tune a real encoder on generated support tickets of eight companies, about two minutes on two cores.

    Compares the default method (ProductDelta: changes of adapters of rank 2, 4 and 8 are added exactly) with FedIT, which averages
    the two factors of adapters separately.

    With [bold]--write[/bold] a language model learns to answer as six offices do: a clinic, a shop, a weather station, a help desk, a
    registry and a newsroom. Prints answers before and after; [bold]fedloom chat DIR[/bold] talks to the result.

    Example: [bold]fedloom demo --seed 1 --out runs/demo[/bold]
    """
    from fedloom.core import files

    parent = files.require_vacant(out_dir or files.numbered_path(Path("runs"), "demo"))
    try:
        (_write if write else _classify)(parent, settings, seed)
    except (KeyboardInterrupt, Exception) as error:
        explain_stop(error, parent)
        raise


# Tickets: accuracy, compared with FedIT -----------------------------------------------------------------------------------


def _classify(parent: Path, settings: list[str] | None, seed: int | None) -> None:
    with collector_paused():
        from fedloom.runs.prepare import prepare
    from fedloom.aggregate.fedit import FedIT
    from fedloom.report.page import write_report

    began, run = time.monotonic(), overridden(demo_run(), settings, seed)
    job = prepare(run)
    introduce_run(job)
    ours = execute_with_bar(job, parent / "product-delta")
    baseline = replace(run, name="demo-fedit", aggregator=FedIT())
    fedit = execute_with_bar(prepare(baseline), parent / "fedit")
    page = write_report([ours.folder, fedit.folder], parent / "report.html")
    _tell_accuracy(job, ours, fedit)
    _tell_cost(ours, time.monotonic() - began)
    print_summary([ours.folder, fedit.folder])
    _tell_places(page, ours.folder, f"export {ours.folder} --rank 2", "the same adapter for the weakest client")


def _tell_accuracy(job: PreparedRun, ours: RunResult, fedit: RunResult) -> None:
    """Print what was reached, beside what costs nothing and what the usual method reaches."""
    start, end, other = ours.scores[0]["accuracy"], ours.scores[-1]["accuracy"], fedit.scores[-1]["accuracy"]
    out.print(Text.assemble("Result   ", (f"accuracy {100 * end:.1f} %", "bold"), " with ProductDelta on test tickets"))
    out.print(f"{INDENT}{100 * other:.1f} % with FedIT, which averages both LoRA factors separately")
    out.print(f"{INDENT}{100 * job.baselines()['majority']:.1f} % always answering the commonest label")
    out.print(f"{INDENT}{100 * start:.1f} % before training")


def _tell_cost(ours: RunResult, seconds: float) -> None:
    """Print what a run took: traffic, the time that its devices would need, and that of this machine."""
    from fedloom.report.facts import duration_text, elapsed_seconds, latest_value
    from fedloom.report.numbers import format_bytes, format_duration

    log = ours.log
    up, down = (format_bytes(latest_value(log, f"bytes_{way}")) for way in ("up", "down"))
    out.print(f"Cost     {up} up and {down} down over all clients; no text left its client")
    out.print(f"{INDENT}{duration_text(log, elapsed_seconds(log))} on their devices, {format_duration(seconds)} here")


def _tell_places(page: Path, folder: Path, command: str, why: str) -> None:
    """Print where the results lie, and a command to go on with."""
    out.print(f"Report   {page}", soft_wrap=True)
    out.print(f"Adapter  {folder / 'adapter'}", soft_wrap=True)
    out.print(f"Next     {command_name()} {command}", soft_wrap=True)
    out.print(f"{INDENT}{why}")


# Office tasks: answers before and after -----------------------------------------------------------------------------------


def _write(parent: Path, settings: list[str] | None, seed: int | None) -> None:
    with collector_paused():
        from fedloom.runs.prepare import prepare

    began = time.monotonic()
    notes.print("Model    SmolLM2-135M-Instruct; its weights are 4-bit values, made float32")
    notes.print(f"{INDENT}unpacked at the first time: about 20 seconds, and 540 MB on the disk")
    job = prepare(overridden(writing_run(), settings, seed))
    introduce_run(job)
    result = execute_with_bar(job, parent)
    _tell_perplexity(result)
    _tell_cost(result, time.monotonic() - began)
    _tell_offices(result.log)
    _tell_answers(result.log)
    _tell_places(result.report, result.folder, f"chat {result.folder}", "talk to the fine-tuned model")


def _tell_perplexity(result: RunResult) -> None:
    """Print how much better test answers are predicted, and how many are now right word for word."""
    from fedloom.report.numbers import short

    first, last = result.scores[0], result.scores[-1]
    before, after = first["perplexity"], last["perplexity"]
    figures = f"perplexity {short(after)} on test answers"
    out.print(Text.assemble("Result   ", (figures, "bold"), f"; {short(before)} before ({after / before - 1:+.0%})"))
    exact = (100 * score["exact_match"] for score in (last, first))
    out.print(f"{INDENT}{{:.0f}} % of the answers are right word for word, {{:.0f}} % before".format(*exact))


def _tell_offices(log: RunLog) -> None:
    """Print a table of the offices: the perplexity on tasks that each of them held out."""
    from fedloom.cli.tables import rich_table
    from fedloom.report.tables import Grid

    head = ("Office", "Rank", "Held out", "Perplexity before", "After", "Exact answers")
    rows = [_office_row(line) for line in log.clients]
    out.print(rich_table(Grid(head, tuple(rows)), ("Office",)))


def _office_row(line: Any) -> tuple[str, ...]:
    from fedloom.report.numbers import short

    before, after = (short(float(line[name])) for name in ("base_perplexity", "perplexity"))
    return (str(line["client"]), str(line["rank"]), str(line["held_out"]), before, after, f"{line['exact_match']:.0%}")


def _tell_answers(log: RunLog) -> None:
    """Print a few test tasks with the answers before and after training, the shortest tasks first."""
    samples: Sequence[Any] = sorted(log.samples, key=lambda line: len(line["context"]) + len(line["reference"]))
    for line in samples[:SHOWN]:
        out.print(Text.assemble((f"{line['request']} ", "bold"), (str(line["context"]), "dim")))
        for name, style in (("before", "red"), ("after", "green"), ("reference", "")):
            out.print(Text.assemble((f"{name:10s}", style), " ".join(str(line[name]).split()) or "(nothing)"))
        out.print()
