"""FLoRA: adapters are stacked and added to the frozen base; every round begins with new ones.

Source: Wang et al., "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations", arXiv
2409.05976, 2024: A = [p_1 A_1; p_2 A_2; ...], B = [B_1, B_2, ...], so that B A = sum p_k B_k A_k exactly at any mixture of
ranks; every client merges it into its base and re-initialises its adapter. The price: the way down grows with the sum of the
ranks (here at most to one dense matrix per layer), and optimiser moments start anew each round. Cost: one stack per layer, and
one dense product when it outgrows the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import base_offsets, dense_mean, linear_terms, offset_terms
from fedloom.aggregate.shared.product_space import add_to_fold
from fedloom.core.lora import Adapter, initial_factor, scale_product
from fedloom.core.policies import Merge
from fedloom.core.seeds import derive
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FLoRA:
    """The sum of the stacked products goes into the fold; each client starts from up = 0 and a `down` of its own."""

    space: ClassVar[Literal["product"]] = "product"
    has_fold: ClassVar[bool] = True
    not_summed: ClassVar[str] = "each client trains directions of its own draw, so that no two change the same one"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {8: "all clients share the weight of a direction, also those whose rank is too low to bring one like it"}
    )

    def init(self, start: Adapter) -> Model:
        """Fold what the start holds; the adapter begins at zero."""
        begin = Adapter({name: scale_product(factor, 0.0) for name, factor in start.factors.items()}, start.dense)
        pieces = {name: [(1.0, factor)] for name, factor in start.factors.items() if bool(factor.up.any())}
        model = Model(begin)
        return replace(model, fold=add_to_fold(model, pieces)) if pieces else model

    def merge(self, model: Model, merge: Merge) -> Model:
        """Add step * sum p_k B_k A_k to the fold: an adapter that starts at zero is its own change."""
        offsets, updates = base_offsets(model, merge), merge.weighted_updates
        pieces = {
            name: [
                *((merge.step * weight, update.result.adapter.factors[name]) for weight, update in updates),
                *offset_terms(name, offsets),
            ]
            for name in model.adapter.factors
        }
        dense = dense_mean(model.adapter, linear_terms(model.adapter, merge))
        adapter = Adapter(model.adapter.factors, dense)
        return replace(model, adapter=adapter, fold=add_to_fold(model, pieces), basis=model.basis + 1)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out a new adapter of the client's rank, drawn from its seed, on top of everything folded so far."""
        factors = {
            name: initial_factor(f, budget.rank, derive(seed, name)) for name, f in model.adapter.factors.items()
        }
        return TaskStart(
            Adapter(factors, model.adapter.dense),
            basis=f"{model.basis}/{seed}/{budget.rank}",
            fold=model.fold,
            seeded=("down", "up"),
        )
