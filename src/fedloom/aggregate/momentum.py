"""Momentum: the server goes on in the direction of earlier merges.

Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", arXiv
1909.06335, 2019 (FedAvgM): v <- beta v + change, w <- w + eta v. A basis that was redrawn starts with an empty memory. Cost:
one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.wrapper import (
    Wrapper,
    drop_memory,
    model_change,
    require_factors,
    step_model,
    trained_sides,
)
from fedloom.core.errors import Refused
from fedloom.core.lora import map_tensors, take_sides
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model

VELOCITY = "momentum"


@dataclass(frozen=True, slots=True)
class Momentum(Wrapper):
    """`inner` with server momentum `beta` and server learning rate `learning_rate`."""

    inner: Aggregator = field(default_factory=FedIT)
    beta: float = 0.9
    learning_rate: float = 1.0
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType({1: "momentum moves the model on although everybody agrees"})

    def __post_init__(self) -> None:
        require_factors("Momentum", self.inner, "momentum is a sum of earlier changes, entry by entry")
        if not 0 <= self.beta < 1:
            raise Refused("aggregator.beta", self.beta, "at least 0 and below 1")
        if not self.learning_rate > 0:
            raise Refused("aggregator.learning_rate", self.learning_rate, "the server learning rate, a positive number")

    def merge(self, model: Model, merge: Merge) -> Model:
        """The wrapped merge's change goes into the velocity, the velocity into the model."""
        after = self.inner.merge(model, merge)
        if after.basis != model.basis:
            return drop_memory(after, VELOCITY)
        velocity = model_change(model, after)
        if VELOCITY in model.memory:
            grown = map_tensors(lambda v, d: self.beta * v + d, model.memory[VELOCITY], velocity)
            velocity = take_sides(trained_sides(merge), grown, model.memory[VELOCITY])
        moved = step_model(model, map_tensors(lambda v: self.learning_rate * v, velocity))
        adapter = take_sides(trained_sides(merge), moved, after.adapter)
        return replace(after, adapter=adapter, memory={**after.memory, VELOCITY: velocity})
