"""FedIT: the factors are averaged apart, as FedAvg averages any parameter.

Source: Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning", 2023 (Shepherd). Biased: the product
of means misses sum p_k (B_k - B)(A_k - A). The paper has one rank for all; lower ranks are padded with zeros here, which is
the naive baseline that the rank-heterogeneous papers compare with. A direction that nobody held in a round would be zero
on both sides and could never learn again: the server draws its `down` anew, once for all clients. Cost: one pass over the
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.combine import dense_mean, mean, server_rank, terms
from fedloom.lora import Adapter, Factor, cut, pad, revive
from fedloom.seeds import derive
from fedloom.types import Budget, Merge, Model, Start


@dataclass(frozen=True, slots=True)
class FedIT:
    """A = sum p_k A_k, B = sum p_k B_k; no rotation, so optimiser moments stay valid until a direction is redrawn."""

    space: ClassVar[Literal["factor"]] = "factor"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            5: "zero-padded directions shrink at every merge by the weight of the clients that do not hold them",
            8: "a client of low rank votes zero on the directions it did not train",
        }
    )

    def init(self, start: Adapter) -> Model:
        """The first global model is the start itself."""
        return Model(start)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Factors averaged apart, zero-padded to the server's rank."""
        rank = server_rank(model.adapter)
        pairs = terms(model.adapter, merge)
        means = {}
        for name in model.adapter.factors:
            padded = [(c, pad(adapter.factors[name], rank)) for c, adapter in pairs]
            means[name] = Factor(mean([(c, f.down) for c, f in padded]), mean([(c, f.up) for c, f in padded]))
        factors = {name: revive(factor, rank, derive(model.basis, name)) for name, factor in means.items()}
        redrawn = any(factors[name] is not factor for name, factor in means.items())
        return Model(Adapter(factors, dense_mean(model.adapter, pairs)), model.basis + redrawn)

    def start(self, model: Model, budget: Budget, seed: int) -> Start:
        """The first `rank` directions, not drawn for each client: all must share the same `down`."""
        factors = {name: cut(factor, budget.rank) for name, factor in model.adapter.factors.items()}
        return Start(Adapter(factors, model.adapter.dense), basis=f"{model.basis}/{budget.rank}")
