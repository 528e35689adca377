"""Small worlds for the tests: random adapters, dense products, trainers that need no model, where to find policies."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fedloom.aggregate
import fedloom.schedule
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.flexlora import FlexLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.core.indexed_dict import Indexed
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, compact_with_fold
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, Fleet, Merge, Schedule
from fedloom.core.server import Server
from fedloom.core.types import Budget, ClientState, Model, Profile, Result, Task, TaskStart, Update
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.staleness import SQUARE_ROOT, Hinge
from fedloom.schedule.shared.weights import by_examples, uniform
from fedloom.train.objective import personal_adapter

torch.set_num_threads(1)  # matrices this small are slower on two cores

LAYERS = {"query": (12, 10), "value": (10, 14)}
SHAPE = Shape(parameters=1000, embeddings=100, layers=1, hidden=10, modules=tuple(LAYERS.values()), dense=3)

# Where policies are found: by looking, so that a new file is tested by existing --------------------------------------

AGGREGATOR = ("space", "exempt", "init", "merge", "start")
SCHEDULE = ("merge", "start", "wake")
FLAGGED: dict[ModuleType, tuple[Any, ...]] = {
    fedloom.aggregate: (
        HLoRA(published_alpha=16.0),
        HLoRA(balanced=True),
        RaFLoRA(balanced=True),
        FlexLoRA(energy=0.7),
    ),
    fedloom.schedule: (
        Rounds(cohort_size=2, over_selection=2.0),
        Rounds(cohort_size=3, deadline=5.0),
        Rounds(cohort_size=2, over_selection=1.5, deadline=3.0, weigh=uniform),
        FedAsync(max_in_flight=3, discount=Hinge(), uploader_goes_on=True, max_staleness=2),
        FedBuff(buffer_size=3, max_in_flight=4, waiting=True, weigh=by_examples),
        FedBuff(buffer_size=2, max_in_flight=5, delay_threshold=1, normalised_weights=True, max_staleness=2),
        FedFa(window=3, max_in_flight=4, dedup=True, fill="wait", uploader_goes_on=True, discount=SQUARE_ROOT),
        FedFa(window=4, max_in_flight=3, delta_rate=0.25, max_staleness=2),
        Immediate(server_learning_rate=0.2, max_in_flight=3, steady=4, max_staleness=3),
    ),
}
"""Values of the folders' classes that are worth testing besides the default ones."""

SIZES = {"window": 3, "buffer_size": 3, "max_in_flight": 4}
"""What a schedule counts, where a federation has six clients and not hundreds."""


def modules(folder: ModuleType) -> list[ModuleType]:
    names = sorted(info.name for info in pkgutil.iter_modules(folder.__path__))
    return [importlib.import_module(f"{folder.__name__}.{name}") for name in names]


def classes(folder: ModuleType, has: Sequence[str]) -> list[type]:
    """The public classes defined in a module of `folder` that have all of these members."""
    found = []
    for module in modules(folder):
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        found += [c for c in own if not c.__name__.startswith("_") and all(hasattr(c, name) for name in has)]
    return sorted(found, key=lambda c: c.__name__)


def aggregators() -> list[Aggregator]:
    return [cls() for cls in classes(fedloom.aggregate, AGGREGATOR)] + list(FLAGGED[fedloom.aggregate])


def schedules() -> list[Schedule]:
    """Each class with its defaults, but of the size of these federations; and the flagged ones."""
    return [small(cls()) for cls in classes(fedloom.schedule, SCHEDULE)] + list(FLAGGED[fedloom.schedule])


def small(schedule: Any) -> Any:
    return replace(schedule, **{f.name: SIZES[f.name] for f in fields(schedule) if f.name in SIZES})


def called(policy: object) -> str:
    """Its repr without addresses: the id of a parametrised test."""
    return re.sub(r"<function (\w+) at \w+>", r"\1", repr(policy))


# Adapters -----------------------------------------------------------------------------------------------------------


def factor(rank: int, d_out: int = 12, d_in: int = 10, seed: int = 0) -> Factor:
    generator = torch.Generator().manual_seed(seed)
    return Factor(torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator))


def adapter(rank: int, seed: int = 0, layers: Mapping[str, tuple[int, int]] = LAYERS) -> Adapter:
    factors = {name: factor(rank, *size, seed=seed * 100 + k) for k, (name, size) in enumerate(layers.items())}
    return Adapter(factors, {"head": torch.randn(3, generator=torch.Generator().manual_seed(seed * 100 + 99))})


def fresh(rank: int, seed: int = 0) -> Adapter:
    """As LoRA starts: random `down`, zero `up`, so the product is zero."""
    born = adapter(rank, seed)
    return Adapter({n: Factor(f.down, torch.zeros_like(f.up)) for n, f in born.factors.items()}, born.dense)


