"""Partial depth: the start of a client that trains the top layers alone, and the merge of answers that hold different layers.

Source: HierFedLoRA, arXiv 2503.21213, 2025: a client of depth d trains the d layers next to the output; each layer is averaged over
those who trained it, and one that nobody trained keeps its value. Aggregators and schedules know nothing of it: layers are grouped
by the answers that hold them, and a method merges each group as if there were no other layers. So what a method computes over all
layers (HetLoRA's norms, Clip's bound) it computes over those of a group.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor, product_norm, stack
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Aggregator, Merge, aggregator_layers
from fedloom.core.types import Budget, Model, Rules, Task, TaskStart, Update

LayerClass = tuple[tuple[int, ...], tuple[str, ...]]
"""Indices of the updates that hold some layers, and the names of these layers."""

A = TypeVar("A", Adapter, Adapter | None)


def require_all_layers(aggregator: Aggregator, rules: Rules) -> None:
    """Raise Refused where a method needs every client to train every layer; `rules` are those of the starts that it hands out."""
    if rules.private:
        name, remedy = (
            type(aggregator).__name__,
            "its clients keep a side of each layer, which the server has no base of",
        )
        raise Refused("plan.depth", name, f"{remedy}; leave plan.depth out, or use a method that shares all it trains")
    for layer in aggregator_layers(aggregator):
        if getattr(layer, "remembers_changes", False):
            why = "it divides a layer's changes by all clients, also by those who never train it"
            remedy = f"{why}; leave plan.depth or the wrapper out"
            raise Refused("plan.depth", type(layer).__name__, remedy)


def exact_start(
    aggregator: Aggregator, model: Model, budget: Budget, seed: int, shape: Shape, outer: Task | None
) -> TaskStart:
    """Return what a client with this budget is to receive, before any number is rounded: a function of its arguments.

    A member of an edge, which works on the task `outer`, has a basis of its own for each of those. A client drops its optimiser
    moments when the basis changes, so they live through the rounds of one outer task and no longer.
    """
    below = shape.untrained_modules(model.adapter.factors, budget.depth)
    start = start_at_depth(aggregator, model, budget, seed, below)
    return start if outer is None else replace(start, basis=f"{outer.id}:{start.basis}")


def start_at_depth(
    aggregator: Aggregator, model: Model, budget: Budget, seed: int, below: Collection[str]
) -> TaskStart:
    """Return what a client receives that does not train the layers `below`.

    The model of an edge may lack layers that its own task has in the fold: these run at its members too.
    """
    start, outside = fold_layers(aggregator.start(model, budget, seed), below), _outside(model)
    folded = start.fold.factors if start.fold else {}
    return start if outside.keys() <= folded.keys() else replace(start, fold=Adapter({**outside, **folded}))


def fold_layers(start: TaskStart, names: Collection[str]) -> TaskStart:
    """Return the start of a client that does not train these layers: they run as a part of its base.

    Directions that add nothing (a LoRA at its beginning) are not sent. The number of directions to select falls with the number of
    layers.
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
    """Return the next model, each layer merged of the updates that hold it, with weights that sum to 1.

    Layers that the same updates hold, and of which a wrapper's memory has the same entries, are merged together. Dense tensors go
    with the last layer in the model's order, which every update must hold.
    """
    if getattr(aggregator, "merges_all_depths", False):
        return aggregator.merge(model, merge)
    count = len(model.adapter.factors)
    everywhere = all(len(update.result.adapter.factors) == count for _, update in merge.weighted_updates)
    if everywhere and not _outside(model) and all(len(entry.factors) in (0, count) for entry in model.memory.values()):
        return aggregator.merge(model, merge)
    order = [*model.adapter.factors]
    pieces, top, folded = list[Model](), 0, False
    for held, names in layer_classes(model, merge):
        view = _LayerView(frozenset(names), dense=order[-1] in names)
        piece = view.model(model)
        after = aggregator.merge(piece, view.merge(merge, held)) if held else replace(piece, discarded=0.0)
        top, folded = len(pieces) if view.dense else top, folded or after.fold is not piece.fold
        pieces.append(after)
    fold = _combined(
        [Adapter(_outside(model)), *(piece.fold for piece in pieces if piece.fold)], [*_outside(model), *order]
    )
    return replace(_join(order, pieces, pieces[top]), fold=(fold if fold.factors else None) if folded else model.fold)


def layer_classes(model: Model, merge: Merge) -> list[LayerClass]:
    """Group the model's layers by the updates and the memory entries that hold them, in the order of their first layer."""
    groups: dict[object, tuple[tuple[int, ...], list[str]]] = {}
    for name in model.adapter.factors:
        held = tuple(k for k, (_, update) in enumerate(merge.weighted_updates) if name in update.result.adapter.factors)
        remembered = tuple(key for key, entry in model.memory.items() if name in entry.factors)
        groups.setdefault((held, remembered), (held, []))[1].append(name)
    return [(held, tuple(names)) for held, names in groups.values()]


