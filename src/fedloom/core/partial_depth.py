"""Depth: what a client that trains the top layers alone is sent, and how answers that hold different layers are merged.

Source: HierFedLoRA, arXiv 2503.21213, 2025: a client of depth d trains the d layers next to the output; each layer is averaged over
those who trained it, and one that nobody trained keeps its value. Aggregators and schedules know nothing of it: a method merges the
layers that the same answers hold as if there were no others. So whatever a method reckons over layers (HetLoRA's norms, Clip's bound)
it reckons over these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, product_norm, stack
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import Budget, Model, Rules, TaskStart, Update

LayerClass = tuple[tuple[int, ...], tuple[str, ...]]
"""The numbers of the parts that hold some layers, and these layers."""

A = TypeVar("A", Adapter, Adapter | None)


def require_all_layers(aggregator: Aggregator, rules: Rules) -> None:
    """Raise Refused where a method needs every client to train every layer; `rules` are those that it hands out."""
    if rules.private:
        name, remedy = (
            type(aggregator).__name__,
            "its clients keep a side of each layer, which the server has no base of",
        )
        raise Refused("plan.depth", name, f"{remedy}; leave plan.depth out, or use a method that shares all it trains")
    for layer in aggregator_layers(aggregator):
        why = "it divides a layer's changes by all clients, also by those who never train it"
        if getattr(layer, "adds_noise", False):
            why = "its noise is made for one mean of all layers, not for a mean of each"
        elif not getattr(layer, "remembers_changes", False):
            continue
        raise Refused("plan.depth", type(layer).__name__, f"{why}; leave plan.depth or the wrapper out")


def start_at_depth(aggregator: Aggregator, model: Model, budget: Budget, seed: int, below: Collection[str]) -> TaskStart:
    """What a client receives that does not train the layers `below`.

    The model of an edge may lack layers that its own task has in the fold: these run at its members too.
    """
    start, outside = fold_layers(aggregator.start(model, budget, seed), below), _outside(model)
    known = start.fold.factors if start.fold else {}
    return start if outside.keys() <= known.keys() else replace(start, fold=Adapter({**outside, **known}))


def fold_layers(start: TaskStart, names: Collection[str]) -> TaskStart:
    """The start of a client that does not train these layers: they run as a part of its base.

    Directions that add nothing (a LoRA at its beginning) are not sent. Directions to select are so many fewer as layers are.
    """
    if not names:
        return start
    fold = dict(start.fold.factors) if start.fold else {}
    below = {name: _alive(factor) for name, factor in start.train.factors.items() if name in names}
    for name, factor in below.items():
        if factor.rank:
            fold[name] = stack([(1.0, fold[name]), (1.0, factor)]) if name in fold else factor
    select, left = start.rules.select, len(start.train.factors) - len(below)
    if select is not None:
        select = max(1, select * left // len(start.train.factors))
    return replace(
        start,
        train=_without(start.train, names),
        fold=Adapter(fold) if any(factor.rank for factor in below.values()) else start.fold,
        control=start.control and _without(start.control, names),
        rules=replace(start.rules, select=select),
    )


def merge_by_layer(aggregator: Aggregator, model: Model, merge: Merge) -> Model:
    """The next model, each layer merged of those parts that hold it, their weights made to sum to 1.

    Layers of the same parts, of which a wrapper remembers the same, are merged together. Dense tensors go with the last layer in
    the model's order, which every part must hold.
    """
    count = len(model.adapter.factors)
    whole = all(len(update.result.adapter.factors) == count for _, update in merge.weighted_updates)
    if whole and not _outside(model) and all(len(entry.factors) in (0, count) for entry in model.memory.values()):
        return aggregator.merge(model, merge)
    order = [*model.adapter.factors]
    pieces, top, folded = list[Model](), 0, False
    for held, names in layer_classes(model, merge):
        own = _Cut(frozenset(names), dense=order[-1] in names)
        piece = own.model(model)
        after = aggregator.merge(piece, own.merge(merge, held)) if held else replace(piece, discarded=0.0)
        top, folded = len(pieces) if own.dense else top, folded or after.fold is not piece.fold
        pieces.append(after)
    fold = _laid(
        [Adapter(_outside(model)), *(piece.fold for piece in pieces if piece.fold)], [*_outside(model), *order]
    )
    return replace(_joined(order, pieces, pieces[top]), fold=(fold if fold.factors else None) if folded else model.fold)


def layer_classes(model: Model, merge: Merge) -> list[LayerClass]:
    """The model's layers by the parts that hold them and the memories that know them, in the order of their first layer."""
    found: dict[object, tuple[tuple[int, ...], list[str]]] = {}
    for name in model.adapter.factors:
        held = tuple(k for k, (_, update) in enumerate(merge.weighted_updates) if name in update.result.adapter.factors)
        known = tuple(key for key, entry in model.memory.items() if name in entry.factors)
        found.setdefault((held, known), (held, []))[1].append(name)
    return [(held, tuple(names)) for held, names in found.values()]


