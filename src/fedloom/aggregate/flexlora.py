"""FlexLoRA: the mean of products is kept whole on the server; each client receives its best approximation.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", arXiv
2402.11505, 2024: W = sum p_k s B_k A_k with the clients' own scaling, U S V^T = svd(W), A = V^T[:r_k], B = U[:, :r_k]
S[:r_k]. The same sum as HLoRA; it differs in the model that is evaluated and kept, the full W, where HLoRA's server has the
highest client rank. The directions beyond that rank are nobody's to train, and live in the fold of the server's model. Cost:
as HLoRA, and a second stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import MEANS_OF_FACTORS, divide_by_one, first_model
from fedloom.aggregate.shared.product_space import merge_products, truncated_start
from fedloom.core.lora import Adapter, Factor, compact_with_fold, cut_factor, server_rank
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FlexLoRA:
    """Mean of products without truncation; the clients' directions in the adapter, the rest in a fold that is not sent."""

    space: ClassVar[Literal["product"]] = "product"
    summed_by_factors: ClassVar[str] = MEANS_OF_FACTORS
    has_fold: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            5: "rank-agnostic weights drain energy into the smallest shared rank, as in HLoRA",
            8: "a client of low rank counts as zero in the directions that it did not train",
        }
    )
    init = staticmethod(first_model)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return W = sum p_k B_k A_k, whole: the first directions in the adapter, for clients, the others in the fold."""
        rank = server_rank(model.adapter)
        before = replace(model, adapter=compact_with_fold(model.adapter, model.fold))
        after = merge_products(before, merge, max(rank, _directions(before.adapter, merge)), divide_by_one)
        first = {name: cut_factor(factor, rank) for name, factor in after.adapter.factors.items()}
        rest = {name: Factor(f.down[rank:], f.up[:, rank:]) for name, f in after.adapter.factors.items()}
        return replace(after, adapter=Adapter(first, after.adapter.dense), fold=Adapter(rest))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the best approximation of W at the client's rank."""
        return truncated_start(model, budget, seed, balanced=False)


def _directions(model: Adapter, merge: Merge) -> int:
    """Return how many directions the sum of products can have: those that are added up, but no more than a layer has room for."""
    room = max(min(factor.up.shape[0], factor.down.shape[1]) for factor in model.factors.values())
    added = sum(server_rank(update.result.adapter) for _, update in merge.weighted_updates)
    if merge.as_delta:
        added += sum(server_rank(update.task.start.train) for _, update in merge.weighted_updates)
    return min(room, added + (server_rank(model) if merge.as_delta or merge.step < 1.0 else 0))
