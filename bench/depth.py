"""Depth: seconds a step and peak memory of training the top 1, 2, ... 6 blocks of six, and what the cost model says of them.

    python -m bench.depth [--quick]

A BERT of MiniLM's shape (6 layers of 384) with random weights, real MRPC pairs (without that data: lengths drawn like theirs), LoRA
rank 8 on query and value, batches of 16, AdamW, the default engine. A task is one pass over a client's 32 pairs over a fold of the
lower layers, as the server sends it; all that a task takes is counted and divided by its two steps. Depths and both ways
(activations below the trained blocks computed in each task, or kept from an earlier one) take turns. One thread; processor seconds of
the process, median (minimum - maximum).

The cost model sees each measurement of depths 1, 3 and 6 once and must tell 2, 4 and 5. Memory is the resident set's rise over what
stood before the task, at its highest, in a fresh process for each depth, beside `Shape.train_memory` without the base. The last
line is one JSON object:

- `speedup.D`, `speedup_kept.D`: seconds of full depth / seconds of depth D, anew and with kept activations;
- `step_error`, `step_error_kept`: the largest relative error of the cost model at a depth that it has not seen (bar 0.2);
- `memory_mb.D`: rise of the resident set; `memory_ratio.D`: that over what `Shape.train_memory` says;
- `upload.D`: bytes of an answer, relative to full depth.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from bench.memory import HONEST_MALLOC, peak
from bench.timing import sample, spread, under
from bench.train import BATCH, RANK, SIX, model_folder, texts_of
from fedloom.core.lora import Adapter, Factor
from fedloom.core.partial_depth import fold_layers
from fedloom.core.seeds import simulated_secret
from fedloom.core.types import Budget, ClientState, Profile, Task, TaskStart
from fedloom.plan.client_cost import CostModel
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import Engine, LoRA, Training
from fedloom.train.trainer import PeftTrainer
from tests.support.tiny_models import settle

DEPTHS, SEEN, SHARD = range(1, 7), (1, 3, 6), 32
STEPS, BAR = SHARD // BATCH, 0.2
WAYS = {"anew": Engine(cache=1), "kept": Engine()}  # of one byte: for a task alone


def base_of(folder: Path) -> Base:
    """Without dropout."""
    return load_base(str(folder), 2, LoRA(dropout=0.0), RANK, 0, engine=Engine())


def random_adapter(base: Base) -> Adapter:
    """An adapter that has learnt something: `up` is not zero, so the layers below have a fold."""
    born = initial_adapter(base, RANK)
    return Adapter({n: Factor(f.down, 0.01 * f.down.new_ones(f.up.shape)) for n, f in born.factors.items()}, born.dense)


def task_of(base: Base, start: Adapter, depth: int) -> Task:
    """One pass of a client at this depth."""
    own = fold_layers(TaskStart(start, "0"), base.shape().untrained_modules(start.factors, depth))
    return Task(depth, "c", 0, own, Budget(RANK, STEPS, depth), 0.0)


def trainer_of(base: Base, engine: Engine) -> PeftTrainer:
    """One client."""
    return PeftTrainer(
        base,
        texts_of(base, SHARD),
        {"c": tuple(range(SHARD))},
        Training(batch_size=BATCH),
        partial(simulated_secret, 0),
        engine,
    )


def timed(base: Base, repeats: int) -> dict[str, dict[int, list[float]]]:
    """Processor seconds a step, by way and depth."""
    tasks = {depth: task_of(base, random_adapter(base), depth) for depth in DEPTHS}
    trainers = {way: trainer_of(base, engine) for way, engine in WAYS.items()}
    for task in tasks.values():
        trainers["kept"].train([(task, ClientState())])  # what is kept is computed here
    found: dict[str, dict[int, list[float]]] = {way: {depth: [] for depth in DEPTHS} for way in WAYS}
    for _ in range(repeats):
        for depth, task in tasks.items():
            for way, trainer in trainers.items():
                took = sample(lambda trainer=trainer, task=task: trainer.train([(task, ClientState())]))  # type: ignore[misc]
                found[way][depth].append(took.cpu / STEPS)
    return found


def predicted(base: Base, seen: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """What the cost model says of every depth after measurements of `SEEN`, and of a device that it knows nothing true of."""
    tokens = sum(trainer_of(base, Engine()).texts.lengths(range(BATCH)))
    model = CostModel.from_profile(Profile("c", SHARD, flops=1e9), base.shape(), RANK, tokens)
    for turn in range(len(seen[SEEN[0]])):
        for depth in SEEN:
            model = model.after_training(depth, STEPS, STEPS * seen[depth][turn])
    return {depth: model.step_seconds(depth) for depth in DEPTHS}


def print_times(base: Base, way: str, times: Mapping[int, Sequence[float]]) -> tuple[dict[str, float], float]:
    """Print a block of the table; speed-ups, and the largest error of the cost model at a depth not seen."""
    print(f"\nactivations below the trained blocks {way}")
    says, middle = predicted(base, times), {depth: median(own) for depth, own in times.items()}
    errors = {depth: abs(says[depth] / middle[depth] - 1.0) for depth in DEPTHS}
    for depth, own in times.items():
        about = "seen" if depth in SEEN else f"{errors[depth]:5.1%} off"
        print(
            f"  depth {depth}  CPU ms a step {spread([1e3 * x for x in own])}  model {1e3 * says[depth]:8.2f} ({about})"
        )
    return {str(d): round(middle[6] / middle[d], 2) for d in DEPTHS}, max(errors[d] for d in DEPTHS if d not in SEEN)


def remembered(folder: Path, depth: int) -> tuple[int, float]:
    """In a fresh process: bytes by which the resident set rises in a task, and what `Shape` says beside the base."""
    base = base_of(folder)
    trainer, task, shape = trainer_of(base, Engine(cache=1)), task_of(base, random_adapter(base), depth), base.shape()
    tokens = BATCH * max(trainer.texts.lengths(range(SHARD)))
    warm = task_of(base, random_adapter(base), 1)
    trainer.train([(warm, ClientState())])  # makes slots, transposed weights, the base without a fold
    before, highest = peak(lambda: trainer.train([(task, ClientState())]))
    frozen = 4.0 * (shape.parameters + shape.embeddings)
    return highest - before, shape.train_memory(RANK, tokens, depth) - frozen


def memory_of(folder: Path, depth: int) -> tuple[int, float]:
    """The same from here."""
    command = [sys.executable, "-m", "bench.depth", "--memory", str(depth), str(folder)]
    environment = os.environ | HONEST_MALLOC
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rise, says = json.loads(done.stdout.splitlines()[-1])
    return rise, says


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.depth")
    parser.add_argument("--quick", action="store_true", help="two repetitions and memory of three depths")
    parser.add_argument("--memory", nargs=2, metavar=("DEPTH", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    settle()
    if options.memory:
        print(json.dumps(remembered(Path(options.memory[1]), int(options.memory[0]))))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = model_folder(**SIX).rename(Path(place) / "model")
        base = base_of(folder)
        times = timed(base, 2 if options.quick else 4)
        figures: dict[str, object] = {}
        for way, end in (("anew", ""), ("kept", "_kept")):
            figures[f"speedup{end}"], error = print_times(base, way, times[way])
            figures[f"step_error{end}"] = round(error, 3)
        print("\nmemory of a task beside the base")
        found = {depth: memory_of(folder, depth) for depth in (SEEN if options.quick else DEPTHS)}
        for depth, (rise, says) in found.items():
            print(f"  depth {depth}  {rise / 1e6:6.1f} MB, Shape says {says / 1e6:6.1f}")
        figures["memory_mb"] = {str(depth): round(rise / 1e6, 1) for depth, (rise, _) in found.items()}
        figures["memory_ratio"] = {str(depth): round(rise / says, 2) for depth, (rise, says) in found.items()}
        shape = base.shape()
        figures["upload"] = {str(d): round(shape.payload(RANK, d) / shape.payload(RANK), 3) for d in DEPTHS}
        for name in ("step_error", "step_error_kept"):
            print(f"  {name:16s} {figures[name]}  {under(float(str(figures[name])), BAR)}")
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
