"""Events per CPU second through the real server and the real virtual-clock driver, and what an idle client costs.

    python -m bench.simulate [--quick]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch

from fedloom.aggregate.combine import leading
from fedloom.aggregate.fedit import FedIT
from fedloom.cost import Shape
from fedloom.lora import Adapter, Factor, each
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.draw import draw
from fedloom.schedule.weights import normalised, uniform
from fedloom.server import Limits, Server
from fedloom.simulate import Simulation
from fedloom.trace import Trace
from fedloom.types import (
    Aggregator,
    Budget,
    ClientId,
    Command,
    Event,
    Fleet,
    Local,
    Merge,
    Model,
    Profile,
    Result,
    Start,
    Task,
    UpdateArrived,
)
from fedloom.world import World


@dataclass(frozen=True, slots=True)
class Window:
    """The mean of the last `size` uploads at every arrival; `places` clients are always at work."""

    size: int = 10
    places: int = 100

    def merge(self, fleet: Fleet) -> Merge | None:
        """Whatever came since the last version, with what was kept: after v versions that is min(v, size - 1)."""
        if len(fleet.arrived) <= min(fleet.version, self.size - 1):
            return None
        return Merge(normalised(fleet.arrived, uniform), retain=tuple(fleet.arrived[1 - self.size :]))

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """An idle client for each free place."""
        free = min(self.places - len(fleet.busy), len(fleet.idle))
        return draw(fleet, free)

    def wake(self, fleet: Fleet) -> float | None:
        return None


@dataclass(frozen=True, slots=True)
class Nothing:
    """An aggregator without arithmetic."""

    space: ClassVar[Literal["factor"]] = "factor"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})

    def init(self, start: Adapter) -> Model:
        return Model(start)

    def merge(self, model: Model, merge: Merge) -> Model:
        return replace(model, adapter=merge.parts[-1][1].result.adapter)

    def start(self, model: Model, budget: Budget, seed: int) -> Start:
        return leading(model, budget)


@dataclass(frozen=True, slots=True)
class Nudge:
    """A trainer that adds a constant."""

    def train(self, work: Sequence[tuple[Task, Local]]) -> list[tuple[Result, Local]]:
        return [
            (Result(task.start.train, 10, 100, 1), local)
            for task, local in work
        ]


@dataclass(slots=True)
class Meter:
    """An observer around the trace: CPU seconds from one arrival to another."""

    trace: Trace
    first: int
    last: int
    arrivals: int = 0
    marks: list[float] = field(default_factory=list)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        self.trace(now, event, commands)
        if isinstance(event, UpdateArrived):
            self.arrivals += 1
            if self.arrivals >= self.first and self.arrivals % 100 == 0:
                self.marks.append(time.process_time())


def run(clients: int, d: int, rank: int, how: Aggregator, events: int, folder: Path) -> float:
    shape = Shape(parameters=1000, embeddings=0, layers=1, hidden=d, modules=((d, d),), dense=0)
    g = torch.Generator().manual_seed(0)
    start = Adapter({"x": Factor(torch.randn(rank, d, generator=g), torch.randn(d, rank, generator=g))})
    world = World()
    profiles = {p.client: p for p in world.profiles({f"c{k:07d}": 10 for k in range(clients)}, 0)}
    warm = 200
    limits = Limits(versions=warm + events, evaluate_every=10**9)
    server = Server(how.init(start), how, Window(), Plan(FixedRank(rank), 1), shape=shape, limits=limits)
    with (folder / "trace.jsonl").open("w", encoding="utf-8") as file:
        meter = Meter(Trace(file), warm, warm + events)
        Simulation(server, Nudge(), world, profiles, lambda model: {}, meter).run()
    blocks = sorted(b - a for a, b in zip(meter.marks, meter.marks[1:]))
    return [round(1e6*b/100) for b in (blocks[0], blocks[len(blocks)//4], blocks[len(blocks)//2], blocks[-1])]


if __name__ == "__main__":
    import sys, cProfile, pstats
    torch.set_num_threads(1)
    n, prof = int(sys.argv[1]), len(sys.argv) > 2
    with tempfile.TemporaryDirectory() as f:
        for d, r, how in ((1, 1, Nothing()), (64, 8, FedIT())):
            if prof:
                p = cProfile.Profile(); p.enable()
            print(d, r, how, run(1000, d, r, how, n, Path(f)), flush=True)
            if prof:
                p.disable(); pstats.Stats(p).sort_stats("tottime").print_stats(45)
