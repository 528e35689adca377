"""FlexLoRA: the mean of products is kept whole on the server; each client receives its best approximation.

Source: Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", arXiv
2402.11505, 2024: W = sum p_k s B_k A_k with the clients' own scaling, U S V^T = svd(W), A = V^T[:r_k], B = U[:, :r_k]
S[:r_k]. The same sum as HLoRA; it differs in the model that is evaluated and kept, the full W, where HLoRA's server has the
highest client rank. The directions beyond that rank are nobody's to train, and live in the fold of the server's model. Cost:
as HLoRA, and a second stack.

With `energy` each layer's sum is cut as in FLoRIST (Ramesh and Dass, arXiv 2506.09199, 2025): to the fewest directions p with
sum_{i <= p} sigma_i^2 >= energy sum_i sigma_i^2. FLoRIST hands these p out to all clients; here a client receives those of its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import MEANS_OF_FACTORS, divide_by_one, first_model
from fedloom.aggregate.shared.product_space import merge_products, split_at_rank, truncated_start
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, compact_with_fold, cut_factor, server_rank
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, TaskStart


@dataclass(frozen=True, slots=True)
class FlexLoRA:
    """Mean of products at any rank; the clients' directions in the adapter, the rest in a fold that is not sent.

    Fields:
        energy: share of each layer's energy (squared singular values) that the server keeps, in as few directions as reach it
            (above 0, at most 1; None: all of it, as FlexLoRA).
    """

    energy: float | None = None
    space: ClassVar[Literal["product"]] = "product"
    summed_by_factors: ClassVar[str] = MEANS_OF_FACTORS
    has_fold: ClassVar[bool] = True
    init = staticmethod(first_model)

    def __post_init__(self) -> None:
        if self.energy is not None and not 0 < self.energy <= 1:
            raise Refused(
                "aggregator.energy", self.energy, "a share above 0 and at most 1, for instance 0.9; None keeps all"
            )

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws broken by design, by number, with the reason."""
        cut = {1: "directions of little energy are cut off at each merge", 2: "as law 1: the sum is cut"}
        return {
            5: "rank-agnostic weights drain energy into the smallest shared rank, as in HLoRA",
            8: "a client of low rank counts as zero in the directions that it did not train",
        } | (cut if self.energy is not None else {})

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return W = sum p_k B_k A_k: the first directions in the adapter, for clients, the others in the fold."""
        rank = server_rank(model.adapter)
        before = replace(model, adapter=compact_with_fold(model.adapter, model.fold))
        after = merge_products(before, merge, max(rank, _directions(before.adapter, merge)), divide_by_one)
        factors, discarded = after.adapter.factors, after.discarded
        if self.energy is not None:
            cuts = {name: _leading_energy(factor, self.energy) for name, factor in factors.items()}
            factors = {name: cut for name, (cut, _, _) in cuts.items()}
            total, lost = (
                sum(energies) for energies in zip(*((whole, off) for _, whole, off in cuts.values()), strict=True)
            )
            discarded = lost / total if merge.measured and total > 0 else after.discarded
        first, rest = split_at_rank(factors, rank)
        return replace(after, adapter=Adapter(first, after.adapter.dense), fold=rest, discarded=discarded)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the best approximation of W at the client's rank."""
        return truncated_start(model, budget, seed, balanced=False)


def _leading_energy(factor: Factor, share: float) -> tuple[Factor, float, float]:
    """Return the fewest leading directions of a sorted factor that hold this share of its energy, its energy, and what is cut off."""
    energies = factor.up.double().square().sum(0)
    reached = energies.cumsum(0)
    total = float(reached[-1])
    count = min(factor.rank, 1 + int((reached < share * total).sum()))
    return cut_factor(factor, count), total, total - float(reached[count - 1])


def _directions(model: Adapter, merge: Merge) -> int:
    """Return how many directions the sum of products can have: those that are added up, but no more than a layer has room for."""
    room = max(min(factor.up.shape[0], factor.down.shape[1]) for factor in model.factors.values())
    added = sum(server_rank(update.result.adapter) for _, update in merge.weighted_updates)
    if merge.as_delta:
        added += sum(server_rank(update.task.start.train) for _, update in merge.weighted_updates)
    return min(room, added + (server_rank(model) if merge.as_delta or merge.step < 1.0 else 0))