@dataclass(frozen=True, slots=True)
class _LayerView:
    """Restriction of a merge, with all that it refers to, to some layers. What was one object before is one object after."""

    names: frozenset[str]
    dense: bool
    adapters: dict[Adapter, Adapter] = field(default_factory=dict)

    def merge(self, whole: Merge, held: Sequence[int]) -> Merge:
        """Return the merge of the updates with these indices, their weights normalised."""
        chosen = [whole.weighted_updates[k] for k in held]
        total = sum(weight for weight, _ in chosen) if len(chosen) < len(whole.weighted_updates) else 1.0
        updates = tuple((w / total if total > 0 else 1 / len(chosen), self.update(update)) for w, update in chosen)
        return replace(whole, weighted_updates=updates, anchor=whole.anchor and self.model(whole.anchor))

    def update(self, whole: Update) -> Update:
        """Restrict an answer, its task and the model that this was cut from."""
        start, result = whole.task.start, whole.result
        train, fold, control = self.adapter(start.train), self.adapter(start.fold), self.adapter(start.control)
        result = replace(result, adapter=self.adapter(result.adapter), control=self.adapter(result.control))
        task = replace(whole.task, start=replace(start, train=train, fold=fold, control=control))
        return Update(task, result, whole.base and self.model(whole.base))

    def model(self, whole: Model) -> Model:
        """Restrict a model, with the memory entries of these layers and those of no layer."""
        entries = {k: e for k, e in whole.memory.items() if not e.factors or not self.names.isdisjoint(e.factors)}
        memory = {key: self.adapter(entry) if entry.factors else entry for key, entry in entries.items()}
        fold = self.adapter(whole.fold)
        fold = fold if fold and fold.factors else None
        return replace(whole, adapter=self.adapter(whole.adapter), fold=fold, memory=memory)

    def adapter(self, whole: A) -> A:
        """Restrict an adapter; dense tensors are in one class of layers only."""
        if whole is None:
            return whole
        if whole not in self.adapters:
            factors = {name: factor for name, factor in whole.factors.items() if name in self.names}
            self.adapters[whole] = Adapter(factors, whole.dense if self.dense else {})
        return self.adapters[whole]


def _join(order: Sequence[str], pieces: Sequence[Model], top: Model) -> Model:
    """Join the pieces to one model, but for the fold.

    Its basis is new if that of one piece is; memory entries of no layer are those of `top`, the piece with the dense tensors.
    """
    memory = {}
    for key in dict.fromkeys(key for piece in pieces for key in piece.memory):
        entries = [piece.memory[key] for piece in pieces if key in piece.memory]
        first = top.memory.get(key, entries[0])
        dense = first.dense if key in top.memory else {}
        memory[key] = _combined(entries, order, dense) if any(entry.factors for entry in entries) else first
    return replace(
        top,
        adapter=_combined([piece.adapter for piece in pieces], order, top.adapter.dense),
        basis=max(piece.basis for piece in pieces),
        phase=max(piece.phase for piece in pieces),
        discarded=_discarded(pieces),
        memory=memory,
    )


def _outside(model: Model) -> dict[str, Factor]:
    """Return the factors of the fold for layers that the adapter does not hold."""
    held = model.fold.factors if model.fold else {}
    return {name: factor for name, factor in held.items() if name not in model.adapter.factors}


def _combined(adapters: Sequence[Adapter], order: Sequence[str], dense: Mapping[str, Tensor] | None = None) -> Adapter:
    """Return one adapter with the factors of all in this order, and these dense tensors."""
    factors = {name: factor for adapter in adapters for name, factor in adapter.factors.items()}
    return Adapter({name: factors[name] for name in order if name in factors}, dense or {})


def _discarded(pieces: Sequence[Model]) -> float | None:
    """Return the share of the energy of all pieces together that their merges cut off; None where one did not measure it."""
    shares = [piece.discarded for piece in pieces if piece.discarded is not None]
    if len(shares) < len(pieces) or not any(shares):
        return None if len(shares) < len(pieces) else 0.0
    left = [sum(product_norm(factor) ** 2 for factor in piece.adapter.factors.values()) for piece in pieces]
    before = [e / (1.0 - share) if share < 1.0 else 0.0 for e, share in zip(left, shares, strict=True)]
    return max(0.0, 1.0 - sum(left) / sum(before)) if sum(before) > 0 else 0.0


def _alive(factor: Factor) -> Factor:
    """Return the directions whose `up` is not zero: the others add nothing to the product."""
    keep = factor.up.any(0)
    return factor if bool(keep.all()) else Factor(factor.down[keep], factor.up[:, keep])


def _without(adapter: Adapter, names: Collection[str]) -> Adapter:
    return Adapter({name: f for name, f in adapter.factors.items() if name not in names}, adapter.dense)
