"""A toy federation with a canary: clients that want the same product, and some whose changes are turned round and scaled up.

The driver answers one task after the other, in an order that follows from a seed, and scores at once.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from fedloom.core.canary import Canary
from fedloom.core.events import (
    CanaryScored,
    CheckCanary,
    ClientJoined,
    Command,
    Dispatch,
    Event,
    SetAside,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, compact_with_fold
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.types import ClientState, Model, Result, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.runs.trace import ENCODER
from tests.support import toys

TOY = toys.Quadratic(private=0.05)
ALWAYS = Canary(examples=1, margin=1e9)
"""A canary that never fails."""
STRICT = Canary(examples=1, margin=0.05)


def scored(model: Model) -> tuple[float, ...]:
    """Minus the distance from the common target, as the score of one example."""
    return (-TOY.loss(compact_with_fold(model.adapter, model.fold)),)


def turned(task: Task, result: Result, times: float = 5.0) -> Result:
    """The answer with its change turned round and scaled."""
    factors = {}
    for name, factor in result.adapter.factors.items():
        sent = task.start.train.factors[name]
        sides = {
            side: getattr(sent, side) - times * (getattr(factor, side) - getattr(sent, side)) for side in ("down", "up")
        }
        factors[name] = Factor(**sides)
    return replace(result, adapter=Adapter(factors, result.adapter.dense))


@dataclass
class Play:
    """A run of the toy federation, and what came of it.

    Fields:
        schedule, method, canary: of the server.
        poisoned: clients whose changes are turned round.
        absent: clients whose tasks fail instead.
        versions: when it ends.
        clients: how many there are.
        seed: of the order of answers.
        times: by how much a poisoned change is scaled.
    """

    schedule: Schedule
    method: Aggregator
    canary: Canary | None = None
    poisoned: Collection[str] = ()
    absent: Collection[str] = ()
    versions: int = 4
    clients: int = 6
    seed: int = 0
    times: float = 5.0
    commands: list[Command] = field(default_factory=list)
    checks: list[CheckCanary] = field(default_factory=list)
    local: dict[str, ClientState] = field(default_factory=dict)
    now: float = 0.0

    def __post_init__(self) -> None:
        limits = Limits(versions=self.versions, failures=40, norm_ratio=None)  # what the canary does by itself
        given: dict[str, Any] = {"assign": Plan(FixedRank(2), 6), "limits": limits, "canary": self.canary}
        self.server = toys.server(self.schedule, self.method, start=toys.fresh(2), **given)

    def tell(self, event: Event) -> None:
        """Handle an event and what follows from it at once."""
        commands = self.server.handle(self.now, event)
        self.checks += [command for command in commands if isinstance(command, CheckCanary)]
        self.commands += [command for command in commands if not isinstance(command, CheckCanary)]
        for command in commands:
            if isinstance(command, CheckCanary):
                self.tell(CanaryScored(command.check, scored(command.model)))

    def run(self) -> Play:
        """Answer until the server stops."""
        draw = random.Random(self.seed)
        for profile in toys.profiles(self.clients).values():
            self.tell(ClientJoined(profile))
        self.tell(TimerFired())
        while not self.server.state.stopped:
            self.now += 1.0
            busy = self.server.state.busy
            if not busy:
                self.tell(TimerFired())
                continue
            self.answer(busy[draw.choice(sorted(busy))])
        return self

    def answer(self, task: Task) -> None:
        """The client's answer to a task, or its failure."""
        if task.client in self.absent:
            return self.tell(TaskFailed(task.client, task.id, "absent"))
        before = self.local.get(task.client) or ClientState()
        ((result, self.local[task.client]),) = TOY.train([(task, before)])
        if task.client in self.poisoned:
            result, self.local[task.client] = turned(task, result, self.times), before
        return self.tell(UpdateArrived(task.client, task.id, result))

    @property
    def model(self) -> str:
        """The model as the trace has it."""
        return ENCODER.encode(self.server.state.model)

    @property
    def told(self) -> list[str]:
        """All commands but those of the canary."""
        return [ENCODER.encode(command) for command in self.commands if not isinstance(command, SetAside)]

    @property
    def set_aside(self) -> list[SetAside]:
        """The answers that were set aside."""
        return [command for command in self.commands if isinstance(command, SetAside)]

    @property
    def reason(self) -> str:
        """Why it stopped."""
        (stop,) = (command for command in self.commands if isinstance(command, Stop))
        return stop.reason

    @property
    def loss(self) -> float:
        """The loss of the last version."""
        return -scored(self.server.state.model)[0]

    def tasks_of(self, client: str) -> int:
        """How many tasks this client was sent."""
        return sum(isinstance(command, Dispatch) and command.task.client == client for command in self.commands)
