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
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

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

MEAN, SQUARE, LARGEST, TIMES = "fadas mean", "fadas square", "fadas largest square", "fadas merges"


@dataclass(frozen=True, slots=True)
class FADAS(Wrapper):
    """`inner` with the server's AMSGrad; no entry moves by much more than `learning_rate` times the schedule's step."""

    inner: Aggregator = field(default_factory=FedIT)
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            1: "entries move by the server's step, not by the clients' change",
            2: "as law 1: the mean is only a direction",
            8: "an entry moves by the same step, however few trained it",
        }
    )

    def __post_init__(self) -> None:
        require_factors("FADAS", self.inner, "AMSGrad keeps a mean and a square of each entry's changes")
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise Refused(
                    f"aggregator.{name}", getattr(self, name), "a positive number; the paper has 1e-3 and 1e-8"
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise Refused(f"aggregator.{name}", getattr(self, name), "at least 0 and below 1")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Mean and largest square of the changes decide how far each entry moves."""
        after, sides = self.inner.merge(model, merge), trained_sides(merge)
        if after.basis != model.basis:
            return drop_memory(after, MEAN, SQUARE, LARGEST, TIMES)
        moved = model_change(model, after, merge.step)
        empty = map_tensors(torch.zeros_like, moved)
        mean, square, largest = (model.memory.get(name, empty) for name in (MEAN, SQUARE, LARGEST))
        times = model.memory.get(TIMES) or map_tensors(lambda d: d.new_zeros((1,) * d.dim()), moved)
        mean = take_sides(sides, blend(self.beta1, mean, moved), mean)
        square = take_sides(sides, blend(self.beta2, square, map_tensors(torch.square, moved)), square)
        largest = take_sides(sides, map_tensors(torch.maximum, largest, square), largest)
        times = take_sides(sides, map_tensors(lambda t: t + 1, times), times)
        step = map_tensors(lambda m, v, t: merge.step * self._step(m, v, t.clamp_min(1.0)), mean, largest, times)
        kept = {MEAN: mean, SQUARE: square, LARGEST: largest, TIMES: times}
        return replace(after, adapter=take_sides(sides, step_model(model, step), after.adapter), memory={**after.memory, **kept})

    def _step(self, mean: Tensor, largest: Tensor, times: Tensor) -> Tensor:
        """eta (m / (1 - b1^t)) / (sqrt(vhat / (1 - b2^t)) + eps)."""
        length = (largest / (1 - self.beta2**times)).sqrt() + self.epsilon
        return self.learning_rate * mean / (1 - self.beta1**times) / length
