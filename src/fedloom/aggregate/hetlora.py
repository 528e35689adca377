"""HetLoRA: zero-padded factors, weighted by the size of what each client learnt; clients prune their own rank.

Source: Cho et al., "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models", arXiv 2401.06432, 2024. The
server averages zero-padded factors with p_k = |B_k A_k| / sum_j |B_j A_j| (Frobenius, one norm over all layers) and hands out
A[:r_k], B[:, :r_k]. A client adds lambda |B[:, g r:]| |A[g r:, :]| to its loss and, if that tail has become smaller, goes on
with rank max(r_min, g r). The schedule's weight multiplies the norm, so that staleness counts: `Rounds(weigh=uniform)` is the
paper's rule. The head has no norm of its own kind and is averaged with the schedule's weights. Cost: one pass over the
parameters, and a QR a layer and client.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.factor_space import leading_start, padded_mean
from fedloom.aggregate.shared.merge_terms import first_model
from fedloom.core.errors import Refused
from fedloom.core.lora import product_norm
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, Pruning, Rules, TaskStart, Update


@dataclass(frozen=True, slots=True)
class HetLoRA:
    """Zero-padding with norm weights and self-pruning clients.

    Fields:
        prune: whether clients prune their own rank.
        strength: weight of the pruning penalty in the loss (lambda).
        keep: share of the rank that is not penalised (gamma; above 0, below 1).
        least: directions that a client keeps in any case (r_min).
    """

    prune: bool = True
    strength: float = 1e-3
    keep: float = 0.99
    least: int = 1
    space: ClassVar[Literal["factor"]] = "factor"
    not_summed: ClassVar[str] = "it weighs each answer by its norm, which a sum does not tell"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            2: "weights follow the norm of what was learnt, not the schedule's alone",
            5: "zero-padded directions shrink at every merge by the weight of the clients that do not hold them",
            8: "a client of low rank counts as zero in the directions that it did not train",
        }
    )
    init = staticmethod(first_model)

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise Refused(
                "aggregator.strength", self.strength, "lambda is 0 or more; the paper's order is 1e-3 to 1e-2"
            )
        if not 0 < self.keep < 1:
            raise Refused("aggregator.keep", self.keep, "the share of the rank that pruning keeps: above 0, below 1")
        if self.least < 1:
            raise Refused("aggregator.least", self.least, "a client keeps at least 1 direction")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average the padded factors with weights in proportion to |B_k A_k|."""
        return padded_mean(model, replace(merge, weighted_updates=weigh_by_norm(merge)), head=merge)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the first directions, with the rule for pruning."""
        pruning = Pruning(self.strength, self.keep, self.least) if self.prune else None
        return replace(leading_start(model, budget), rules=Rules(pruning=pruning))


def weigh_by_norm(merge: Merge) -> tuple[tuple[float, Update], ...]:
    """Return the updates with weight * |B_k A_k| over all layers, normalised; unchanged where everybody brought zero."""
    sizes = [
        weight * sum(product_norm(factor) ** 2 for factor in update.result.adapter.factors.values()) ** 0.5
        for weight, update in merge.weighted_updates
    ]
    total = sum(sizes)
    if not total > 0:
        return merge.weighted_updates
    return tuple((size / total, update) for size, (_, update) in zip(sizes, merge.weighted_updates, strict=True))
