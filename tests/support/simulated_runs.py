"""A simulation of toy clients, and a log of what happened in it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedloom.core.events import (
    Command,
    Event,
)
from fedloom.core.limits import Limits
from fedloom.core.lora import compact_with_fold
from fedloom.core.policies import Aggregator, Schedule, Trainer
from fedloom.core.server import Server
from fedloom.core.types import ClientState, Model, Result, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.runs.trace import Trace
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.toys import Quadratic, profiles

QUADRATIC = Quadratic()
JITTER = 0.3


@dataclass
class Log:
    """What happened, and its trace."""

    steps: list[tuple[float, Event, list[Command]]] = field(default_factory=list)
    file: io.StringIO = field(default_factory=io.StringIO)
    losses: list[float] = field(default_factory=list)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """An observer."""
        self.steps.append((now, event, commands))
        Trace(self.file)(now, event, commands)

    def all(self, kind: type) -> list[Any]:
        return [command for _, _, commands in self.steps for command in commands if isinstance(command, kind)]

    def traced(self) -> list[str]:
        """The trace, line by line."""
        return self.file.getvalue().splitlines()

    def score(self, model: Model) -> Mapping[str, float]:
        """An evaluator."""
        self.losses.append(QUADRATIC.loss(compact_with_fold(model.adapter, model.fold)))
        return {"loss": self.losses[-1]}


class Remembering(toys.Quadratic):
    """Counts each client's tasks in one basis in its moments and tells the count; one answer in nine is refused."""

    def _one(self, task: Task, local: ClientState) -> tuple[Result, ClientState]:
        result, after = super()._one(task, local)
        kept = local.moments if local.basis == task.start.basis else None
        count = kept["w"]["step"] + 1 if kept else torch.tensor(1.0)
        metrics = {**result.metrics, "count": float(count)}
        result = replace(result, metrics=metrics, examples=0 if task.id % 9 == 0 else task.id)
        return result, replace(after, moments={"w": {"step": count}}, residual=local.residual)


def simulation(server: Server, log: Log, trainer: Trainer = QUADRATIC, clients: int = 6, **more: Any) -> Simulation:
    given = {"profiles": profiles(clients), "devices": World(jitter=JITTER)} | more
    return Simulation(server, trainer, evaluate=log.score, observe=log, **given)


def run(method: Aggregator | None = None, schedule: Schedule | None = None, versions: int = 8, **more: Any) -> Log:
    log, seed = Log(), more.get("seed", 0)
    assign = more.pop("assign", Plan(RandomRank(2, 4), 12))
    limits = more.pop("limits", Limits(versions=versions))
    start = toys.fresh(4)
    server = toys.server(schedule, method, start=start, assign=assign, limits=limits, seed=seed)
    simulation(server, log, **more).run()
    return log