@dataclass(frozen=True, slots=True)
class _Cut:
    """Everything that a merge is about, for these layers alone; what was one adapter is one adapter again."""

    names: frozenset[str]
    dense: bool
    adapters: dict[Adapter, Adapter] = field(default_factory=dict)

    def merge(self, whole: Merge, held: Sequence[int]) -> Merge:
        """The parts with these numbers, by their weights among themselves."""
        chosen = [whole.weighted_updates[k] for k in held]
        total = sum(weight for weight, _ in chosen) if len(chosen) < len(whole.weighted_updates) else 1.0
        parts = tuple((w / total if total > 0 else 1 / len(chosen), self.update(update)) for w, update in chosen)
        return replace(whole, weighted_updates=parts, anchor=whole.anchor and self.model(whole.anchor))

    def update(self, whole: Update) -> Update:
        """The answer, the task and the model that it was cut from."""
        start, result = whole.task.start, whole.result
        own = replace(
            start, train=self.adapter(start.train), fold=self.adapter(start.fold), control=self.adapter(start.control)
        )
        result = replace(result, adapter=self.adapter(result.adapter), control=self.adapter(result.control))
        return Update(replace(whole.task, start=own), result, whole.base and self.model(whole.base))

    def model(self, whole: Model) -> Model:
        """The model, with what is remembered of these layers or of none in particular."""
        told = {k: e for k, e in whole.memory.items() if not e.factors or not self.names.isdisjoint(e.factors)}
        memory = {key: self.adapter(entry) if entry.factors else entry for key, entry in told.items()}
        fold = self.adapter(whole.fold)
        fold = fold if fold and fold.factors else None
        return replace(whole, adapter=self.adapter(whole.adapter), fold=fold, memory=memory)

    def adapter(self, whole: A) -> A:
        """The factors of these layers; dense tensors in one class of layers only."""
        if whole is None:
            return whole
        if whole not in self.adapters:
            factors = {name: factor for name, factor in whole.factors.items() if name in self.names}
            self.adapters[whole] = Adapter(factors, whole.dense if self.dense else {})
        return self.adapters[whole]


def _joined(order: Sequence[str], pieces: Sequence[Model], top: Model) -> Model:
    """The pieces as one model, but for the fold.

    Its basis is new if that of one piece is; what is remembered of no layer is as `top` has it.
    """
    memory = {}
    for key in dict.fromkeys(key for piece in pieces for key in piece.memory):
        entries = [piece.memory[key] for piece in pieces if key in piece.memory]
        first = top.memory.get(key, entries[0])
        dense = first.dense if key in top.memory else {}
        memory[key] = _laid(entries, order, dense) if any(entry.factors for entry in entries) else first
    return replace(
        top,
        adapter=_laid([piece.adapter for piece in pieces], order, top.adapter.dense),
        basis=max(piece.basis for piece in pieces),
        phase=max(piece.phase for piece in pieces),
        discarded=_discarded(pieces),
        memory=memory,
    )


def _outside(model: Model) -> dict[str, Factor]:
    """What the fold holds of layers that the adapter does not."""
    held = model.fold.factors if model.fold else {}
    return {name: factor for name, factor in held.items() if name not in model.adapter.factors}


def _laid(adapters: Sequence[Adapter], order: Sequence[str], dense: Mapping[str, Tensor] | None = None) -> Adapter:
    """Their factors in this order, and these dense tensors."""
    found = {name: factor for adapter in adapters for name, factor in adapter.factors.items()}
    return Adapter({name: found[name] for name in order if name in found}, dense or {})


def _discarded(pieces: Sequence[Model]) -> float:
    """The share of the energy of all pieces together that their merges cut off."""
    if not any(piece.discarded for piece in pieces):
        return 0.0
    left = [sum(product_norm(factor) ** 2 for factor in piece.adapter.factors.values()) for piece in pieces]
    before = [
        e / (1.0 - piece.discarded) if piece.discarded < 1.0 else 0.0 for e, piece in zip(left, pieces, strict=True)
    ]
    return max(0.0, 1.0 - sum(left) / sum(before)) if sum(before) > 0 else 0.0


def _alive(factor: Factor) -> Factor:
    """The directions that add something to the product, as far as their `up` tells."""
    keep = factor.up.any(0)
    return factor if bool(keep.all()) else Factor(factor.down[keep], factor.up[:, keep])


def _without(adapter: Adapter, names: Collection[str]) -> Adapter:
    return Adapter({name: f for name, f in adapter.factors.items() if name not in names}, adapter.dense)
