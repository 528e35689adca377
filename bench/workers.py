"""Eight clients on a model of BERT-mini's shape, as a cohort and one by one: two worker processes against this one alone.

    python -m bench.workers [--quick]

Every client trains rank 8 on batches of 16 texts of 24 to 64 tokens; one torch thread a process. Both ways take turns (A B A
B) and must give the same adapters and losses. Wall seconds tell only where two cores are free. On a shared machine the CPU
seconds do: those of all processes together say what dividing costs; those of the busiest worker and of this process together
("in a row") are the least that the clock can show. Starting is paid once a run and measured apart. Memory is the
proportional share (PSS) of the shared base over all three processes. The last line is one JSON object:

- `workers2.speedup`: wall seconds of one process / of two workers, median of the pairs (bar on two free cores: 1.7);
- `workers2.speedup_cpu`: CPU seconds of one process / (those of the busiest worker + those of this process, which waits);
- `workers2.cpu_ratio`: CPU seconds of one process / of all processes with two workers;
- `workers2.startup_wall`, `.startup_cpu`: seconds until two workers had trained one step each;
- `workers2.base_copies`: the shared base in memory, in copies, over all processes (a copy each would be 3);
- `workers2.same_bytes`: whether every result was the same to the bit;
- `ahead2.speedup`, `.speedup_cpu`, `.same_bytes`: the same of an asynchronous run, in which every event starts one task: FedFa with
  20 clients of three kinds of devices at work at once, from the third dispatch on in workers that are already there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.fingerprint import fingerprint
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Trainer
from fedloom.core.seeds import simulated_secret
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.runs.trace import Trace
from fedloom.schedule.fedfa import FedFa
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.settings import LoRA, Training
from fedloom.train.tokenised import EncodedTexts
from fedloom.train.trainer import PeftTrainer
from fedloom.train.workers.pool import open_pool
from fedloom.train.workers.worker import Workers
from tests.support.tiny_models import settle, tiny_encoder

CLIENTS, RANK, EXAMPLES, IN_FLIGHT = 8, 8, 64, 20
BERT_MINI = {
    "vocab_size": 30522,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "initializer_range": 0.02,
}
BAR = 1.7

Work = Sequence[tuple[Task, ClientState]]


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of one cohort: on the clock, of the processors in all processes, and in the longest row of work that nobody can divide."""

    wall: float
    cpu: float
    row: float


def texts(count: int) -> EncodedTexts:
    """Token ids drawn at random, 24 to 64 a text, two labels."""
    draw = random.Random(0)
    ids = tuple(tuple(draw.choices(range(4, 30522), k=draw.randint(24, 64))) for _ in range(count))
    return EncodedTexts(ids, {}, tuple(draw.randrange(2) for _ in ids), 0, pad_left=False)


def scene(folder: Path, steps: int, clients: int = CLIENTS) -> tuple[PeftTrainer, Work]:
    """The trainer and a cohort of one task for each client."""
    base: Base = load_base(str(tiny_encoder(folder, **BERT_MINI)), 2, LoRA(), RANK, seed=0)
    shards = {f"c{k}": tuple(range(k * EXAMPLES, (k + 1) * EXAMPLES)) for k in range(clients)}
    start = TaskStart(initial_adapter(base, RANK), "0")
    tasks = [Task(k, f"c{k}", 0, start, Budget(RANK, steps), 0.0) for k in range(clients)]
    return PeftTrainer(base, texts(clients * EXAMPLES), shards, Training(), partial(simulated_secret, 0)), [
        (task, ClientState()) for task in tasks
    ]


def shortened(work: Work, count: int) -> Work:
    """The first tasks, one step each."""
    return [(replace(task, budget=Budget(RANK, 1)), local) for task, local in work[:count]]


def measured(trainer: Trainer, work: Work) -> tuple[Seconds, list[object]]:
    """One cohort, and what came out."""
    answers = list[tuple[Result, ClientState]]()
    seconds = clocked(lambda: answers.extend(trainer.train(work)))
    return seconds, [(fingerprint(result.adapter), result.metrics) for result, _ in answers]


def clocked(action: Callable[[], object]) -> Seconds:
    """What it took."""
    before, wall = cpu_seconds(), time.perf_counter()
    action()
    wall = time.perf_counter() - wall
    spent = {pid: seconds - before.get(pid, 0.0) for pid, seconds in cpu_seconds().items()}
    own = spent.pop(os.getpid())
    return Seconds(wall, own + sum(spent.values()), own + max(spent.values(), default=0.0))


def cpu_seconds() -> dict[int, float]:
    """Of this process and of its children that live."""
    me = psutil.Process()
    return {p.pid: t.user + t.system for p, t in ((p, p.cpu_times()) for p in (me, *me.children()))}


