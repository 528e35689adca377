"""A liar among six sites: its weight, its norm, and what it makes of the first answers of a run. In one process, in seconds.

Six sites train a linear classifier with LoRA and AdamW on their own examples; one of them lies. A `Guard` says which limits hold:
`Guard.deployed()` are those of a deployment, `Guard.lifted()` is what was before there were any, by which each attack succeeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fedloom import FedAsync
from fedloom.aggregate.fedit import FedIT
from fedloom.core import server
from fedloom.core.canary import Canary
from fedloom.core.events import (
    CanaryScored,
    CheckCanary,
    ClientJoined,
    Command,
    Dispatch,
    Event,
    Publish,
    Reject,
    SetAside,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, map_tensors
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.server import Server
from fedloom.core.types import Profile, Result, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.rounds import Rounds
from tests.attacks.attack import Attack

SITES, LIAR, EXAMPLES, STEPS, RATE, VERSIONS = 6, "c3", 120, 8, 0.02, 12
WIDTH, CLASSES, RANK = 24, 4, 4
LARGEST = 10**12
"""The largest number of examples that a message may tell of."""

Change: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(trained, sent) -> what a liar answers."""


@dataclass(frozen=True)
class Liar:
    """What one of six sites does.

    Fields:
        registers: examples with which it joins.
        tells: examples of its answers.
        change: what it makes of each tensor of an honest answer.
        first: it answers before all others.
    """

    registers: int = EXAMPLES
    tells: int = EXAMPLES
    change: Change = lambda trained, sent: trained
    first: bool = True


@dataclass(frozen=True)
class Guard:
    """The limits of a server.

    Fields:
        claimed: what a site registers is its own word, as in a deployment.
        norm_ratio, step_ratio: of `Limits`.
        canary: the canary (None: none).
    """

    claimed: bool = True
    norm_ratio: float | None = 5.0
    step_ratio: float | None = 3.0
    canary: Canary | None = None

    @classmethod
    def deployed(cls) -> Guard:
        """The limits of a deployment as its guide has it."""
        return cls(canary=Canary(examples=300, margin=0.02))

    @classmethod
    def lifted(cls) -> Guard:
        """No limit but that on the norm of one tensor."""
        return cls(claimed=False, norm_ratio=None, step_ratio=None)


@dataclass
class Outcome:
    """How a run went.

    Fields:
        accuracy: of the last version, on examples of nobody.
        refused: by site, its answers that were refused.
        set_aside: by site, its answers that were accepted and taken out.
        weights: by site, its share of the examples of the last version's answers.
        versions: how many were made.
    """

    accuracy: float = math.nan
    refused: dict[str, int] = field(default_factory=dict)
    set_aside: dict[str, int] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    versions: int = 0


def turned(times: float) -> Change:
    """The change turned round, so many times as large."""
    return lambda trained, sent: sent - times * (trained - sent)


def of_norm(norm: float) -> Change:
    """An answer of this norm in each tensor, in the direction of what was trained."""
    return lambda trained, sent: trained / trained.norm().clamp_min(1e-9) * norm


def largest_allowed(guard: Guard) -> Change:
    """The change turned round, as large as the optimiser's bound allows if every number moves as far as it can."""
    far = 0.99 * (guard.step_ratio or 3.0) * RATE * STEPS
    return lambda trained, sent: sent - far * (trained - sent) / (trained - sent).square().mean().sqrt().clamp_min(1e-9)


def accuracy_lost(liar: Liar, guard: Guard, schedule: Schedule | None = None, seed: int = 0) -> float:
    """Return the points of accuracy (0 to 1) that a liar costs, against the same run without lies and with the same limits."""
    honest, lied = (federation(one, guard, schedule, seed=seed) for one in (Liar(), liar))
    return honest.accuracy - lied.accuracy


def weight_of_a_liar(guard: Guard | None = None, seeds: Sequence[int] = range(5)) -> list[float]:
    """Return the accuracy (0 to 1) that one of six costs, by seed: of the liar that costs most in the mean.

    It lies about its examples at registration and in its answers, and turns its change round.
    """
    held = guard or Guard.deployed()
    lost = [[accuracy_lost(one, held, seed=seed) for seed in seeds] for one in strongest_liars(held)]
    return max(lost, key=sum)


def strongest_liars(guard: Guard) -> list[Liar]:
    """Return liars whose change is turned round: as large as the limits allow, to undo what others bring, too small to be seen."""
    changes = [largest_allowed(guard), turned(3.0), turned(5 / 3), turned(1.0), turned(0.3), turned(0.1)]
    return [Liar(LARGEST, LARGEST, change) for change in changes]


