"""FedSA-LoRA: `down` is shared, `up` and the head stay at each client.

Source: Guo et al., "Selective Aggregation for Low-Rank Adaptation in Federated Learning", arXiv 2410.01463, 2024: train A and
B, share only A = sum p_k A_k; the official code keeps the classifier local too. The result is one model per client: judge it by
the clients' own scores, the server alone has no `up`. The paper has one rank for all: each row is averaged here over those
who hold it. Cost: one pass over `down`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.aggregate.shared.factor_space import leading_start, move_factors
from fedloom.aggregate.shared.merge_terms import first_model, holder_weights
from fedloom.core.policies import Merge
from fedloom.core.types import Budget, Model, Rules, TaskStart


@dataclass(frozen=True, slots=True)
class FedSA:
    """A = sum p_k A_k; B_k and the head of client k are never sent."""

    space: ClassVar[Literal["factor"]] = "factor"
    personal: ClassVar[str] = (
        "its clients keep `up` and the head, so that what the server has of them was never trained"
    )
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            1: "the server never sees what a client trained on the side of `up`",
            2: "as law 1: there is no global product",
        }
    )
    init = staticmethod(first_model)  # its `up` and head only start the clients

    def merge(self, model: Model, merge: Merge) -> Model:
        """Average `down`, row by row over those who hold it."""
        return replace(model, adapter=move_factors(model.adapter, merge, holder_weights))

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Hand out the shared rows; the client adds its own `up` and head, which begin as the run's seed says."""
        return replace(leading_start(model, budget), seeded=("up", "dense"), rules=Rules(private=("up", "dense")))
