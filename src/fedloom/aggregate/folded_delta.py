"""Changes of products are averaged, and every client starts from the whole model: what it cannot train is folded into its base.

Source: our own combination. Fed-PLoRA (arXiv 2602.16936, 2026) folds the modules that a client does not train instead of dropping
them; here the modules are the singular directions of the server's model, so that a client of rank r trains the r that carry most
of it, and the rest runs as a part of its base. What it returns is a change of the very function that the server has:
W + sum p_k (B_k A_k - what k received), the mean that FedAvg takes, with no bias at any mixture of ranks and no truncation on the
way down. `rank` above the clients' keeps more of what they learnt; it costs download, never upload.
Cost: as HLoRA with twice the ranks; every client receives all directions of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import require_server_rank
from fedloom.aggregate.shared.product_space import fold_untrained, merge_changes, truncated_start
from fedloom.core.lora import Adapter, server_rank
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FoldedDelta:
    """The model plus the mean change of products, cut to `rank` on the server (None: the highest client rank).

    `balanced` divides singular values evenly over both factors of what a client trains.
    """

    rank: int | None = None
    balanced: bool = False
    space: ClassVar[Literal["product"]] = "product"
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {8: "a client of low rank votes for the server's value of the directions that it did not train"}
    )

    def __post_init__(self) -> None:
        require_server_rank(self.rank)

    def init(self, start: Adapter) -> Model:
        """The first global model is the start itself; it is re-factorised at the first merge."""
        return Model(start)

    def merge(self, model: Model, merge: Merge) -> Model:
        """W + step * sum p_k (B_k A_k - what k received), cut to the server's rank."""
        keep = self.rank or server_rank(model.adapter)
        return merge_changes(model, merge, keep)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """The leading directions to train, the others in the fold."""
        return replace(truncated_start(model, budget, seed, self.balanced), fold=fold_untrained(model, range(budget.rank)))