def base_copies(bytes_of_base: int) -> float:
    """The shared file in the memory of all processes, each page by its share, in sizes of the base."""
    me = psutil.Process()
    maps = [m for p in (me, *me.children()) for m in p.memory_maps(grouped=False) if "/#" in m.path]
    return int(sum(m.pss for m in maps)) / bytes_of_base


def workers2(repeats: int, steps: int) -> dict[str, float]:
    """Measure, print the table, give the figures."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, work = scene(Path(folder), steps)
    size = sum(p.numel() * p.element_size() for p in trainer.base.model.parameters())
    with open_pool(trainer, Workers.parse(2)) as two:
        startup, _ = measured(two, shortened(work, 2))
        two.train(shortened(work, 4))
        trainer.train(shortened(work, 2))
        pairs = [(measured(trainer, work), measured(two, work)) for _ in range(repeats)]
        copies = base_copies(size)
    alone, together = ([pair[k][0] for pair in pairs] for k in (0, 1))
    ratios = [a.wall / b.wall for a, b in zip(alone, together, strict=True)]
    figures: dict[str, float] = {
        "speedup": median(ratios),
        "speedup_cpu": median(a.cpu / b.row for a, b in zip(alone, together, strict=True)),
        "cpu_ratio": median(a.cpu / b.cpu for a, b in zip(alone, together, strict=True)),
        "startup_wall": startup.wall,
        "startup_cpu": startup.cpu,
        "base_copies": copies,
        "same_bytes": all(found == pairs[0][0][1] for pair in pairs for _, found in pair),
    }
    print(f"cohort of {CLIENTS} clients, {steps} steps each, base of {size / 1e6:.0f} MB, {repeats} pairs")
    for name, found in (("1 process", alone), ("2 workers", together)):
        wall, cpu, row = ([getattr(one, field) for one in found] for field in ("wall", "cpu", "row"))
        print(f"  {name}  wall {spread(wall)}   CPU {spread(cpu)}   in a row {spread(row)}")
    print(
        f"  speedup    {spread(ratios)}  (bar {BAR} on two free cores: {'met' if median(ratios) >= BAR else 'MISSED'})"
    )
    print("  " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return figures


def ahead2(repeats: int, steps: int, versions: int) -> dict[str, float]:
    """An asynchronous run, whose tasks are begun before their answers are needed."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, work = scene(Path(folder), 1, IN_FLIGHT + 4)
    shape = trainer.base.shape()
    with open_pool(trainer, Workers.parse(2)) as two:
        two.train(work[:4])
        trainer.train(work[:2])
        pairs = [
            [simulated(one, work[0][0].start.train, shape, steps, versions) for one in (trainer, two)]
            for _ in range(repeats)
        ]
    ratios = [a.wall / b.wall for (a, _), (b, _) in pairs]
    figures: dict[str, float] = {
        "speedup": median(ratios),
        "speedup_cpu": median(a.cpu / b.row for (a, _), (b, _) in pairs),
        "same_bytes": all(trace == pairs[0][0][1] for pair in pairs for _, trace in pair),
    }
    print(f"FedFa, {IN_FLIGHT} at work at once, {versions} versions, {steps} steps a task, {repeats} pairs")
    print(
        f"  speedup    {spread(ratios)}  (bar {BAR} on two free cores: {'met' if median(ratios) >= BAR else 'MISSED'})"
    )
    print("  " + "  ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    return figures


def simulated(trainer: Trainer, start: Adapter, shape: Shape, steps: int, versions: int) -> tuple[Seconds, str]:
    """One run, unscored but for its end, and its trace."""
    how, told, world = ProductDelta(), io.StringIO(), World()
    limits, schedule = Limits(versions=versions, evaluate_every=0), FedFa(window=10, max_in_flight=IN_FLIGHT)
    plan = Plan(FixedRank(RANK), steps)
    server = Server(how.init(start), how, schedule, plan, shape=shape, limits=limits)
    clients = {p.client: p for p in world.profiles({f"c{k}": EXAMPLES for k in range(IN_FLIGHT + 4)}, 0)}
    simulation = Simulation(server, trainer, world, clients, lambda model: {}, Trace(told))
    spent = clocked(simulation.run)
    return spent, told.getvalue()


def spread(values: Sequence[float]) -> str:
    """Median (minimum - maximum)."""
    return f"{median(values):6.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.workers")
    parser.add_argument("--quick", action="store_true", help="three pairs of short cohorts, in about two minutes")
    quick = parser.parse_args().quick
    settle()
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} thread, load before: {os.getloadavg()[0]:.1f}", flush=True
    )
    figures = workers2(*(3, 4) if quick else (7, 10))
    ahead = ahead2(*(3, 2, 40) if quick else (7, 4, 60))
    print(json.dumps({"workers2": figures, "ahead2": ahead}))
    sys.exit(not (figures["same_bytes"] and ahead["same_bytes"]))


if __name__ == "__main__":
    main()
