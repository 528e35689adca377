"""A `Merge` spelt out as terms of a linear combination, and weights of single directions.

A schedule decides on a `Merge` without knowing LoRA. Here it becomes (coefficient, adapter) pairs; where clients trained parts of
different models, `base_offsets` are the terms that make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
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

VOTES_SERVER_VALUE: Mapping[int, str] = MappingProxyType(
    {8: "a client of low rank votes for the server's value of the directions that it did not train"}
)
"""Exemption from law 8 of the methods that average changes with weights which do not depend on who trained a direction."""


MEANS_OF_FACTORS = (
    "the mean of products is taken as the product of mean factors, without the cross terms of their changes"
)
"""`summed_by_factors` of the methods that add products of both sides."""


def first_model(start: Adapter) -> Model:
    """Return the first global model of a method that takes the start as it is: the usual `init`."""
    return Model(start)


def linear_terms(model: Adapter, merge: Merge) -> list[tuple[float, Adapter]]:
    """Return the merge as (coefficient, adapter) pairs whose sum is the new model.

    A mean of models is (1 - step) model + step * sum(w * client), a sum of changes model + step * sum(w * (client - start)).
    """
    keep = 1.0 if merge.as_delta else 1.0 - merge.step
    pairs = [(keep, merge_origin(model, merge))] if keep else []
    for weight, update in merge.weighted_updates:
        pairs.append((merge.step * weight, update.result.adapter))
        if merge.as_delta:
            pairs.append((-merge.step * weight, update.task.start.train))
    return pairs


def merge_origin(model: Adapter, merge: Merge) -> Adapter:
    """Return the adapter that a merge moves from: that of its anchor, or the model's."""
    return merge.anchor.adapter if merge.anchor else model


def base_offsets(model: Model, merge: Merge) -> list[tuple[float, Model]]:
    """Return how far the models that clients started from are from the server's, as terms to add to a merge of changes.

    For a method that adds changes, a client's model is the global model `base` that it was sent a part of, with its change. So a mean
    of models is

        model + [(1 - step) anchor + step * sum(w * base) - model] + step * sum(w * change)

    and the terms returned are the bracket. They are empty as long as everybody started from `model`, and nothing that is in a fold is
    counted twice.
    """
    if merge.as_delta:
        return []
    shares = [(-1.0, model), (1.0 - merge.step, merge.anchor or model)]
    shares += [(merge.step * weight, update.base or model) for weight, update in merge.weighted_updates]
    offsets: list[tuple[float, Model]] = []
    for share, base in shares:  # one term a version: shares of the same version cancel here, and not in float32
        k = next((k for k, (_, other) in enumerate(offsets) if _same(other, base)), len(offsets))
        offsets[k : k + 1] = [(share + (offsets[k][0] if k < len(offsets) else 0.0), base)]
    return [(share, base) for share, base in offsets if abs(share) > 1e-12]


def as_changes(merge: Merge) -> Merge:
    """Return the merge of the same answers as changes of the server's model; `base_offsets` are to be added to it."""
    return replace(merge, as_delta=True, anchor=None)


def _same(one: Model, other: Model) -> bool:
    """Whether two models are the same version, whatever a wrapper keeps in their memories."""
    return one.adapter is other.adapter and one.fold is other.fold


def offset_terms(name: str, offsets: Iterable[tuple[float, Model]]) -> Iterator[tuple[float, Factor]]:
    """Yield the terms of `base_offsets` for one layer, as a sum of products, folds included."""
    for share, one in offsets:
        yield share, one.adapter.factors[name]
        if one.fold and name in one.fold.factors:
            yield share, one.fold.factors[name]


def dense_mean(model: Adapter, pairs: list[tuple[float, Adapter]]) -> dict[str, Tensor]:
    """Return the dense part (classification head) of a merge: a plain mean with the schedule's weights."""
    return {name: weighted_sum([(c, adapter.dense[name]) for c, adapter in pairs]) for name in model.dense}


def held_directions(start: TaskStart, rank: int) -> Tensor:
    """Return the indices of the server's directions that an answer of this rank holds."""
    return torch.tensor(range(rank) if start.directions is None else start.directions[:rank], dtype=torch.long)


def select_directions(factor: Factor, chosen: Tensor) -> Factor:
    """Return the directions of a factor with these indices."""
    return Factor(factor.down[chosen], factor.up[:, chosen])


Divisor: TypeAlias = Callable[[str, Merge, int], Tensor]
"""(layer name, merge, rank) -> what the weights of direction i are divided by, (rank,) in float64; 0 keeps the model's direction."""


def require_server_rank(rank: int | None) -> None:
    """Raise Refused for a server rank below 1; None means the highest client rank."""
    if rank is not None and rank < 1:
        raise Refused("aggregator.rank", rank, "the server must keep at least 1 direction")


def divide_by_one(name: str, merge: Merge, rank: int) -> Tensor:
    """Divide by 1: a client without a direction counts as zero there, or as no change where changes are merged."""
    return torch.ones(rank, dtype=torch.float64)


def holder_weights(name: str, merge: Merge, rank: int) -> Tensor:
    """Divide by the total weight of the updates that hold direction i of layer `name`: a mean over its holders."""
    weights = torch.zeros(rank, dtype=torch.float64)
    for weight, update in merge.weighted_updates:
        weights[held_directions(update.task.start, update.result.adapter.factors[name].rank)] += weight
    return weights


def weigh_directions(factor: Factor, by: Tensor) -> Factor:
    """Return each direction times its weight, in the factor's own dtype; `by` may be longer than the factor's rank."""
    return scale_product(factor, by[: factor.rank].to(factor.up))


SMALL = 2**16
"""Entries up to which a mean is one product of a stack (0.8 MB): there calls cost more than arithmetic."""


def weighted_sum(pairs: list[tuple[float, Tensor]]) -> Tensor:
    """Return the linear combination of tensors of one shape, added up in float64, in the dtype of the first."""
    first = pairs[0][1]
    if len(pairs) * first.numel() <= SMALL:
        weights = torch.tensor([coefficient for coefficient, _ in pairs], dtype=torch.float64, device=first.device)
        rows = torch.stack([tensor for _, tensor in pairs]).double().view(len(pairs), first.numel())
        return (weights @ rows).view(first.shape).to(first.dtype)
    total = torch.zeros_like(first, dtype=torch.float64)
    for coefficient, tensor in pairs:
        total.add_(tensor, alpha=coefficient)
    return total.to(first.dtype)
