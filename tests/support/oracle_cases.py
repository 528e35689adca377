"""Cases in which a method is compared with its oracle (`oracles.py`): methods, answers of several ranks, and the errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fedloom.aggregate.ace import ACE
from fedloom.aggregate.adam import Adam
from fedloom.aggregate.ca2fl import CA2FL
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fadas import FADAS
from fedloom.aggregate.fedplora import FedPLoRA
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.hlora import HLoRA
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.lora import Adapter, Factor, cut_factor
from fedloom.core.types import Model, Task, Update
from tests.support import toys
from tests.support.equations import Round, Values, values
from tests.support.toys import distance, returned

TOP, BAR = 8, 1e-6
MORE: list[Any] = [
    HLoRA(rank=5), RaFLoRA(rank=3), ProductDelta(rank=5), HetLoRA(prune=False), LoRAA2(freeze_head=True),
    Clip(HLoRA(), 0.5), Clip(FLoRA(), 0.1), Clip(FedSA(), 1e6),
    Momentum(RoLoRA(), 0.5, 0.7), Momentum(FedPLoRA()), Momentum(Clip(FFA())), Adam(FFA()), Adam(LoRAA2()),
    Scaffold(FedPLoRA(), 5), Scaffold(Momentum()), CA2FL(FedPLoRA(), 4), CA2FL(RoLoRA(), 4), CA2FL(FedSA(), 4), CA2FL(LoRAA2(), 4),
    CA2FL(Clip(FFA(), 0.5), 4), ACE(FedPLoRA(), 4), ACE(RoLoRA(), 4), ACE(Momentum(), 4), FADAS(RoLoRA()), FADAS(CA2FL(), 0.01),
]  # fmt: skip
"""Parameters and combinations that are worth comparing besides the default ones."""


@dataclass(frozen=True)
class Answer:
    """A participant: rank, weight before they are made to sum to 1, whether it answers the version before the last, and prunes."""

    rank: int
    weight: int
    late: bool
    prune: bool


FORMS = st.tuples(st.sampled_from([1.0, 1.0, 0.3]), st.booleans())


def trained(task: Task) -> Adapter:
    """Every free entry moves by a share of its direction's length, so that a graded spectrum stays graded."""
    start, draw = task.start, torch.Generator().manual_seed(task.id)
    factors = {}

    def step(x: Tensor, lengths: Tensor | float) -> Tensor:
        return x + 0.2 * lengths * torch.randn(x.shape, generator=draw) / x.shape[-1] ** 0.5

    for number, (name, f) in enumerate(start.train.factors.items()):
        slope = 0.8 ** torch.arange(f.rank) * (1.0 + number)
        down = f.down if "down" in start.rules.frozen else step(f.down, f.down.norm(dim=1, keepdim=True))
        up = f.up if "up" in start.rules.frozen else step(f.up, torch.maximum(f.up.norm(dim=0), slope))
        factors[name] = Factor(down, up)
    head = {n: t if "dense" in start.rules.frozen else step(t, 1.0) for n, t in start.train.dense.items()}
    return Adapter(factors, head)


def answered(task: Task, prune: bool) -> Update:
    """The answer: pruned where that is allowed, with a change of the control variate where one was sent."""
    update = returned(task, trained(task))
    if prune and task.start.rules.pruning:
        rank = task.start.rules.pruning.rank_after(task.budget.rank)
        left = update.result.adapter
        left = Adapter({n: cut_factor(f, rank) for n, f in left.factors.items()}, left.dense)
        update = replace(update, result=replace(update.result, adapter=left))
    if task.start.control:
        update = replace(update, result=replace(update.result, control=toys.changed(task.start.control, task.id)))
    return update


def errors(model: Model, r: Round, wanted: Values) -> dict[str, float]:
    """The relative error of everything that the oracle speaks of; rows that a method draws anew are nobody's to foretell.

    What a wrapper remembers is a difference of float32 models, so its error is relative to the model.
    """
    own, found = values(model.adapter), {}
    for key, want in wanted.items():
        name, _, entry = key.rpartition(":")
        if name:
            scale = max(float(want.norm()), float(r.own[entry].norm()))
            found[key] = float((values(model.memory[name])[entry] - want).norm()) / scale
        elif key in model.adapter.factors:
            fold = toys.product(model.fold.factors[key]) if model.fold and key in model.fold.factors else 0.0
            found[key] = distance({key: toys.product(model.adapter.factors[key]) + fold}, {key: want})
        elif key.endswith(".A"):
            alive = (want.norm(dim=1) + wanted[f"{key[:-2]}.B"].norm(dim=1) > 1e-12)[:, None]
            found[key] = distance({key: own[key] * alive}, {key: want})
        else:
            found[key] = distance({key: own[key]}, {key: want})
    return found
