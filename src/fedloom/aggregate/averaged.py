"""What is published, scored and exported is a running average of the versions; clients train on the last one.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992: steps may then be large, because
their noise is averaged out of the result (for neural networks: Izmailov et al., arXiv 1803.05407, 2018). An asynchronous server
that steps at every answer needs it most. The weights are those of Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth
Optimization", ICML 2013, section 3 (polynomial decay):
average_t = (1 - a) average_{t-1} + a version_t with a = (focus + 1) / (t + focus), so that about the last 1 / (focus + 1) of all
versions count, early in a run and late. Products are averaged, exactly but for the cut to the server's rank; of a method that keeps
a part of its model in a fold nothing is cut, and what is beyond that rank is in the fold of the average.
Cost: besides the wrapped merge one decomposition of twice the rank per layer, with a fold one of its directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from fedloom.aggregate.product_delta import ProductDelta
from fedloom.aggregate.shared.merge_terms import dense_mean
from fedloom.aggregate.shared.product_space import best_approximation, split_at_rank
from fedloom.aggregate.shared.wrapper import Wrapper, drop_memory, require_method
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, server_rank
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import Budget, Model, TaskStart

LAST, FOLD, COUNT = "last version", "last fold", "versions averaged"


@dataclass(frozen=True, slots=True)
class Averaged(Wrapper):
    """Running average of the versions of another method.

    Fields:
        inner: the wrapped method, any whose server has a whole model (not FedSA).
        focus: how far recent versions count more: about the last 1 / (focus + 1) of all count (0: all alike).
    """

    inner: Aggregator = field(default_factory=ProductDelta)
    focus: float = 8.0
    after_merge: ClassVar[bool] = True
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})

    @property
    def space(self) -> Literal["product"]:
        """Always "product": averaging products rotates the basis at every merge, so no entrywise wrapper goes around it."""
        return "product"

    def __post_init__(self) -> None:
        require_method("Averaged", self.inner)
        if any(isinstance(layer, Averaged) for layer in aggregator_layers(self.inner)):
            raise Refused("aggregator (Averaged).inner", "Averaged", "it is in this aggregator already; once is enough")
        for layer in aggregator_layers(self.inner):
            if why := getattr(layer, "personal", None):
                remedy = f"{why}; an average of it is nobody's model. Leave Averaged out"
                raise Refused("aggregator (Averaged).inner", type(layer).__name__, remedy)
        if not self.focus >= 0:
            raise Refused("aggregator.focus", self.focus, "0 averages over all versions, 8 over about the last ninth")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Merge into the last version with the wrapped method, and the result into the average."""
        merge = merge.map_updates(lambda update: replace(update, base=update.base and last_version(update.base)))
        merge = replace(merge, anchor=merge.anchor and last_version(merge.anchor))
        after = self.inner.merge(last_version(model), merge)
        before = float(model.memory[COUNT].dense[COUNT]) if COUNT in model.memory else 0.0
        share = min(1.0, (self.focus + 1) / (before + 1 + self.focus))
        count = {COUNT: Adapter({}, {COUNT: torch.tensor(before + 1, dtype=torch.float64)})}
        memory = {**after.memory, LAST: after.adapter, **count, **({FOLD: after.fold} if after.fold else {})}
        adapter, fold = _mixed(model, after, share)
        return replace(after, adapter=adapter, fold=fold, memory=memory)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out what the wrapped method does of the last version."""
        return self.inner.start(last_version(model), budget, seed)


def last_version(model: Model) -> Model:
    """Return the version that clients train on; a layer that is in no average yet is as it was."""
    if LAST not in model.memory:
        return model
    version, fold = model.memory[LAST], model.memory.get(FOLD)
    if rest := model.adapter.factors.keys() - version.factors.keys():
        version = Adapter({**model.adapter.factors, **version.factors}, version.dense)
        folded = {name: factor for name, factor in (model.fold or Adapter({})).factors.items() if name in rest}
        fold = Adapter({**folded, **(fold.factors if fold else {})}) if folded else fold
    return replace(published_average(model), adapter=version, fold=fold)


def published_average(model: Model) -> Model:
    """Return the average alone, as it is evaluated and exported: a start cut from it holds directions of the average."""
    return drop_memory(model, LAST, FOLD, COUNT)


def _mixed(average: Model, version: Model, share: float) -> tuple[Adapter, Adapter | None]:
    """Return (1 - share) average + share version, at the rank of the version, and the rest in a fold where one of them has a fold.

    Where clients begin each task anew (FLoRA), the version's adapter adds nothing: it is the average's too, and all is in the fold.
    """
    rank, factors = server_rank(version.adapter), {}
    pairs = [(1.0 - share, average), (share, version)] if share < 1.0 else [(1.0, version)]
    folded = any(one.fold is not None for _, one in pairs)
    for name in version.adapter.factors:
        terms = [(c, one.adapter.factors[name]) for c, one in pairs]
        terms += [(c, one.fold.factors[name]) for c, one in pairs if one.fold and name in one.fold.factors]
        room = max(rank, sum(factor.rank for _, factor in terms)) if folded else rank
        factors[name] = best_approximation(terms, room, measured=False)[0]
    dense = dense_mean(version.adapter, [(c, one.adapter) for c, one in pairs])
    if folded and not any(bool(factor.up.any()) for factor in version.adapter.factors.values()):
        return Adapter(version.adapter.factors, dense), Adapter(factors)
    first, rest = split_at_rank(factors, rank)
    return Adapter(first, dense), rest if folded else None
