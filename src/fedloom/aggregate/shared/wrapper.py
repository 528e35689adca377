"""What wrappers share: `Wrapper`, an aggregator around another one (`inner`) that changes how answers are merged.

`Momentum(inner=FedIT())` is an aggregator like any other, so wrappers nest. Each checks at its construction whether it goes around
what it is given (`require_method`, `require_factors`), and raises Refused with the reason if not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar, Literal

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import Budget, Model, Side, TaskStart


def drop_memory(model: Model, *names: str) -> Model:
    """Return the model without these entries of its memory."""
    return replace(model, memory={name: entry for name, entry in model.memory.items() if name not in names})


def trained_sides(merge: Merge) -> frozenset[Side]:
    """Return the sides that some client of this merge was free to change."""
    unchanged = (update.task.start.rules.unchanged for _, update in merge.weighted_updates)
    every: frozenset[Side] = frozenset(("down", "up", "dense"))
    return every - frozenset[Side].intersection(*unchanged)


class Wrapper:
    """Base of wrappers: everything but `merge` is that of `inner`.

    Fields:
        inner: the wrapped aggregator.
        wrapper_exempt: laws that the wrapper itself breaks by design, by number, with the reason.
    """

    __slots__ = ()
    inner: Aggregator
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})

    @property
    def space(self) -> Literal["factor", "product"]:
        """Space of the wrapped method."""
        return self.inner.space

    @property
    def exempt(self) -> Mapping[int, str]:
        """Laws broken by the wrapped method and by the wrapper, by number, with the reason."""
        return {**self.inner.exempt, **self.wrapper_exempt}

    def init(self, start: Adapter) -> Model:
        """Return the first global model of the wrapped method."""
        return self.inner.init(start)

    def start(self, model: Model, budget: Budget, seed: int) -> TaskStart:
        """Return what the wrapped method hands out."""
        return self.inner.start(model, budget, seed)


def require_method(wrapper: str, inner: object) -> None:
    """Raise Refused where `inner` is no aggregator, or one that has to see the answers as they came."""
    if isinstance(inner, type) or not all(hasattr(inner, name) for name in ("space", "exempt", "merge", "start")):
        raise Refused(f"aggregator ({wrapper}).inner", inner, "wrap an aggregator, for instance FedIT()")
    if getattr(inner, "judges_answers", False):
        name = type(inner).__name__
        raise Refused(
            f"aggregator ({wrapper}).inner", name, f"{name} judges the answers as they came: {name}({wrapper}(...))"
        )


def require_factors(wrapper: str, inner: Aggregator, why: str) -> None:
    """Raise Refused where the wrapper is there already, or where entries of the adapter change their meaning at each merge.

    The second is so in "product" space: each merge rotates the factors. `why` says what the wrapper does entry by entry.
    """
    require_method(wrapper, inner)
    if any(type(layer).__name__ == wrapper for layer in aggregator_layers(inner)):
        raise Refused(f"aggregator ({wrapper}).inner", wrapper, "it is in this aggregator already; once is enough")
    if inner.space != "factor":
        name = type(inner).__name__
        remedy = f"{why}; the model of {name} is more than its factors, entry by entry. Use FedIT, FFA or another that adds factors"
        raise Refused(f"aggregator ({wrapper}).inner", name, remedy)
