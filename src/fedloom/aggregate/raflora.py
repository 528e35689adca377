"""raFLoRA: products are averaged direction by direction, each over the clients that hold it.

Source: "raFLoRA", arXiv 2602.13486, 2026, Alg. 1 and Eq. 8: rank boundaries 0 = h_0 < h_1 < ..., C_h = {k : r_k >= h},
dW_h = sum_{k in C_h} (n_k / sum_{C_h} n) B_k[:, h_prev:h] A_k[h_prev:h, :], W = sum_h dW_h, SVD, dispatch truncated.
Within one partition C_h does not change, so weighing each single direction i over {k : r_k >= i} is the same rule, and needs
no list of the federation's ranks. Where nobody who takes part holds a direction, the server keeps its own (the paper is
silent; dropping it would lose that energy). Cost: as HLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import MEANS_OF_FACTORS, first_model, holder_weights, require_server_rank
from fedloom.aggregate.shared.product_space import merge_products, truncated_start
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class RaFLoRA:
    """Mean of products, each direction over the clients that hold it, truncated to the server's rank.

    Fields:
        rank: rank that the server keeps (None: the highest client rank).
        balanced: whether singular values are divided evenly over both factors of what a client trains. Then one learning rate
            suits both. False, as for its neighbours, leaves them to `up`: how factors are split is another question than how they
            are weighed.
    """

    rank: int | None = None
    balanced: bool = False
    space: ClassVar[Literal["product"]] = "product"
    summed_by_factors: ClassVar[str] = MEANS_OF_FACTORS
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})
    init = staticmethod(first_model)

    def __post_init__(self) -> None:
        require_server_rank(self.rank)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return W = sum_h dW_h, cut to the server's rank."""
        return merge_products(model, merge, self.rank, holder_weights)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the leading directions at the client's rank."""
        return truncated_start(model, budget, seed, self.balanced)
