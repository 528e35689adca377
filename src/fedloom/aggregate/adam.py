"""Adam on the server: every entry moves by about the same step, whatever the size of the clients' changes.

Source: Reddi et al., "Adaptive Federated Optimization", arXiv 2003.00295, 2021, Alg. 2 (FedAdam): m <- b1 m + (1 - b1)
change, v <- b2 v + (1 - b2) change^2, w <- w + eta m / (sqrt(v) + tau), where v is tau^2 at first. The schedule's step is a part
of eta, not of the change: m / sqrt(v) would cancel it, and a stale answer count as much as a fresh one. A basis that was redrawn
starts with an empty memory. Cost: one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.server_optimiser import (
    EQUAL_STEPS,
    blend,
    model_change,
    require_decay,
    require_positive,
    take_step,
)
from fedloom.aggregate.shared.wrapper import Wrapper, drop_memory, require_factors, trained_sides
from fedloom.core.lora import map_tensors, take_sides
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model

MEAN, SQUARE = "adam mean", "adam square"


@dataclass(frozen=True, slots=True)
class Adam(Wrapper):
    """The server's Adam around another method.

    Fields:
        inner: the wrapped method; it must add factors.
        learning_rate: server learning rate; the schedule's step multiplies it.
        beta1: decay of the mean of changes (at least 0, below 1).
        beta2: decay of the mean of their squares (at least 0, below 1).
        tau: bound of the step where changes are tiny.
    """

    inner: Aggregator = field(default_factory=FedIT)
    learning_rate: float = 5e-3
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    after_merge: ClassVar[bool] = True
    wrapper_exempt: ClassVar[Mapping[int, str]] = EQUAL_STEPS

    def __post_init__(self) -> None:
        require_factors("Adam", self.inner, "Adam keeps a mean and a square of each entry's changes")
        require_positive(self, learning_rate="the server learning rate, a positive number")
        require_decay(self, "beta1", "beta2")
        require_positive(self, tau="a small positive number; 1e-3 is usual")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Move each entry by learning_rate * mean / (sqrt(square) + tau) of the wrapped merge's changes."""
        after, sides, rate = self.inner.merge(model, merge), trained_sides(merge), merge.step * self.learning_rate
        if after.basis != model.basis:
            return drop_memory(after, MEAN, SQUARE)
        change = model_change(model, after, merge.step)
        mean = model.memory.get(MEAN) or map_tensors(torch.zeros_like, change)
        square = model.memory.get(SQUARE) or map_tensors(lambda d: torch.full_like(d, self.tau**2), change)
        mean = take_sides(sides, blend(self.beta1, mean, change), mean)
        grown = map_tensors(lambda s, d: self.beta2 * s + (1 - self.beta2) * d * d, square, change)
        square = take_sides(sides, grown, square)
        step = map_tensors(lambda m, s: rate * m / (s.sqrt() + self.tau), mean, square)
        return take_step(model, after, merge, step, {MEAN: mean, SQUARE: square})
