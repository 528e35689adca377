"""What the wrappers share: an aggregator around another one, and arithmetic on whole adapters, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedloom.errors import Refused
from fedloom.lora import Adapter, Factor
from fedloom.types import Aggregator, Merge, Model, Side


def each(rule: Callable[..., Tensor], *adapters: Adapter) -> Adapter:
    """`rule` on every tensor of adapters of one shape."""
    first = adapters[0]
    factors = {
        name: Factor(
            rule(*(adapter.factors[name].down for adapter in adapters)),
            rule(*(adapter.factors[name].up for adapter in adapters)),
        )
        for name in first.factors
    }
    dense = {name: rule(*(adapter.dense[name] for adapter in adapters)) for name in first.dense}
    return Adapter(factors, dense)


def size(adapter: Adapter) -> float:
    """Euclidean norm over all entries, in float64."""
    tensors = [tensor for factor in adapter.factors.values() for tensor in (factor.down, factor.up)]
    tensors += list(adapter.dense.values())
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm())


def change(before: Model, after: Model) -> Adapter:
    """after - before, entry by entry, in float64."""
    return each(lambda a, b: a.double() - b.double(), after.adapter, before.adapter)


def trained(merge: Merge) -> frozenset[Side]:
    """Sides that some client of this merge was free to change."""
    kept = frozenset[Side].intersection(*(update.task.start.rules.kept for _, update in merge.parts))
    every: frozenset[Side] = frozenset(("down", "up", "dense"))
    return every - kept


def only(sides: frozenset[Side], new: Adapter, old: Adapter) -> Adapter:
    """`new` on these sides, `old` on the others."""
    factors = {
        name: Factor(
            new.factors[name].down if "down" in sides else factor.down,
            new.factors[name].up if "up" in sides else factor.up,
        )
        for name, factor in old.factors.items()
    }
    return Adapter(factors, new.dense if "dense" in sides else old.dense)


def need_factors(wrapper: str, inner: Aggregator, why: str) -> None:
    """Raise Refused where an entry of the adapter means something else after each merge, or the wrapper is there already."""
    layer: object = inner
    while layer is not None:
        if type(layer).__name__ == wrapper:
            raise Refused(f"aggregator ({wrapper}).inner", wrapper, "it is in this aggregator already; once is enough")
        layer = getattr(layer, "inner", None)
    if inner.space != "factor":
        name = type(inner).__name__
        remedy = f"{why}; {name} adds products and turns their basis at every merge. Use FedIT, FFA or another that adds factors"
        raise Refused(f"aggregator ({wrapper}).inner", name, remedy)


def more(inner: Aggregator, own: Mapping[int, str]) -> Mapping[int, str]:
    """The laws that the wrapped method breaks, and those that the wrapper breaks."""
    return {**inner.exempt, **own}
