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

from fedloom.aggregate.shared.factor_space import leading_start, padded_mean
from fedloom.aggregate.shared.merge_terms import first_model
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FedIT:
    """A = sum p_k A_k, B = sum p_k B_k; no rotation, so optimiser moments stay valid until a direction is redrawn."""

    space: ClassVar[Literal["factor"]] = "factor"
    plain_mean: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            5: "zero-padded directions shrink at every merge by the weight of the clients that do not hold them",
            8: "a client of low rank counts as zero in the directions that it did not train",
        }
    )
    init = staticmethod(first_model)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average the factors apart, zero-padded to the server's rank."""
        return padded_mean(model, merge)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the first `rank` directions, not drawn for each client: all must share the same `down`."""
        return leading_start(model, budget)
