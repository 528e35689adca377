"""Changes of products are averaged: a client votes on what it changed, and on nothing else. The default.

Source: our own combination. The rule is FedAvg in the form of updates (McMahan et al. 2017, Alg. 1: w + sum p_k (w_k - w)), applied
to products as HLoRA does (arXiv 2503.00813) and re-factorised in the same way. Where HLoRA lets a client of low rank vote zero on
the directions that it does not hold, and raFLoRA leaves it out and so amplifies the few who do, it votes here for what the server
has: W + sum p_k (B_k A_k - what k received). No learning, no change; no direction is amplified.
Cost: as HLoRA: what was sent out cancels against the versions that it was cut from, but for directions beyond a client's rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import MEANS_OF_FACTORS, VOTES_SERVER_VALUE, first_model, require_server_rank
from fedloom.aggregate.shared.product_space import merge_changes, truncated_start
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class ProductDelta:
    """The model plus the mean change of products, truncated to the server's rank.

    Fields:
        rank: rank that the server keeps (None: the highest client rank).
        balanced: whether singular values are divided evenly over both factors of what a client trains. Then one learning rate
            suits both. False leaves them to `up`.
    """

    rank: int | None = None
    balanced: bool = False
    space: ClassVar[Literal["product"]] = "product"
    plain_mean: ClassVar[bool] = True
    summed_by_factors: ClassVar[str] = MEANS_OF_FACTORS
    exempt: ClassVar[Mapping[int, str]] = VOTES_SERVER_VALUE
    init = staticmethod(first_model)

    def __post_init__(self) -> None:
        require_server_rank(self.rank)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return W + step * sum p_k (B_k A_k - what k received), cut to the server's rank."""
        return merge_changes(model, merge, self.rank)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the leading directions at the client's rank."""
        return truncated_start(model, budget, seed, self.balanced)
