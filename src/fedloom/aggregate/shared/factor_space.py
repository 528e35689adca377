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
    weighted_adapters,
)
from fedloom.core.lora import (
    NEGLIGIBLE,
    Adapter,
    Factor,
    cut_adapter,
    cut_factor,
    lay_flat,
    pad_to_one_rank,
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
    terms = [(share, lay_flat(pad_to_one_rank(one, rank))) for share, one in linear_terms(model.adapter, merge)]
    mean = weighted_adapters(lay_flat(pad_to_one_rank(model.adapter, rank)), terms)
    if head is not None:
        mean = lay_flat(Adapter(mean.factors, dense_mean(model.adapter, linear_terms(model.adapter, head))))
    if _all_alive(mean, rank):
        return replace(model, adapter=mean)
    factors = {name: revive(factor, rank, derive(model.basis, name)) for name, factor in mean.factors.items()}
    redrawn = any(factors[name] is not factor for name, factor in mean.factors.items())
    return replace(model, adapter=lay_flat(Adapter(factors, mean.dense)), basis=model.basis + redrawn)


def _all_alive(adapter: Adapter, rank: int) -> bool:
    """Whether `revive` has certainly nothing to do in any layer; asked of an adapter in one buffer with a call a shape."""
    if adapter.flat is None:
        return False
    for group in adapter.flat.layout.groups:
        if group.side == "down":
            lengths = torch.linalg.vector_norm(group.view(adapter.flat.buffer), dim=2)
            alive = lengths.amin(1) > 4 * NEGLIGIBLE * lengths.amax(1)
            if group.shape[0] != rank or not bool(alive.all()):
                return False
    return True


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
    return (
        weighted_adapters(adapter, [(1.0, adapter), *((share, one.adapter) for share, one in offsets)])
        if offsets
        else adapter
    )


def leading_start(model: Model, budget: Budget) -> TaskStart:
    """Return the first directions at the client's rank as they are: all clients share them, and the basis stays."""
    return TaskStart(cut_adapter(model.adapter, budget.rank), basis=f"{model.basis}/{budget.rank}")