def federation(
    liar: Liar,
    guard: Guard,
    schedule: Schedule | None = None,
    method: Aggregator | None = None,
    versions: int = VERSIONS,
    seed: int = 0,
    alpha: float | None = None,
) -> Outcome:
    """Carry out a run of six sites and return how it went; `seed` draws their rows, and what is to be learnt.

    With `alpha` the classes of each site have shares of a Dirichlet distribution.
    """
    first = 1000 * seed
    teacher = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(first + 1))
    rows = {f"c{k}": examples(teacher, first + 10 + k, EXAMPLES, alpha) for k in range(SITES)}
    test, canaries = examples(teacher, first + 99, 1000), examples(teacher, first + 98, 300)
    leader = new_server(guard, schedule or Rounds(cohort_size=SITES), method or FedIT(), versions)
    outcome = Outcome()
    events: list[tuple[float, Event]] = [
        (0.0, ClientJoined(Profile(site, liar.registers if site == LIAR else EXAMPLES, claimed=guard.claimed)))
        for site in sorted(rows)
    ]
    events.append((0.0, TimerFired()))
    now = 0.0
    while events:
        _, event = events.pop(0)
        now += 1.0
        for command in leader.handle(now, event):
            events += _consequences(command, leader, outcome, rows, liar, canaries)
        events.sort(key=lambda one: one[0])
    outcome.accuracy = score(leader.state.model.adapter, test)
    outcome.versions = leader.state.version
    return outcome


def _consequences(
    command: Command,
    server: Server,
    outcome: Outcome,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    liar: Liar,
    canaries: tuple[Tensor, Tensor],
) -> list[tuple[float, Event]]:
    """Return what follows from a command, with its place in the order of events."""
    match command:
        case Dispatch(task):
            place = task.id + (0.0 if task.client != LIAR else -SITES if liar.first else SITES)
            return [(place, UpdateArrived(task.client, task.id, answered(task, rows[task.client], liar)))]
        case CheckCanary(number, _, model):
            return [(-math.inf, CanaryScored(number, probabilities(model.adapter, canaries)))]
        case Reject(client, number, reason) if number:
            outcome.refused[client] = outcome.refused.get(client, 0) + 1
            return [(-math.inf, TaskFailed(client, number, reason))]
        case SetAside(client):
            outcome.set_aside[client] = outcome.set_aside.get(client, 0) + 1
        case Publish(_, _, updates):
            total = sum(update.result.examples for update in updates)
            outcome.weights = {update.task.client: update.result.examples / total for update in updates}
        case Stop():
            pass
    return []


def new_server(guard: Guard, schedule: Schedule, method: Aggregator, versions: int) -> Server:
    """Return a server of these limits, with an adapter as LoRA begins."""
    draw = torch.Generator().manual_seed(0)
    down = torch.randn(RANK, WIDTH, generator=draw) / math.sqrt(WIDTH)
    start = Adapter({"out": Factor(down, torch.zeros(CLASSES, RANK))}, {"bias": torch.zeros(CLASSES)})
    limits = Limits(versions, evaluate_every=0, norm_ratio=guard.norm_ratio, step_ratio=guard.step_ratio)
    shape = Shape(WIDTH * CLASSES, CLASSES, 1, WIDTH, ((CLASSES, WIDTH),), CLASSES)
    plan = Plan(FixedRank(RANK), STEPS)
    return Server(
        method.init(start), method, schedule, plan, shape=shape, limits=limits, canary=guard.canary, largest_step=RATE
    )


def examples(teacher: Tensor, seed: int, count: int, alpha: float | None = None) -> tuple[Tensor, Tensor]:
    """Return so many rows and their classes, a tenth of these by chance; with `alpha` the classes have shares of a Dirichlet's."""
    draw, drawn = torch.Generator().manual_seed(seed), count if alpha is None else 20 * count
    features = torch.randn(drawn, WIDTH, generator=draw)
    classes = (features @ teacher.T).argmax(1)
    chance = torch.rand(drawn, generator=draw) < 0.1
    classes = torch.where(chance, torch.randint(0, CLASSES, (drawn,), generator=draw), classes)
    if alpha is None:
        return features, classes
    shares = np.random.default_rng(seed).dirichlet([alpha] * CLASSES)
    chances = torch.tensor(shares)[classes] / classes.bincount(minlength=CLASSES)[classes]
    chosen = torch.multinomial(chances, count, generator=draw)
    return features[chosen], classes[chosen]


def answered(task: Task, rows: tuple[Tensor, Tensor], liar: Liar) -> Result:
    """Return what a site answers: an honest answer, and what the liar makes of it."""
    honest, loss = trained(task, rows)
    result = Result(honest, EXAMPLES, EXAMPLES, task.budget.steps, {"loss": loss})
    if task.client != LIAR:
        return result
    return replace(result, examples=liar.tells, adapter=map_tensors(liar.change, honest, task.start.train))


