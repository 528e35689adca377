"""LoRA-A2: the sides are trained in turn, and each client trains the few directions that matter most for its data.

Source: Koo et al., "Towards Robust and Efficient Federated Low-Rank Adaptation with Heterogeneous Clients", arXiv 2410.22815
(ACL 2025): every client holds the global rank; in odd rounds B is trained, in even rounds A; after a probe client i scores
each rank slot of each of the N modules by |dB[:, j] A[j]| (or |B[:, j] dA[j]|), keeps the best r_i N of them, and trains and
uploads no others; X <- X + sum w_k dX_k. The head is frozen, B learns five times as fast as A. Cost: one pass over the
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.factor_space import add_offsets, leading_start, move_factors
from fedloom.aggregate.shared.merge_terms import as_changes, base_offsets, divide_by_one, first_model
from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, Rules, TaskStart


@dataclass(frozen=True, slots=True)
class LoRAA2:
    """Alternating sides, and directions that each client selects.

    Fields:
        up_rate: learning rate of B relative to that of A.
        freeze_head: whether the classifier stays as it was at the start, as in the paper; it needs a head that is worth keeping.
    """

    up_rate: float = 5.0
    freeze_head: bool = False
    space: ClassVar[Literal["factor"]] = "factor"
    plain_mean: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            3: "every client receives the global rank, whatever its own, and chooses its directions there",
            8: "w_k dX_k is not divided by the weight of those who chose a direction",
        }
    )
    init = staticmethod(first_model)

    def __post_init__(self) -> None:
        if not self.up_rate > 0:
            raise Refused("aggregator.up_rate", self.up_rate, "a positive factor; the paper has 5")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return X + step * sum w_k dX_k on the side that was trained; then it is the other one's turn."""
        adapter = add_offsets(move_factors(model.adapter, as_changes(merge), divide_by_one), base_offsets(model, merge))
        return replace(model, adapter=adapter, phase=model.phase + 1)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the whole adapter, to be trained in `rank` directions per layer on average, one side of them frozen."""
        whole = leading_start(model, replace(budget, rank=server_rank(model.adapter)))
        side: tuple[Literal["up", "down"], ...] = ("up",) if model.phase % 2 else ("down",)
        rules = Rules(
            frozen=(*side, "dense") if self.freeze_head else side,
            select=budget.rank * len(model.adapter.factors),
            up_rate=self.up_rate,
        )
        seeded: tuple[Literal["dense"], ...] = ("dense",) if self.freeze_head else ()
        return replace(whole, basis=f"{model.phase}/{budget.rank}", seeded=seeded, rules=rules)
