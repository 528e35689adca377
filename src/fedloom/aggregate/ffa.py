"""FFA-LoRA: `down` stays what it was at the start, only `up` is trained and averaged.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313, 2024 (A fixed at the shared
random initialisation, B = sum p_k B_k). Exact, because sum p_k B_k A = (sum p_k B_k) A; half the traffic, and noise for
privacy is not multiplied by itself. The paper has one rank for all: a client of lower rank votes here for the server's value
of the columns that it does not hold. Cost: one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.factor_space import leading_start, move_models
from fedloom.core.lora import Adapter
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, Rules, TaskStart


@dataclass(frozen=True, slots=True)
class FFA:
    """B = sum p_k B_k at a frozen, seeded A."""

    space: ClassVar[Literal["factor"]] = "factor"
    plain_mean: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {8: "a client of low rank votes for the server's value of the directions that it did not train"}
    )

    def init(self, start: Adapter) -> Model:
        """The first global model is the start itself; its `down` is never changed."""
        return Model(start)

    def merge(self, model: Model, merge: Merge) -> Model:
        """The mean of `up`, entry by entry."""
        return replace(model, adapter=move_models(model, merge))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """The first directions, to be trained on the side of `up` alone."""
        return replace(leading_start(model, budget), seeded=("down",), rules=Rules(frozen=("down",)))
