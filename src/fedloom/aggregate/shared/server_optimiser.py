"""What server optimisers share (`Momentum`, `Adam`, `FADAS`): the change that a merge made, and a step of another size in its place.

Such a wrapper lets the wrapped method merge, takes the difference to the model before as a gradient, and moves the model by what its
optimiser makes of it. That is arithmetic on whole adapters, entry by entry, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from fedloom.aggregate.shared.wrapper import trained_sides
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, map_tensors, take_sides
from fedloom.core.policies import Merge
from fedloom.core.types import Model

EQUAL_STEPS: Mapping[int, str] = MappingProxyType(
    {
        1: "entries move by the server's step, not by the clients' change",
        2: "as law 1: the mean is only a direction",
        8: "an entry moves by the same step, however few trained it",
    }
)
"""Exemptions of optimisers that divide a change by its size (the Adam family)."""


def require_positive(policy: object, **remedies: str) -> None:
    """Raise Refused with the field's remedy where one of these fields is not a positive number."""
    for name, remedy in remedies.items():
        if not getattr(policy, name) > 0:
            raise Refused(f"aggregator.{name}", getattr(policy, name), remedy)


def require_decay(policy: object, *names: str) -> None:
    """Raise Refused where one of these decay rates is not in [0, 1)."""
    for name in names:
        if not 0 <= getattr(policy, name) < 1:
            raise Refused(f"aggregator.{name}", getattr(policy, name), "at least 0 and below 1")


def model_change(before: Model, after: Model, step: float = 1.0) -> Adapter:
    """Return (after - before) / step, entry by entry, in float64."""
    return map_tensors(lambda a, b: (a.double() - b.double()) / step, after.adapter, before.adapter)


def blend(share: float, old: Adapter, new: Adapter) -> Adapter:
    """Return share * old + (1 - share) * new, entry by entry."""
    return map_tensors(lambda o, n: share * o + (1 - share) * n, old, new)


def take_step(before: Model, after: Model, merge: Merge, step: Adapter, memory: Mapping[str, Adapter]) -> Model:
    """Return `after` with the step from `before` in the place of the merge's, on the trained sides, and this memory."""
    moved = map_tensors(lambda w, s: (w.double() + s).to(w.dtype), before.adapter, step)
    adapter = take_sides(trained_sides(merge), moved, after.adapter)
    return replace(after, adapter=adapter, memory={**after.memory, **memory})
