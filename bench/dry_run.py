"""The dry run: what it says of three runs, beside what they cost then: bytes, virtual and real time, memory.

    python -m bench.dry_run [--quick]

The runs: the demo, `experiments/tickets.py`, and a small writer (a Llama of 3 M random weights with 16,384 words, asynchronous).
Without `--quick` also `fedloom demo --write`, on a real language model. Each prediction and each run is a process of its own. Real
time is counted in processor seconds of one thread, without loading and without the report, since others use the machine. Memory is
the most that the process held. The last line is one JSON object:

- `bytes_exact`: whether bytes up and down, and the virtual time, are what the run then had, in all three;
- `time_error`, `memory_error`: by run, the relative error of real time and of memory (bar 0.3);
- `client_memory_error`: that of `Shape.train_memory` beside the base, for a step of the writer at depth 1 and at full depth, against
  the rise of the resident set in a fresh process (bar 0.3);
- `predict_share`: processor seconds of the prediction over those of the run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.memory import HONEST_MALLOC, peak
from bench.timing import under
from fedloom.cli.demo import demo_run, writing_run
from fedloom.core.types import Budget
from fedloom.data.instructions import Instructions
from fedloom.data.partition import IID
from fedloom.plan.budget import Plan
from fedloom.plan.depth import DepthByCapability
from fedloom.plan.rank import FixedRank
from fedloom.runs.dry_run.cost_estimate import estimate_cost
from fedloom.runs.dry_run.step_times import train_largest
from fedloom.runs.dry_run.untrained import LargestStep, MemberTask, padded_tokens
from fedloom.runs.execute import simulated_trainer
from fedloom.runs.prepare import prepare
from fedloom.runs.run import Run
from fedloom.runs.run_file import load_run_file
from fedloom.schedule.fedbuff import FedBuff
from fedloom.train.settings import Training
from tests.support.tiny_models import settle, tiny_generator, toy_answers

NAMES, BAR = ("demo", "tickets", "writer"), 0.3
SIZES = {"vocab_size": 16384, "hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 512}
TICKETS = Path(__file__).parents[1] / "experiments" / "tickets.py"


def writer(folder: Path) -> Run:
    """A run of a small model that writes, with asynchronous clients of different depth."""
    return Run(
        name="writer",
        model=str(folder / "writer"),
        data=Instructions(toy_answers(600)),
        partition=IID(5),
        schedule=FedBuff(buffer_size=3, max_in_flight=5),
        plan=Plan(FixedRank(8), local_steps=10, depth=DepthByCapability(seconds=30.0)),
        training=Training(learning_rate=2e-3, batch_size=8),
    )


def run_of(name: str, folder: Path) -> Run:
    """Return the run of this name, on one thread and the CPU."""
    made = {"demo": demo_run, "tickets": lambda: load_run_file(TICKETS), "demo --write": writing_run}
    run = made[name]() if name in made else writer(folder)
    return replace(run, threads=1, device="cpu")


def predicted(name: str, folder: Path, clock: str) -> dict[str, Any]:
    """In a fresh process: what the dry run says, by this clock of `time`."""
    job, began = prepare(run_of(name, folder)), time.process_time()
    said = estimate_cost(job, clock=getattr(time, clock))
    figures = {"up": said.bytes_up, "down": said.bytes_down, "virtual": said.virtual_seconds, "memory": said.memory}
    return {**figures, "seconds": said.real_seconds, "cost": time.process_time() - began}


def measured(name: str, folder: Path, clock: str) -> dict[str, Any]:
    """In a fresh process: what the run costs."""
    job, now = prepare(run_of(name, folder)), getattr(time, clock)
    began = now()
    result = job.execute(folder / f"{name}-{clock}", report=False)
    seconds, most = now() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "version"][-1]
    figures = {"up": last["bytes_up"], "down": last["bytes_down"], "virtual": last["time"], "memory": most}
    return {**figures, "seconds": seconds, "cost": seconds}


def client_memory(_: str, folder: Path, depth: str) -> dict[str, Any]:
    """In a fresh process: bytes by which a step of the writer at this depth rises, and what `Shape` says beside the base."""
    full = replace(writer(folder), plan=Plan(FixedRank(8)), training=Training(batch_size=64))
    job = prepare(replace(full, threads=1, device="cpu"))
    trainer, shape, shard = simulated_trainer(job), job.server.shape, job.shards[0]
    batch = tuple(sorted(shard.train, key=lambda i: len(job.train_texts.ids[i]))[-64:])
    member = MemberTask(1, shard.client, Budget(8, 1, int(depth)))
    train_largest(job, trainer, LargestStep(member, batch[:1], 0.0))  # makes slots and transposed weights
    before, highest = peak(lambda: train_largest(job, trainer, LargestStep(member, batch, 0.0)))
    tokens, answers = padded_tokens(job.train_texts, [batch]), sum(map(job.train_texts.target_count, batch))
    said = shape.train_memory(8, tokens, int(depth), answers) - 4.0 * (shape.parameters + shape.embeddings)
    return {"said": said, "rise": highest - before}


ROLES = {"predicted": predicted, "measured": measured, "client_memory": client_memory}


def child(role: str, *rest: str, **more: str) -> dict[str, Any]:
    """Return what a function of `ROLES` gives in a process of its own."""
    command = [sys.executable, "-m", "bench.dry_run", "--child", role, *rest]
    done = subprocess.run(command, env=os.environ | more, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def error_of(said: float, was: float) -> float:
    """Return the relative error of a prediction."""
    return round(abs(said / was - 1.0), 3)


def compare(name: str, folder: Path, clock: str) -> Mapping[str, Any]:
    """Print what was said of a run beside what it cost; return the errors."""
    said, was = (child(role, name, str(folder), clock) for role in ("predicted", "measured"))
    exact = all(said[figure] == was[figure] for figure in ("up", "down", "virtual"))
    errors = {figure: error_of(said[figure], was[figure]) for figure in ("seconds", "memory")}
    print(f"{name} ({clock})")
    for figure in ("up", "down", "virtual", "seconds", "memory"):
        print(f"  {figure:8s} said {said[figure]:16,.2f}   was {was[figure]:16,.2f}")
    return {**errors, "exact": exact, "share": round(said["cost"] / was["cost"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.dry_run", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without the real language model")
    parser.add_argument("--child", nargs=4, metavar=("ROLE", "NAME", "FOLDER", "HOW"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settle()
    if options.child:
        role, name, place, how = options.child
        print(json.dumps(ROLES[role](name, Path(place), how)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny_generator(folder / "writer", **SIZES)
        found = {name: compare(name, folder, "process_time") for name in NAMES}
        if not options.quick:
            found["demo --write"] = compare("demo --write", folder, "process_time")
        depths = {"1": "1", "full": str(SIZES["num_hidden_layers"])}
        rises = {
            name: child("client_memory", "writer", place, depth, **HONEST_MALLOC) for name, depth in depths.items()
        }
    figures: dict[str, Any] = {
        "bytes_exact": all(one["exact"] for one in found.values()),
        "time_error": {name: one["seconds"] for name, one in found.items()},
        "memory_error": {name: one["memory"] for name, one in found.items()},
        "client_memory_error": {depth: error_of(one["said"], one["rise"]) for depth, one in rises.items()},
        "predict_share": {name: one["share"] for name, one in found.items()},
    }
    for name in ("time_error", "memory_error", "client_memory_error"):
        print(f"{name:20s} {under(max(figures[name].values()), BAR)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
