"""FedEx-LoRA: factors are averaged apart, and what that misses is added to the frozen base.

Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models", arXiv
2410.09432, 2024: A = sum p_k A_k, B = sum p_k B_k, W0 += sum p_k B_k A_k - B A. The paper has one rank for all. Here a client
of lower rank receives the directions that it cannot train as a part of its base, so it starts from the whole model, and votes
for no change of them. What is averaged into the base is the clients' change, so that nothing folded is counted twice. Cost:
one stack per layer, and the fold on the way down, at most one dense matrix per layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedloom.aggregate.shared.factor_space import leading_start, move_models
from fedloom.aggregate.shared.merge_terms import (
    VOTES_SERVER_VALUE,
    as_changes,
    base_offsets,
    divide_by_one,
    first_model,
    offset_terms,
)
from fedloom.aggregate.shared.product_space import add_to_fold, fold_untrained, product_terms
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FedEx:
    """Means of factors, and the residual in the fold: together the exact mean of products."""

    space: ClassVar[Literal["product"]] = "product"
    has_fold: ClassVar[bool] = True
    not_summed: ClassVar[str] = "its fold is what the product of mean factors leaves out, which sums do not tell"
    exempt: ClassVar[Mapping[int, str]] = VOTES_SERVER_VALUE
    init = staticmethod(first_model)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average A and B apart, and add the residual sum p_k B_k A_k - B A to the fold."""
        adapter, offsets, residual = move_models(model, merge), base_offsets(model, merge), {}
        for name, factor in adapter.factors.items():
            divisor = divide_by_one(name, merge, factor.rank)
            changed = [*product_terms(name, model.adapter, as_changes(merge), divisor), *offset_terms(name, offsets)]
            residual[name] = [*changed, (-1.0, factor)]
        return replace(model, adapter=adapter, fold=add_to_fold(model, residual))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the first directions to train, with the others and the residual in the fold."""
        return replace(leading_start(model, budget), fold=fold_untrained(model, range(budget.rank)))