def graded(energies: Sequence[float], seed: int = 0) -> Adapter:
    """Each layer has singular values of these energies, sorted, `down` orthonormal."""
    factors = {}
    for name, f in adapter(len(energies), seed).factors.items():
        down, up = torch.linalg.qr(f.down.T)[0].T, torch.linalg.qr(f.up)[0]
        factors[name] = Factor(down, up * torch.tensor(energies).sqrt())
    return Adapter(factors)


def product(of: Factor) -> Tensor:
    return of.up.double() @ of.down.double()


def products(of: Adapter) -> dict[str, Tensor]:
    return {name: product(f) for name, f in of.factors.items()}


def function(model: Model | TaskStart) -> dict[str, Tensor]:
    """What is added to the base: the products of the adapter and of the fold."""
    own = products(model.adapter if isinstance(model, Model) else model.train)
    return own if model.fold is None else weighted([(1.0, own), (1.0, products(model.fold))])


def best(matrix: Tensor, rank: int) -> Tensor:
    """Eckart-Young, in float64."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    product: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return product


def weighted(terms: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    return {name: torch.stack([w * one[name] for w, one in terms]).sum(0) for name in terms[0][1]}


def distance(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest Frobenius error of a layer, relative to what is wanted (absolute where that is tiny)."""
    assert given.keys() == wanted.keys()
    return max(float((given[n] - wanted[n]).norm() / max(float(wanted[n].norm()), 1e-3)) for n in wanted)


# Tasks and answers ----------------------------------------------------------------------------------------------------


def make_task(start: Adapter, rank: int, number: int = 1, client: str | None = None, **more: Any) -> Task:
    given: dict[str, Any] = {"version": 0, "budget": Budget(rank, 5), "sent": 0.0} | more
    return Task(id=number, client=client or f"c{number}", start=TaskStart(start, "0"), **given)


def make_result(trained: Adapter, examples: int = 10, **more: Any) -> Result:
    given: dict[str, Any] = {"tokens": 100, "steps": 1} | more
    return Result(trained, examples, **given)


def make_update(
    trained: Adapter, rank: int, number: int = 1, start: Adapter | None = None, examples: int = 10
) -> Update:
    return Update(make_task(start or trained, rank, number), make_result(trained, examples))


def sent(method: Aggregator, model: Model, rank: int, number: int = 1) -> Task:
    """The task that a client of this rank gets."""
    start = method.start(model, Budget(rank, 5), seed=number)
    return Task(number, f"c{number}", 0, start, Budget(rank, 5), 0.0)


def returned(task: Task, trained: Adapter | None = None) -> Update:
    """The answer to it, private sides left at the client; without `trained` the client gives back what it got."""
    sent = task.start.train
    given = trained or sent
    if task.start.rules.private:
        factors = {n: Factor(*(getattr(sent.factors[n] if side in task.start.rules.private else f, side)
                               for side in ("down", "up"))) for n, f in given.factors.items()}  # fmt: skip
        given = Adapter(factors, sent.dense if "dense" in task.start.rules.private else given.dense)
    return Update(task, make_result(given))


def changed(start: TaskStart | Adapter, seed: int, by: float = 0.3) -> Adapter:
    """What was sent after some training: every entry moved, frozen sides apart."""
    begin, frozen = (start.train, start.rules.frozen) if isinstance(start, TaskStart) else (start, ())
    factors = {}
    for k, (n, f) in enumerate(begin.factors.items()):
        noise = factor(f.rank, f.up.shape[0], f.down.shape[1], seed=seed * 100 + k)
        down = f.down if "down" in frozen else f.down + by * noise.down
        factors[n] = Factor(down, f.up if "up" in frozen else f.up + by * noise.up)
    moved = {n: t + by * torch.randn(t.shape, generator=torch.Generator().manual_seed(seed * 100 + 99))
             for n, t in begin.dense.items()}  # fmt: skip
    return Adapter(factors, begin.dense if "dense" in frozen else moved)


def answers(method: Aggregator, model: Model, ranks: Sequence[int], first: int = 1) -> list[Update]:
    """What clients of these ranks give back after some training."""
    tasks = [sent(method, model, rank, number) for number, rank in enumerate(ranks, first)]
    return [returned(task, changed(task.start, task.id)) for task in tasks]


def mean_of(updates: Sequence[Update], weights: Sequence[float] | None = None, **more: Any) -> Merge:
    shares = weights or [1 / len(updates)] * len(updates)
    return Merge(tuple(zip(shares, updates, strict=True)), **more)


# Federations ----------------------------------------------------------------------------------------------------------


def profiles(count: int) -> dict[str, Profile]:
    return {f"c{k}": Profile(f"c{k}", 10 + k, flops=1e4 * (1 + k % 3), up_bps=1e4, down_bps=1e4) for k in range(count)}