def trained(task: Task, rows: tuple[Tensor, Tensor]) -> tuple[Adapter, float]:
    """Return the adapter after AdamW's steps on these rows, all of them in each step, and the mean loss."""
    start = task.start.train
    weights = {
        "down": start.factors["out"].down.clone().requires_grad_(),
        "up": start.factors["out"].up.clone().requires_grad_(),
        "bias": start.dense["bias"].clone().requires_grad_(),
    }
    optimiser, losses = torch.optim.AdamW(weights.values(), lr=RATE, weight_decay=0.0), list[float]()
    for _ in range(task.budget.steps):
        logits = rows[0] @ weights["down"].T @ weights["up"].T + weights["bias"]
        loss = torch.nn.functional.cross_entropy(logits, rows[1])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(loss.item())
    done = {name: tensor.detach() for name, tensor in weights.items()}
    return Adapter({"out": Factor(done["down"], done["up"])}, {"bias": done["bias"]}), sum(losses) / len(losses)


def score(adapter: Adapter, rows: tuple[Tensor, Tensor]) -> float:
    """Return the share of rows whose class the model names."""
    return float((_logits(adapter, rows[0]).argmax(1) == rows[1]).double().mean())


def probabilities(adapter: Adapter, rows: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Return how probable the model finds the class of each row."""
    likely: list[float] = _logits(adapter, rows[0]).softmax(1).gather(1, rows[1][:, None])[:, 0].double().tolist()
    return tuple(likely)


def _logits(adapter: Adapter, features: Tensor) -> Tensor:
    factor = adapter.factors["out"]
    return features @ factor.down.T @ factor.up.T + adapter.dense["bias"]


# The list ------------------------------------------------------------------------------------------------------------

TOO_MUCH = 0.05
"""Accuracy (0 to 1) that a liar may cost."""


def _guard(lifted: bool) -> Guard:
    return Guard.lifted() if lifted else Guard()


def _costs(liar: Liar, schedule: Schedule | None = None, versions: int = VERSIONS) -> Callable[[Path, bool], bool]:
    """An attack by a liar: it succeeds if it costs accuracy. It fails because its answers are refused, and the run goes on."""

    def run(folder: Path, lifted: bool) -> bool:
        honest, lied = (federation(one, _guard(lifted), schedule, versions=versions) for one in (Liar(), liar))
        assert lifted or (lied.refused.keys() == {LIAR} and lied.versions == versions)
        return honest.accuracy - lied.accuracy > TOO_MUCH

    return run


def _outweighs(folder: Path, lifted: bool) -> bool:
    """A site that registers and tells as many examples as a message can: at most three times the median counts."""
    return federation(Liar(LARGEST, LARGEST), _guard(lifted), versions=3).weights[LIAR] > 3 / 8 + 1e-9


def _tells(folder: Path, lifted: bool) -> bool:
    """A site that registers what it has, and tells more in its answers. Lifted: what an answer tells is what counts."""

    def told(registered: Mapping[str, int], profile: Profile) -> int:
        return LARGEST if profile.client == LIAR else EXAMPLES

    with patch.object(server, "counted_examples", told if lifted else server.counted_examples):  # type: ignore[attr-defined]
        return federation(Liar(tells=LARGEST), Guard(), versions=3).weights[LIAR] > 1 / 6 + 1e-9


def _undoes(folder: Path, lifted: bool) -> bool:
    """A change that just undoes what others bring: no limit on norms sees it. Lifted: there is no canary."""
    liar, guard = Liar(LARGEST, LARGEST, turned(3.0)), Guard() if lifted else Guard.deployed()
    honest, lied = federation(Liar(), guard), federation(liar, guard)
    assert lifted or lied.set_aside[LIAR] >= VERSIONS // 2
    return honest.accuracy - lied.accuracy > TOO_MUCH


def _attacks() -> Iterator[Attack]:
    yield Attack("an answer tells of 10^12 examples", _tells, in_gate=True)
    yield Attack("a site registers and tells 10^12 examples", _outweighs)
    for first, when in ((True, "first"), (False, "last")):
        yield Attack(f"a change is turned round five times, {when}", _costs(Liar(change=turned(5), first=first)))
        yield Attack(f"an answer has norm 9e4, {when}", _costs(Liar(change=of_norm(9e4), first=first)))
    first_of_all = _costs(Liar(change=of_norm(9e4)), FedAsync(max_in_flight=6), 40)
    yield Attack("the first answer of a run has norm 9e4, each making a version", first_of_all)
    yield Attack("a change undoes what others bring", _undoes)


ATTACKS = tuple(_attacks())
