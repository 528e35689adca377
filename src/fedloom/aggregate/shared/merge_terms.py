"""What the methods share: a `Merge` spelt out as terms, means of factors, sums of products cut to a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.lora import (
    Adapter,
    Factor,
    scale_product,
)
from fedloom.core.policies import Merge
from fedloom.core.types import Model, TaskStart


def linear_terms(model: Adapter, merge: Merge) -> list[tuple[float, Adapter]]:
    """The merge as (coefficient, adapter) pairs, so that the new model is their sum.

    Towards the clients' models: (1 - step) model + step * sum(w * client). As delta: model + step * sum(w * (client - start)).
    """
    keep = 1.0 if merge.as_delta else 1.0 - merge.step
    pairs = [(keep, merge_origin(model, merge))] if keep else []
    for weight, update in merge.weighted_updates:
        pairs.append((merge.step * weight, update.result.adapter))
        if merge.as_delta:
            pairs.append((-merge.step * weight, update.task.start.train))
    return pairs


def merge_origin(model: Adapter, merge: Merge) -> Adapter:
    """What a merge moves from."""
    return merge.anchor.adapter if merge.anchor else model


def base_offsets(model: Model, merge: Merge) -> list[tuple[float, Model]]:
    """By how much the models that a merge is about are not the server's, as terms to add to a merge of changes.

    A method that adds changes means by a client's model the global one that it was sent a part of, with its change. So a mean of
    models is model + [(1 - step) anchor + step * sum(w * base) - model] + step * sum(w * change), and this is the bracket: empty
    as long as everybody started from `model`, and nothing folded is counted twice.
    """
    if merge.as_delta:
        return []
    shares = [(-1.0, model), (1.0 - merge.step, merge.anchor or model)]
    shares += [(merge.step * weight, update.base or model) for weight, update in merge.weighted_updates]
    found: list[tuple[float, Model]] = []
    for share, one in shares:
        k = next((k for k, (_, known) in enumerate(found) if _same(known, one)), len(found))
        found[k : k + 1] = [(share + (found[k][0] if k < len(found) else 0.0), one)]
    return [(share, one) for share, one in found if abs(share) > 1e-12]


def as_changes(merge: Merge) -> Merge:
    """The same answers as changes of the server's model; what `apart` says is added beside them."""
    return replace(merge, as_delta=True, anchor=None)


def _same(one: Model, other: Model) -> bool:
    """Whether they are the same version, whatever a wrapper wrote beside it."""
    return one.adapter is other.adapter and one.fold is other.fold


def offset_terms(name: str, away: Iterable[tuple[float, Model]]) -> Iterator[tuple[float, Factor]]:
    """The same for one layer, as a sum of products, folds included."""
    for share, one in away:
        yield share, one.adapter.factors[name]
        if one.fold and name in one.fold.factors:
            yield share, one.fold.factors[name]


def dense_mean(model: Adapter, pairs: list[tuple[float, Adapter]]) -> dict[str, Tensor]:
    """The dense part (classification head): a plain mean with the schedule's weights, by default the examples'."""
    return {name: weighted_sum([(c, adapter.dense[name]) for c, adapter in pairs]) for name in model.dense}


def held_directions(start: TaskStart, rank: int) -> Tensor:
    """The numbers of the server's directions that an answer of this rank is about."""
    return torch.tensor(range(rank) if start.directions is None else start.directions[:rank], dtype=torch.long)


def take_directions(factor: Factor, chosen: Tensor) -> Factor:
    """The directions with these numbers."""
    return Factor(factor.down[chosen], factor.up[:, chosen])


Divisor: TypeAlias = Callable[[str, Merge, int], Tensor]
"""(layer name, merge, rank) -> by what the weight of direction i is divided, (rank,) in float64; 0 keeps the model's."""


def require_server_rank(rank: int | None) -> None:
    """Raise Refused for a server without directions."""
    if rank is not None and rank < 1:
        raise Refused("aggregator.rank", rank, "the server must keep at least 1 direction")


def divide_by_one(name: str, merge: Merge, rank: int) -> Tensor:
    """No division: whoever does not hold a direction votes zero on it."""
    return torch.ones(rank, dtype=torch.float64)


def holder_weights(name: str, merge: Merge, rank: int) -> Tensor:
    """Total weight of the updates that hold direction i of layer `name`, (rank,) in float64."""
    reach = torch.zeros(rank, dtype=torch.float64)
    for weight, update in merge.weighted_updates:
        reach[held_directions(update.task.start, update.result.adapter.factors[name].rank)] += weight
    return reach


def weigh_directions(factor: Factor, by: Tensor) -> Factor:
    """Each direction times its weight, in the factor's own dtype; `by` may be longer than the factor's rank."""
    return scale_product(factor, by[: factor.rank].to(factor.up))


SMALL = 2**16
"""Numbers up to which a mean is one product of a stack (0.8 MB), for calls cost more there than arithmetic."""


def weighted_sum(pairs: list[tuple[float, Tensor]]) -> Tensor:
    """The linear combination of tensors of one shape, added up in float64 and returned in the dtype of the first."""
    first = pairs[0][1]
    if len(pairs) * first.numel() <= SMALL:
        weights = torch.tensor([coefficient for coefficient, _ in pairs], dtype=torch.float64, device=first.device)
        rows = torch.stack([tensor for _, tensor in pairs]).double().view(len(pairs), first.numel())
        return (weights @ rows).view(first.shape).to(first.dtype)
    total = torch.zeros_like(first, dtype=torch.float64)
    for coefficient, tensor in pairs:
        total.add_(tensor, alpha=coefficient)
    return total.to(first.dtype)