def server(schedule: Schedule | None = None, method: Aggregator | None = None, **more: Any) -> Server:
    """A server with a tiny model: one layer of 4 x 3, rank 2."""
    how = method or FedIT()
    given: dict[str, Any] = {"shape": SHAPE, "limits": Limits(versions=3), "assign": Plan(FixedRank(2), 2)} | more
    start = given.pop("start", None) or adapter(2, layers={"only": (4, 3)})
    assign = given.pop("assign")
    return Server(how.init(start), how, schedule or Rounds(), assign, **given)


def fleet(**more: Any) -> Fleet:
    given: dict[str, Any] = {"now": 0.0, "version": 0, "seed": 0, "idle": {}, "busy": {}, "arrived": (), "shape": SHAPE}
    given |= more
    given["idle"] = given["idle"] if isinstance(given["idle"], Indexed) else Indexed(given["idle"])
    return Fleet(**given)


@dataclass(frozen=True)
class Null:
    """Gives back what it got, or what `spoil` makes of the result."""

    spoil: Any = None

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        plain = [make_result(task.start.train) for task, _ in work]
        return [(self.spoil(r) if self.spoil else r, local) for r, (_, local) in zip(plain, work, strict=True)]


@dataclass(frozen=True)
class Quadratic:
    """Each client wants its products near its own matrices: a common rank-2 target plus a small private part."""

    layers: Mapping[str, tuple[int, int]] = field(default_factory=lambda: LAYERS)
    rate: float = 0.9
    private: float = 0.2

    def target(self, client: str | None) -> dict[str, Tensor]:
        common = products(adapter(2, 1000, self.layers))
        if client is None:
            return common
        own = products(adapter(1, 2000 + int(client[1:]), self.layers))
        return weighted([(1.0, common), (self.private, own)])

    def loss(self, of: Adapter) -> float:
        """Squared error towards the common target, relative to predicting zero."""
        wanted = self.target(None)
        squares = sum(float((p - wanted[n]).square().sum()) for n, p in products(of).items())
        return squares / sum(float(t.square().sum()) for t in wanted.values())

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        return [self._one(task, local) for task, local in work]

    def _one(self, task: Task, local: ClientState) -> tuple[Result, ClientState]:
        start, target, factors = task.start, self.target(task.client), {}
        begin = personal_adapter(start, local)
        generator = torch.Generator().manual_seed(task.id)
        for name, factor in begin.factors.items():
            down, up = factor.down.double(), factor.up.double()
            folded = start.fold.factors.get(name) if start.fold else None
            rest = target[name] - (product(folded) if folded else 0.0)
            for _ in range(task.budget.steps):
                noise = 0.01 * torch.randn(target[name].shape, generator=generator, dtype=torch.float64)
                slope = up @ down - rest + noise
                by_up, by_down = (self.rate / max(float(side.square().sum()), 1.0) for side in (down, up))
                new_up = up if "up" in start.rules.frozen else up - by_up * slope @ down.T
                down = down if "down" in start.rules.frozen else down - by_down * up.T @ slope
                up = new_up
            factors[name] = Factor(down.float(), up.float())
        trained = Adapter(factors, begin.dense)
        given = returned(task, trained).result.adapter
        metrics = {"loss": self.loss(compact_with_fold(trained, start.fold))}
        control = start.control and Adapter(
            {n: Factor(0.0 * f.down, 0.0 * f.up) for n, f in given.factors.items()},
            {n: 0.0 * t for n, t in given.dense.items()},
        )
        private = trained if start.rules.private else None
        result = make_result(given, steps=task.budget.steps, metrics=metrics, control=control)
        return result, replace(local, basis=start.basis, private=private)


def tree(groups: Sequence[int], hierarchy: Any = None, **more: Any) -> Any:
    """A tree over clients c0, c1, ... in groups of these sizes; `more` is about the root."""
    from fedloom.hierarchy.hierarchy import Hierarchy

    own, given = iter(profiles(sum(groups)).values()), Hierarchy() if hierarchy is None else hierarchy
    members = {f"edge{k}": tuple(next(own) for _ in range(size)) for k, size in enumerate(groups)}
    return given.over(server(**more), members, compared(sum(groups)) if given.regroup else None)


def compared(count: int) -> Any:
    """Clients c0, c1, ... of which nothing is known but their labels; a task of 4 steps at rank 3."""
    from fedloom.hierarchy.grouping import Member
    from fedloom.hierarchy.regrouping import Compared

    members = (
        Member(name, one.examples, 1.0, (1.0 + k % 3, 1.0)) for k, (name, one) in enumerate(profiles(count).items())
    )
    return Compared(tuple(members), 3, 4, 100)
