"""HLoRA: products are averaged exactly and re-factorised to each client's rank.

Source: Liu et al., "HLoRA: Efficient Federated Learning System for LLM Heterogeneous Fine-Tuning", arXiv 2503.00813, 2025
(the rule: W = sum p_k B_k A_k, then a truncated SVD); the same aggregation as FlexLoRA, arXiv 2402.11505. Details follow the
public prototype, as far as it is known: down = V^T orthonormal, up = U S; the client receives the leading directions.
Cost: one decomposition per layer for all ranks, O((d_in + d_out) R^2) with R the sum of ranks, or less; see `core.truncated_svd`.

Known weakness: rank collapse (arXiv 2602.13486). A client of rank r hands back only its r leading directions, so each merge
multiplies direction i by the weight of clients with rank >= i, and energy drains into the smallest shared rank. `RaFLoRA`
and `ProductDelta` fix it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import MEANS_OF_FACTORS, divide_by_one, first_model, require_server_rank
from fedloom.aggregate.shared.product_space import merge_products, truncated_start
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, scale_product, server_rank
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart, Update


@dataclass(frozen=True, slots=True)
class HLoRA:
    """Mean of products, truncated to the server's rank.

    Fields:
        rank: rank that the server keeps (None: the highest client rank).
        published_alpha: turns on the prototype's scaling, to reproduce the paper (None: the right scaling). Alpha stays fixed while
            the rank changes: a client of rank r runs (alpha/r) B A, but the server averages the unscaled B A.
        balanced: whether singular values are divided evenly over both factors; False leaves them to `up`, as the prototype does.
    """

    rank: int | None = None
    published_alpha: float | None = None
    balanced: bool = False
    space: ClassVar[Literal["product"]] = "product"
    summed_by_factors: ClassVar[str] = MEANS_OF_FACTORS
    init = staticmethod(first_model)

    def __post_init__(self) -> None:
        require_server_rank(self.rank)
        if self.published_alpha is not None and self.published_alpha <= 0:
            raise Refused("aggregator.published_alpha", self.published_alpha, "alpha is positive; the prototype has 16")

    @property
    def plain_mean(self) -> bool:
        """Whether products are added with the schedule's weights; the prototype's scaling adds a factor by rank."""
        return self.published_alpha is None

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws broken by design, by number, with the reason."""
        collapse = {5: "rank-agnostic weights drain energy into the smallest shared rank (arXiv 2602.13486)"}
        published_scaling = {
            1: "the factors are averaged without the scaling that made them a function",
            2: "as law 1: a rank other than the server's is rescaled",
            4: "alpha/r with fixed alpha: one adapter is a different function at each rank",
        }
        return {**collapse, 8: "a client of low rank counts as zero in the directions that it did not train"} | (
            published_scaling if self.published_alpha is not None else {}
        )

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return sum p_k B_k A_k over the participants, cut to the server's rank."""
        top = self.rank or server_rank(model.adapter)
        if self.published_alpha is not None:
            merge = merge.map_updates(lambda update: _rescaled(update, top))
        return merge_products(model, merge, top, divide_by_one)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the leading directions at the client's rank."""
        start = truncated_start(model, budget, seed, self.balanced)
        if self.published_alpha is None:
            return start
        grown = _scaled(start.train, (self.rank or server_rank(model.adapter)) / budget.rank)
        return TaskStart(grown, start.basis, scaling=self.published_alpha / budget.rank)


def _scaled(adapter: Adapter, by: float) -> Adapter:
    return Adapter({name: scale_product(factor, by) for name, factor in adapter.factors.items()}, adapter.dense)


def _rescaled(update: Update, top: int) -> Update:
    """The update as the prototype's server sees it: the factors without the client's alpha/r, under the server's alpha/top."""
    by = update.task.budget.rank / top
    started = replace(update.task.start, train=_scaled(update.task.start.train, by))
    task = replace(update.task, start=started)
    return Update(task, replace(update.result, adapter=_scaled(update.result.adapter, by)))
