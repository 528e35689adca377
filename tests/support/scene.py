"""A server with outstanding tasks, good answers to them, and a fingerprint of its state to the bit."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from fedloom.aggregate.raflora import RaFLoRA
from fedloom.core.codec import Codec
from fedloom.core.events import ClientJoined, Command, Dispatch, TimerFired, UpdateArrived
from fedloom.core.flat_buffer import FlatTable
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor, truncate
from fedloom.core.model_shape import Shape
from fedloom.core.policies import BudgetRule, Fleet
from fedloom.core.server import Server
from fedloom.core.types import Budget, Profile, Result, Task
from fedloom.schedule.rounds import Rounds
from tests.support.tiny_models import RANKS

LAYERS = {"query": (12, 10), "value": (10, 14)}
SHAPE = Shape(parameters=1000, embeddings=100, layers=1, hidden=10, modules=tuple(LAYERS.values()), dense=3)
CLIENTS, COHORT_OF_SIX = 6, 4


def toy_adapter(rank: int, seed: int, size: float = 1.0) -> Adapter:
    """Two layers of falling singular values from `size`, and a head."""
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for name, (d_out, d_in) in LAYERS.items():
        wide = Factor(torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw))
        kept = truncate(wide, rank)
        sizes = size * torch.linspace(rank, 1, rank).sqrt()
        factors[name] = Factor(kept.down, kept.up / kept.up.norm(dim=0) * sizes)
    return Adapter(factors, {"head": torch.randn(3, generator=draw)})


def ranks_by_name(clients: Sequence[str], ranks: Sequence[int]) -> BudgetRule:
    """Each client its rank, and four steps."""
    known = dict(zip(clients, ranks, strict=True))

    def assign(profile: Profile, fleet: Fleet) -> Budget:
        return Budget(known[profile.client], 4)

    return assign


@dataclass(slots=True)
class Scene:
    """A server in its second round, and what a liar could know of it."""

    server: Server
    open: list[Task]
    answered: list[Task]
    closed: list[Task]
    results: dict[int, Result] = field(default_factory=dict)

    def good(self, task: Task) -> Result:
        """The well-formed answer to this task, made once."""
        if task.id not in self.results:
            self.results[task.id] = good(task)
        return self.results[task.id]

    def some(self, draw: random.Random) -> Task:
        """An outstanding task."""
        return draw.choice(self.open)


def scene(transfer: Codec | None = None) -> Scene:
    """Round 1 is merged, with two tasks cancelled; in round 2 one of six tasks is answered."""
    names = [f"c{number}" for number in range(CLIENTS)]
    assign, how = ranks_by_name(names, RANKS * (CLIENTS // len(RANKS))), RaFLoRA()
    rounds, limits = Rounds(cohort_size=COHORT_OF_SIX, over_selection=1.5), Limits(versions=5)
    server = Server(
        how.init(toy_adapter(max(RANKS), 1)), how, rounds, assign, shape=SHAPE, limits=limits, transfer=transfer
    )
    for name in names:
        server.handle(0.0, ClientJoined(Profile(name, 10)))
    first = _tasks(server.handle(0.0, TimerFired()))
    second = _answered(server, first[:COHORT_OF_SIX])
    _answered(server, second[:1])
    return Scene(server, second[1:], second[:1], first)


def _answered(server: Server, tasks: Sequence[Task]) -> list[Task]:
    """Good answers to these tasks; returns the tasks that follow from them."""
    commands: list[Command] = []
    for task in tasks:
        commands += server.handle(1.0, UpdateArrived(task.client, task.id, good(task)))
    return _tasks(commands)


def _tasks(commands: Sequence[Command]) -> list[Task]:
    return [command.task for command in commands if isinstance(command, Dispatch)]


def good(task: Task) -> Result:
    """A well-formed answer: the start, moved a little."""
    step = toy_adapter(task.budget.rank, task.id, 0.1)
    start = task.start.train
    factors = {
        name: Factor(factor.down + 0.1 * step.factors[name].down, factor.up + step.factors[name].up)
        for name, factor in start.factors.items()
    }
    dense = {name: tensor + 0.1 * step.dense[name] for name, tensor in start.dense.items()}
    return Result(Adapter(factors, dense), 10, 100, task.budget.steps, {"loss": 0.5})


def fingerprint(value: object) -> str:
    """sha256 over everything in a value, however deep, tensors by their bytes."""
    digest = hashlib.sha256()
    try:
        _feed(digest.update, value)
    except Exception as error:  # something that has no bytes got in, such as a sparse tensor
        return f"none: {error}"
    return digest.hexdigest()


def _feed(put: Callable[[bytes], object], value: object) -> None:
    kind = type(value)
    if kind in PLAIN:
        put(f"{value!r};".encode())
    elif isinstance(value, Tensor):
        put(f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().contiguous().numpy().tobytes())
    elif isinstance(value, dict | IndexedTable | FlatTable):
        put(b"{")
        for key, item in value.items():
            put(f"{key!r}:".encode())
            _feed(put, item)
    elif isinstance(value, list | tuple):
        put(b"[")
        for item in value:
            _feed(put, item)
    elif is_dataclass(kind):
        put(kind.__name__.encode())
        for name in _field_names(cast(Any, kind)):
            _feed(put, getattr(value, name))
    else:
        raise TypeError(f"a {kind.__name__} in the state: say how to take its fingerprint")
    put(b".")


PLAIN = (int, float, str, bool, type(None))


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(one.name for one in fields(kind))
