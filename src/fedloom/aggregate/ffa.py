"""FFA-LoRA: `down` stays what it was at the start, only `up` is trained and averaged.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313, 2024 (A fixed at the shared
random initialisation, B = sum p_k B_k). Exact, because sum p_k B_k A = (sum p_k B_k) A; half the traffic, and noise for
privacy is not multiplied by itself. The paper has one rank for all: a client of lower rank votes here for the server's value
of the columns that it does not hold. Cost: one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fedloom.aggregate.shared.factor_space import leading_start, move_models
from fedloom.aggregate.shared.merge_terms import VOTES_SERVER_VALUE, first_model
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, Rules, TaskStart


@dataclass(frozen=True, slots=True)
class FFA:
    """B = sum p_k B_k at a frozen, seeded A."""

    space: ClassVar[Literal["factor"]] = "factor"
    plain_mean: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = VOTES_SERVER_VALUE
    init = staticmethod(first_model)  # its `down` is never changed

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average `up`, entry by entry."""
        return replace(model, adapter=move_models(model, merge))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the first directions, to be trained on the side of `up` alone."""
        return replace(leading_start(model, budget), seeded=("down",), rules=Rules(frozen=("down",)))
