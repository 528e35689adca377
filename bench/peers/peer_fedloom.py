"""fedloom through its public API: a `Run`, `prepare`, `execute`; it tokenises for itself, and does what the others do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.peers.clock import Clock
from fedloom import (
    ByClient,
    FedIT,
    FixedRank,
    LabelDirichlet,
    Limits,
    LoRA,
    Plan,
    Rounds,
    Run,
    Table,
    Training,
    prepare,
    uniform,
)
from fedloom.core.events import Command, Event, Publish, Stop


def define(folder: Path, full: bool = False) -> Run:
    """The job in a folder as a run. Moments are new for every task, as they are in the other systems."""
    about = json.loads((folder / "job.json").read_text())
    settings, pair = about["settings"], about["pair"]
    return Run(
        name=settings["name"],
        model=str(folder / "model"),
        data=Table(folder / "train.tsv", folder / "test.tsv", text=about["text"], pair=pair, client=about["client"]),
        partition=ByClient() if about["client"] else LabelDirichlet(settings["clients"], 0.5),
        aggregator=FedIT(),
        schedule=Rounds(cohort_size=settings["cohort"], weigh=uniform),
        plan=Plan(FixedRank(settings["rank"]), local_steps=settings["steps"]),
        lora=LoRA(scaling=settings["scaling"], dropout=settings.get("dropout", 0.0)),
        training=Training(
            learning_rate=settings["rate"],
            batch_size=settings["batch"],
            max_length=128,
            clip=settings["clip"],
            keep_moments=False,
        ),
        limits=Limits(versions=settings["rounds"], evaluate_every=settings["rounds"] if full else 0),
        held_out=0.2 if full else 0.0,
        transfer=None,  # float32, as the others send
    )


def run(folder: Path, clock: Clock, full: bool = False, workers: int = 1) -> dict[str, Any]:
    """The job in fedloom; the run folder is made where the process was started."""
    job = prepare(define(folder, full))
    clock.mark("setup")
    losses: list[float] = []

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Publish):
                each = [update.result.metrics["loss"] for update in command.updates]
                losses.append(sum(each) / len(each))
            if isinstance(command, Stop):
                clock.mark("train")

    last = job.execute(Path("run"), [observe], workers, report=full).scores[-1]
    return {"losses": losses, "accuracy": last["accuracy"], "test_loss": last["loss"]}
