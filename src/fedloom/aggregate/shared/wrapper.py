"""What the wrappers share: an aggregator around another one, and arithmetic on whole adapters, entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, map_tensors
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import Budget, Model, Side, TaskStart


def euclidean_norm(adapter: Adapter) -> float:
    """Euclidean norm over all entries, in float64."""
    tensors = [tensor for factor in adapter.factors.values() for tensor in (factor.down, factor.up)]
    tensors += list(adapter.dense.values())
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm())


def model_change(before: Model, after: Model, step: float = 1.0) -> Adapter:
    """(after - before) / step, entry by entry, in float64."""
    return map_tensors(lambda a, b: (a.double() - b.double()) / step, after.adapter, before.adapter)


def blend(share: float, old: Adapter, new: Adapter) -> Adapter:
    """share old + (1 - share) new, entry by entry."""
    return map_tensors(lambda o, n: share * o + (1 - share) * n, old, new)


def step_model(model: Model, step: Adapter) -> Adapter:
    """The model's adapter moved by a float64 step, in its own dtype."""
    return map_tensors(lambda w, s: (w.double() + s).to(w.dtype), model.adapter, step)


def drop_memory(model: Model, *names: str) -> Model:
    """The model without these memories."""
    return replace(model, memory={name: kept for name, kept in model.memory.items() if name not in names})


def trained_sides(merge: Merge) -> frozenset[Side]:
    """Sides that some client of this merge was free to change."""
    kept = frozenset[Side].intersection(*(update.task.start.rules.unchanged for _, update in merge.weighted_updates))
    every: frozenset[Side] = frozenset(("down", "up", "dense"))
    return every - kept


class Wrapper:
    """A wrapper's common part: everything as `inner` has it, but for the merge. `own` are the laws that the wrapper breaks."""

    __slots__ = ()
    inner: Aggregator
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})

    @property
    def space(self) -> Literal["factor", "product"]:
        """As the wrapped method."""
        return self.inner.space

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws broken by the wrapped method and by the wrapper, with the reason."""
        return {**self.inner.exempt, **self.wrapper_exempt}

    def init(self, start: Adapter) -> Model:
        """As the wrapped method."""
        return self.inner.init(start)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """As the wrapped method."""
        return self.inner.start(model, budget, seed)


def require_method(wrapper: str, inner: object) -> None:
    """Raise Refused where there is no aggregator to wrap."""
    if isinstance(inner, type) or not all(hasattr(inner, name) for name in ("space", "exempt", "merge", "start")):
        raise Refused(f"aggregator ({wrapper}).inner", inner, "wrap an aggregator, for instance FedIT()")


def require_factors(wrapper: str, inner: Aggregator, why: str) -> None:
    """Raise Refused where an entry of the adapter means something else after each merge, or the wrapper is there already."""
    require_method(wrapper, inner)
    if any(type(layer).__name__ == wrapper for layer in aggregator_layers(inner)):
        raise Refused(f"aggregator ({wrapper}).inner", wrapper, "it is in this aggregator already; once is enough")
    if inner.space != "factor":
        name = type(inner).__name__
        remedy = f"{why}; the model of {name} is more than its factors, entry by entry. Use FedIT, FFA or another that adds factors"
        raise Refused(f"aggregator ({wrapper}).inner", name, remedy)
