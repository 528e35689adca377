"""RoLoRA: the two factors are trained and averaged in turn, so that every round is exact.

Source: Chen et al., "RoLoRA: Fine-Tuning Large Language Models with Robust Federated LoRA", arXiv 2409.02346, 2024: in odd
rounds A is frozen and B = sum p_k B_k, in even rounds B is frozen and A = sum p_k A_k. With the other side shared, the mean
of one side is the mean of products. An answer to an earlier round moves the side that it trained. The paper has one rank for
all: a client of lower rank votes here for the server's value of what it does not hold. Cost: one pass over the parameters.
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
class RoLoRA:
    """B = sum p_k B_k and A = sum p_k A_k in alternate rounds, B first (it starts at zero)."""

    space: ClassVar[Literal["factor"]] = "factor"
    plain_mean: ClassVar[bool] = True
    exempt: ClassVar[Mapping[int, str]] = VOTES_SERVER_VALUE
    init = staticmethod(first_model)

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average the side that was trained; then it is the other one's turn."""
        return replace(model, adapter=move_models(model, merge), phase=model.phase + 1)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the first directions, one side of them frozen."""
        rules = Rules(frozen=("up",) if model.phase % 2 else ("down",))
        start = leading_start(model, budget)
        return replace(start, basis=f"{start.basis}/{model.phase}", rules=rules)
