"""Adam on the server: every entry moves by about the same step, whatever the size of the clients' changes.

Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, 2021, Alg. 2 (FedAdam): m <- b1 m + (1 - b1)
change, v <- b2 v + (1 - b2) change^2, w <- w + eta m / (sqrt(v) + tau), where v is tau^2 at first. The schedule's step is a part
of eta, not of the change: m / sqrt(v) would cancel it, and a stale answer count as much as a fresh one. A basis that was redrawn
starts with an empty memory. Cost: one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.wrapper import (
    Wrapper,
    blend,
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

MEAN, SQUARE = "adam mean", "adam square"


@dataclass(frozen=True, slots=True)
class Adam(Wrapper):
    """`inner` with the server's Adam; `tau` bounds the step where changes are tiny."""

    inner: Aggregator = field(default_factory=FedIT)
    learning_rate: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            1: "entries move by the server's step, not by the clients' change",
            2: "as law 1: the mean is only a direction",
            8: "an entry moves by the same step, however few trained it",
        }
    )

    def __post_init__(self) -> None:
        require_factors("Adam", self.inner, "Adam keeps a mean and a square of each entry's changes")
        if not self.learning_rate > 0:
            raise Refused("aggregator.learning_rate", self.learning_rate, "the server learning rate, a positive number")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise Refused(f"aggregator.{name}", getattr(self, name), "at least 0 and below 1")
        if not self.tau > 0:
            raise Refused("aggregator.tau", self.tau, "a small positive number; 1e-3 is usual")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Mean and square of the wrapped merge's change decide how far each entry moves."""
        after = self.inner.merge(model, merge)
        if after.basis != model.basis:
            return drop_memory(after, MEAN, SQUARE)
        moved, sides, rate = model_change(model, after, merge.step), trained_sides(merge), merge.step * self.learning_rate
        mean = model.memory.get(MEAN) or map_tensors(torch.zeros_like, moved)
        square = model.memory.get(SQUARE) or map_tensors(lambda d: torch.full_like(d, self.tau**2), moved)
        mean = take_sides(sides, blend(self.beta1, mean, moved), mean)
        square = take_sides(sides, map_tensors(lambda s, d: self.beta2 * s + (1 - self.beta2) * d * d, square, moved), square)
        step = map_tensors(lambda m, s: rate * m / (s.sqrt() + self.tau), mean, square)
        adapter = take_sides(sides, step_model(model, step), after.adapter)
        return replace(after, adapter=adapter, memory={**after.memory, MEAN: mean, SQUARE: square})
