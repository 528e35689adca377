"""FedSVD: `up` is trained at a frozen, orthonormal `down` that an SVD refreshes after every round.

Source: Lee et al., "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA", arXiv 2505.12805, 2025:
clients train B alone, the server averages (exactly, since A is shared), then A = V^T and B = U S of the SVD of B A. The rows
of A are orthonormal and sorted by what was learnt; while B A keeps its rank they span what they spanned at the start, as in
FFA-LoRA. The paper has one rank for all: lower ranks receive the leading directions, and change no others. Cost: as HLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedloom.aggregate.shared.merge_terms import VOTES_SERVER_VALUE, first_model
from fedloom.aggregate.shared.product_space import merge_changes, truncated_start
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, Rules, TaskStart


@dataclass(frozen=True, slots=True)
class FedSVD:
    """The mean change of B A over a shared A, re-orthogonalised: A = V^T, B = U S."""

    space: ClassVar[Literal["product"]] = "product"
    plain_mean: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = VOTES_SERVER_VALUE
    init = staticmethod(first_model)  # its random `down` serves the first round

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average the changes of products, then take the SVD; the rank stays the server's."""
        return merge_changes(model, merge)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the leading directions, to be trained on the side of `up` alone."""
        return replace(truncated_start(model, budget, seed, balanced=False), rules=Rules(frozen=("down",)))
