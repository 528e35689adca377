"""Addition of factors apart: A = sum p_k A_k, B = sum p_k B_k, without a rotation, so that optimiser moments stay valid.

`padded_mean` pads lower ranks with zeros (FedIT, HetLoRA). `move_factors` moves each direction by the changes of those who trained
it, `move_models` does so where clients started from different versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedloom.aggregate.shared.merge_terms import (
    Divisor,
    as_changes,
    base_offsets,
    dense_mean,
    divide_by_one,
    held_directions,
    linear_terms,
    merge_origin,
    select_directions,
    weighted_sum,
)
from fedloom.core.lora import (
    Adapter,
    Factor,
    cut_adapter,
    cut_factor,
    map_tensors,
    pad,
    revive,
    server_rank,
)
from fedloom.core.policies import Merge
from fedloom.core.seeds import derive
from fedloom.core.types import Budget, Model, TaskStart


def padded_mean(model: Model, merge: Merge, head: Merge | None = None) -> Model:
    """Return the model with factors averaged apart, lower ranks padded with zeros: A = sum p_k A_k, B = sum p_k B_k.

    A direction that nobody held would be zero on both sides and could never learn again: its `down` is drawn anew, once for all
    clients, and the basis counts as changed. `head` is the merge of the dense part, where that has other weights.
    """
    rank = server_rank(model.adapter)
    pairs = linear_terms(model.adapter, merge)
    means = {}
    for name in model.adapter.factors:
        padded = [(c, pad(adapter.factors[name], rank)) for c, adapter in pairs]
        means[name] = Factor(
            weighted_sum([(c, f.down) for c, f in padded]), weighted_sum([(c, f.up) for c, f in padded])
        )
    factors = {name: revive(factor, rank, derive(model.basis, name)) for name, factor in means.items()}
    redrawn = any(factors[name] is not factor for name, factor in means.items())
    dense = dense_mean(model.adapter, linear_terms(model.adapter, head or merge))
    return replace(model, adapter=Adapter(factors, dense), basis=model.basis + redrawn)


def move_factors(model: Adapter, merge: Merge, divisor: Divisor) -> Adapter:
    """Return the adapter with factors averaged apart; who did not train an entry votes for the model's value.

    A client moves the directions that it holds (`start.directions`), on the sides that it was free to change, by
    step * weight / divisor * (its value - the model's, or with `as_delta` what it was sent).
    """
    factors = {}
    for name, factor in merge_origin(model, merge).factors.items():
        divisors = divisor(name, merge, factor.rank)
        down, up = factor.down.double(), factor.up.double()
        for weight, update in merge.weighted_updates:
            start, received = update.task.start, update.result.adapter.factors[name]
            held = held_directions(start, received.rank).to(down.device)
            origin = (
                cut_factor(start.train.factors[name], received.rank)
                if merge.as_delta
                else select_directions(factor, held)
            )
            share = (merge.step * weight / torch.where(divisors > 0, divisors, 1.0)).to(down.device)[held]
            if "down" not in start.rules.unchanged:
                down = down.index_add(0, held, share[:, None] * (received.down.double() - origin.down.double()))
            if "up" not in start.rules.unchanged:
                up = up.index_add(1, held, share * (received.up.double() - origin.up.double()))
        factors[name] = Factor(down.to(factor.down), up.to(factor.up))
    return Adapter(factors, dense_mean(model, linear_terms(model, merge)))


def move_models(model: Model, merge: Merge) -> Adapter:
    """Return the adapter with factors averaged apart, where a client's model is the version that it was sent, with its change.

    So an answer counts by its weight on the side and in the directions that it trained, and votes on the others for the version that
    its task was cut from: as long as everybody starts from `model`, that is the server's value.
    """
    offsets = base_offsets(model, merge)
    if not offsets:
        return move_factors(model.adapter, merge, divide_by_one)
    return add_offsets(move_factors(model.adapter, as_changes(merge), divide_by_one), offsets)


def add_offsets(adapter: Adapter, offsets: Sequence[tuple[float, Model]]) -> Adapter:
    """Return the adapter plus the adapters of these `base_offsets`, entry by entry; their folds are left out."""
    shares, others = [1.0, *(share for share, _ in offsets)], [one.adapter for _, one in offsets]
    return (
        map_tensors(lambda *entries: weighted_sum(list(zip(shares, entries, strict=True))), adapter, *others)
        if offsets
        else adapter
    )


def leading_start(model: Model, budget: Budget) -> TaskStart:
    """Return the first directions at the client's rank as they are: all clients share them, and the basis stays."""
    return TaskStart(cut_adapter(model.adapter, budget.rank), basis=f"{model.basis}/{budget.rank}")
