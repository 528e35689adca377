"""Clip: a client's change counts up to a largest norm, so that no client can pull the model away alone.

Source: McMahan et al., "Learning Differentially Private Recurrent Language Models", arXiv 1710.06963, 2018 (flat clipping):
what a client changed is multiplied by min(1, S / |change|), the norm over all factors and the head together, in the
coordinates of what the client received. That has a meaning in any space, so any method can be wrapped. Cost: one pass over
the updates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.shared.wrapper import Wrapper, require_method
from fedloom.core.answer_change import euclidean_norm, factor_change, with_change
from fedloom.core.errors import Refused
from fedloom.core.lora import map_tensors
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.types import Model, Update


@dataclass(frozen=True, slots=True)
class Clip(Wrapper):
    """Another method, on changes of at most a given norm.

    Fields:
        inner: the wrapped method, any.
        norm: largest Euclidean norm of a client's change, over all factors and the head together (S).
    """

    inner: Aggregator = field(default_factory=FedIT)
    norm: float = 1.0
    not_summed: ClassVar[str] = "it shortens single answers, and a sum tells of none"
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            1: "a change above the norm is shortened",
            2: "as law 1: what is averaged is not what was trained",
        }
    )

    def __post_init__(self) -> None:
        require_method("Clip", self.inner)
        if not self.norm > 0:
            raise Refused("aggregator.norm", self.norm, "the largest norm of a client's change, a positive number")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Return the wrapped merge of shortened answers."""
        return self.inner.merge(model, merge.map_updates(lambda update: clip_update(update, self.norm)))


def clip_update(update: Update, norm: float) -> Update:
    """Return the update with its change shortened to `norm`, if it is longer."""
    start, answer = update.task.start, update.result.adapter
    change = factor_change(start, answer)
    length = euclidean_norm(change)
    if length <= norm:
        return update
    shorter = with_change(start, answer, map_tensors(lambda one: one * (norm / length), change))
    return replace(update, result=replace(update.result, adapter=shorter))
