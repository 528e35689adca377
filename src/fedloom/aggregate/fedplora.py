"""Fed-PLoRA: the adapter is a set of parallel one-rank modules, of which each client trains as many as it can.

Source: "Fed-PLoRA", arXiv 2602.16936 (ICLR 2026): R rank-1 modules; client i draws K_i of size r_i at random and folds the
others, W_i = W0 + sum_{j not in K_i} B_j A_j; the server averages module by module, B_j = mean_{i in Q_j} B_ij, A_j likewise,
and leaves a module that nobody trained. Nothing is lost at the start of a task, whatever the rank; the way down carries all
modules. Cost: one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from fedloom.aggregate.shared.factor_space import move_factors
from fedloom.aggregate.shared.merge_terms import first_model, holder_weights, select_directions
from fedloom.aggregate.shared.product_space import fold_untrained
from fedloom.core.lora import Adapter, server_rank
from fedloom.core.policies import Merge
from fedloom.core.seeds import rng
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FedPLoRA:
    """Means of one-rank modules over those who trained them, with the schedule's weights."""

    space: ClassVar[Literal["factor"]] = "factor"
    not_summed: ClassVar[str] = "each client draws the modules that it trains, so that few hold the same one"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})
    init = staticmethod(first_model)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average each module over its trainers Q_j."""
        return replace(model, adapter=move_factors(model.adapter, merge, holder_weights))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out `rank` modules drawn from `seed`, with the others in the fold."""
        drawn = tuple(sorted(rng(seed, "modules").sample(range(server_rank(model.adapter)), budget.rank)))
        chosen = torch.tensor(drawn)
        factors = {name: select_directions(factor, chosen) for name, factor in model.adapter.factors.items()}
        basis = f"{model.basis}/{'.'.join(map(str, drawn))}"
        return TaskStart(
            Adapter(factors, model.adapter.dense), basis, fold=fold_untrained(model, drawn), directions=drawn
        )
