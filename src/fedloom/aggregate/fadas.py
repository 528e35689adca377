"""FADAS: AMSGrad on the server, made for stale answers.

Source: Wang et al., "FADAS: Towards Federated Adaptive Asynchronous Optimization", arXiv 2407.18365, ICML 2024, Alg. 1 and the
official code: m <- b1 m + (1 - b1) D, v <- b2 v + (1 - b2) D^2, vhat <- max(vhat, v), and at the t-th merge
w <- w + eta_t (m / (1 - b1^t)) / (sqrt(vhat / (1 - b2^t)) + eps), where D is the mean change. The paper's eta_t, divided by the
largest staleness in the buffer, is that of `FedBuff(delay_threshold=1, discount=Constant())`: all that the schedule means by a step
is a part of eta_t, and D is the wrapped merge's change divided by it.

A side that nobody trained rests, with its memory and its t. A basis that was redrawn starts with an empty memory. In a merge
of models D is the mean of models less the server's: the same where all started from that. Cost: one pass over the parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

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

MEAN, SQUARE, LARGEST, TIMES = "fadas mean", "fadas square", "fadas largest square", "fadas merges"


@dataclass(frozen=True, slots=True)
class FADAS(Wrapper):
    """The server's AMSGrad around another method; no entry moves by much more than `learning_rate` times the schedule's step.

    Fields:
        inner: the wrapped method; it must add factors.
        learning_rate: server learning rate; the schedule's step multiplies it.
        beta1: decay of the mean of changes (at least 0, below 1).
        beta2: decay of the mean of their squares (at least 0, below 1).
        epsilon: added to the root of the largest square, so that nothing is divided by zero.
    """

    inner: Aggregator = field(default_factory=FedIT)
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    after_merge: ClassVar[bool] = True
    wrapper_exempt: ClassVar[Mapping[int, str]] = EQUAL_STEPS

    def __post_init__(self) -> None:
        require_factors("FADAS", self.inner, "AMSGrad keeps a mean and a square of each entry's changes")
        remedy = "a positive number; the paper has 1e-3 and 1e-8"
        require_positive(self, learning_rate=remedy, epsilon=remedy)
        require_decay(self, "beta1", "beta2")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Move each entry by what the mean and the largest square of the wrapped merge's changes say."""
        after, sides = self.inner.merge(model, merge), trained_sides(merge)
        if after.basis != model.basis:
            return drop_memory(after, MEAN, SQUARE, LARGEST, TIMES)
        change = model_change(model, after, merge.step)
        empty = map_tensors(torch.zeros_like, change)
        mean, square, largest = (model.memory.get(name, empty) for name in (MEAN, SQUARE, LARGEST))
        times = model.memory.get(TIMES) or map_tensors(lambda d: d.new_zeros((1,) * d.dim()), change)
        mean = take_sides(sides, blend(self.beta1, mean, change), mean)
        square = take_sides(sides, blend(self.beta2, square, map_tensors(torch.square, change)), square)
        largest = take_sides(sides, map_tensors(torch.maximum, largest, square), largest)
        times = take_sides(sides, map_tensors(lambda t: t + 1, times), times)
        step = map_tensors(lambda m, v, t: merge.step * self._step(m, v, t.clamp_min(1.0)), mean, largest, times)
        return take_step(model, after, merge, step, {MEAN: mean, SQUARE: square, LARGEST: largest, TIMES: times})

    def _step(self, mean: Tensor, largest: Tensor, times: Tensor) -> Tensor:
        """Return eta (m / (1 - b1^t)) / (sqrt(vhat / (1 - b2^t)) + eps)."""
        length = (largest / (1 - self.beta2**times)).sqrt() + self.epsilon
        return self.learning_rate * mean / (1 - self.beta1**times) / length
