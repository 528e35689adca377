"""Momentum: the server goes on in the direction of earlier merges.

Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", arXiv
1909.06335, 2019 (FedAvgM): v <- beta v + change, w <- w + eta v. A basis that was redrawn starts with an empty memory. Cost:
one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.server_optimiser import model_change, require_decay, require_positive, take_step
from fedloom.aggregate.shared.wrapper import Wrapper, drop_memory, require_factors, trained_sides
from fedloom.core.lora import map_tensors, take_sides
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model

VELOCITY = "momentum"


@dataclass(frozen=True, slots=True)
class Momentum(Wrapper):
    """Server momentum around another method.

    Fields:
        inner: the wrapped method; it must add factors.
        beta: share of the velocity that is left at the next merge (at least 0, below 1).
        learning_rate: server learning rate.
    """

    inner: Aggregator = field(default_factory=FedIT)
    beta: float = 0.9
    learning_rate: float = 1.0
    after_merge: ClassVar[bool] = True
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {1: "momentum moves the model on although everybody agrees"}
    )

    def __post_init__(self) -> None:
        require_factors("Momentum", self.inner, "momentum is a sum of earlier changes, entry by entry")
        require_decay(self, "beta")
        require_positive(self, learning_rate="the server learning rate, a positive number")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Add the wrapped merge's change to the velocity, and the velocity to the model."""
        after = self.inner.merge(model, merge)
        if after.basis != model.basis:
            return drop_memory(after, VELOCITY)
        velocity = model_change(model, after)
        if VELOCITY in model.memory:
            grown = map_tensors(lambda v, d: self.beta * v + d, model.memory[VELOCITY], velocity)
            velocity = take_sides(trained_sides(merge), grown, model.memory[VELOCITY])
        step = map_tensors(lambda v: self.learning_rate * v, velocity)
        return take_step(model, after, merge, step, {VELOCITY: velocity})
