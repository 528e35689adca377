"""Changes of products are averaged, and every client starts from the whole model: what it cannot train is folded into its base.

Source: our own combination. Fed-PLoRA (arXiv 2602.16936, 2026) folds the modules that a client does not train instead of dropping
them; here the modules are the singular directions of the server's model, so that a client of rank r trains the r that carry most
of it, and the rest runs as a part of its base. What it returns is a change of the very function that the server has:
W + sum p_k (B_k A_k - what k received), the mean that FedAvg takes, with no bias at any mixture of ranks and no truncation on the
way down. `rank` above the clients' keeps more of what they learnt; it costs download, never upload.
Cost: as `ProductDelta`; every client receives all directions of the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import MEANS_OF_FACTORS, VOTES_SERVER_VALUE, first_model, require_server_rank
from fedloom.aggregate.shared.product_space import fold_untrained, merge_changes, truncated_start
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FoldedDelta:
    """The model plus the mean change of products; each client starts from the whole model.

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
        """Hand out the leading directions to train, with the others in the fold."""
        start = truncated_start(model, budget, seed, self.balanced)
        return replace(start, fold=fold_untrained(model, range(budget.rank)))
