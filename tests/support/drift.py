"""Drift, the measure of law 11: where the server's model goes if every client always moves its model by 1.

The model is one number, beside a layer that nobody trains. Clients are alike and take the same time for every task,
so that each task's answer is made into a version `places` answers after the one that it was cut from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor
from fedloom.core.policies import Schedule
from fedloom.core.types import ClientState, Model, Profile, Result, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys


def point(*at: float) -> Adapter:
    """A model that is these numbers, and an idle layer."""
    one = torch.ones(1, 1)
    return Adapter({"only": Factor(one, one)}, {"x": torch.tensor(at)})


@dataclass(frozen=True)
class Steady:
    """A trainer: one further."""

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """What was sent, plus 1."""
        moved = [replace(task.start.train, dense={"x": task.start.train.dense["x"] + 1.0}) for task, _ in work]
        return [(toys.make_result(one), local) for one, (_, local) in zip(moved, work, strict=True)]


def path(
    schedule: Schedule,
    versions: int,
    profiles: dict[str, Profile],
    jitter: float = 0.0,
    every: int = 1,
) -> list[float]:
    """Where the model is at version 0, `every`, 2 `every`, ..."""
    found: list[float] = []

    def look(model: Model) -> dict[str, float]:
        found.append(float(model.adapter.dense["x"]))
        return {}

    limits = Limits(versions=versions, evaluate_every=every)
    server = toys.server(schedule, FedIT(), start=point(0.0), limits=limits, assign=Plan(FixedRank(1), 1))
    Simulation(server, Steady(), World(jitter=jitter), profiles, look, lambda *_: None).run()
    return found


def alike(count: int) -> dict[str, Profile]:
    """Clients that nothing tells apart."""
    return {f"c{k:03}": Profile(f"c{k:03}", 10) for k in range(count)}


def slope(values: Sequence[float]) -> float:
    """Of the line of least squares through equally distant values."""
    ys = torch.tensor(values, dtype=torch.float64)
    xs = torch.arange(len(ys), dtype=torch.float64)
    xs = xs - xs.mean()
    return float(xs @ ys / xs.square().sum())


def pace(schedule: Schedule, profiles: dict[str, Profile], jitter: float, far: float) -> int:
    """How many versions this fleet needs to move the model as far as `far` rounds of FedAvg would."""
    places = path(schedule, 40 + int(30 * far), profiles, jitter)
    return next(version for version, place in enumerate(places) if place >= far - 1e-4)
