"""A `Merge` spelt out as terms of a linear combination, and weights of single directions.

A schedule decides on a `Merge` without knowing LoRA. Here it becomes (coefficient, adapter) pairs; where clients trained parts of
different models, `base_offsets` are the terms that make up for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.flat_buffer import FlatTensors
from fedloom.core.lora import Adapter, Factor, cut_factor, map_tensors, same_buffers, scale_product, view_as_adapter
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


Term: TypeAlias = tuple[float | Tensor, Factor]
"""Coefficient and product of a sum of products; or a coefficient for each direction, in float64, of which the first ones count."""
CANCELLED = 1e-13
"""Share of the coefficients of a direction below which their sum is the rounding of zero."""


def direction_weights(coefficient: float | Tensor, factor: Factor) -> Tensor:
    """Return the coefficient of each direction, (rank,) in float64."""
    if isinstance(coefficient, Tensor):
        return coefficient[: factor.rank]
    return torch.full((factor.rank,), coefficient, dtype=torch.float64)


def weigh_term(coefficient: float | Tensor, factor: Factor) -> tuple[float, Factor]:
    """Return the same product with one coefficient for all its directions."""
    if not isinstance(coefficient, Tensor):
        return coefficient, factor
    weights, first = coefficient[: factor.rank], float(coefficient[0]) if len(coefficient) else 0.0
    if bool((weights == first).all()):
        return first, factor
    return 1.0, scale_product(factor, weights.to(factor.up))


def gather_terms(terms: Sequence[Term]) -> list[Term]:
    """Return the same sum with fewer directions: products whose leading directions are the same numbers are one, weighed together.

    So what clients received cancels against the versions that it was cut from, to the bit. Directions whose `up` is zero (drawn so
    that they can learn) and those that cancel add nothing and are left out, so that a sum of nothing has no terms.
    """
    found, places = dict[tuple[float, ...], list[_Gathered]](), dict[Place, tuple[_Gathered, int]]()
    for coefficient, factor in terms:
        place = (factor.down.data_ptr(), factor.up.data_ptr(), factor.down.stride(), factor.up.stride())
        seen = places.get(place)
        if seen is not None and factor.rank <= seen[1]:  # the same memory needs no comparison
            seen[0].parts.append((coefficient, factor.rank))
            continue
        alive = _living(coefficient, factor)
        if not alive[1].rank:
            continue
        # the beginnings of both sides: where one side is frozen it is the same in all answers, and would tell none apart
        first = torch.cat([alive[1].down[0, :4], alive[1].up[:4, 0]])
        alike = found.setdefault(tuple(first.tolist()), [])
        one = next((one for one in alike if one.add(*alive)), None)
        if one is None:
            one = _Gathered(alive[1], [(alive[0], alive[1].rank)])
            alike.append(one)
        if alive[1] is one.factor is factor:
            places[place] = (one, factor.rank)
    return [term for alike in found.values() for one in alike if (term := one.term()) is not None]


Place: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Where both sides of a factor begin in memory, and their strides; it is one factor's as long as the terms are held."""


def _living(coefficient: float | Tensor, factor: Factor) -> Term:
    """The term without directions whose `up` is zero."""
    if 0.0 not in factor.up[0].tolist():  # the first entries usually show that there is none
        return coefficient, factor
    alive = factor.up.any(0).nonzero().flatten()
    if len(alive) == factor.rank:
        return coefficient, factor
    return direction_weights(coefficient, factor)[alive.cpu()], select_directions(factor, alive)


@dataclass(slots=True)
class _Gathered:
    """Products whose leading directions are the same, weighed together.

    Fields:
        factor: the one of highest rank.
        parts: coefficient of each, and how many directions it has.
    """

    factor: Factor
    parts: list[tuple[float | Tensor, int]]

    def add(self, coefficient: float | Tensor, factor: Factor) -> bool:
        """Add a product if it is of this kind; return whether it is."""
        both = min(factor.rank, self.factor.rank)
        mine, its = cut_factor(self.factor, both), cut_factor(factor, both)
        if not (mine.down.equal(its.down) and mine.up.equal(its.up)):
            return False
        self.factor = factor if factor.rank > self.factor.rank else self.factor
        self.parts.append((coefficient, factor.rank))
        return True

    def term(self) -> Term | None:
        """Return the sum as one term; None if all of it cancels."""
        plain = [part for part, rank in self.parts if not isinstance(part, Tensor) and rank == self.factor.rank]
        if len(plain) == len(self.parts):
            total = sum(plain)
            return (total, self.factor) if abs(total) > CANCELLED * sum(map(abs, plain)) else None
        weights = torch.zeros(self.factor.rank, dtype=torch.float64)
        sizes = weights.clone()
        for part, rank in self.parts:
            weights[:rank] += part[:rank] if isinstance(part, Tensor) else part
            sizes[:rank] += part[:rank].abs() if isinstance(part, Tensor) else abs(part)
        stays = (weights.abs() > CANCELLED * sizes).nonzero().flatten()
        if not len(stays):
            return None
        if len(stays) == self.factor.rank:
            return weights, self.factor
        return weights[stays], select_directions(self.factor, stays.to(self.factor.up.device))


SMALL = 2**16
"""Entries up to which a mean is one product of a stack (0.8 MB): there calls cost more than arithmetic."""
BATCH = 2**18
"""Entries of small tensors that are stacked at a time (2 MB): more do not fit into a core's cache."""


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


def weighted_adapters(like: Adapter, pairs: list[tuple[float, Adapter]]) -> Adapter:
    """Return the linear combination of adapters of the form of `like`, tensor by tensor as `weighted_sum`, to the bit.

    Small tensors that lie in one buffer are added many at a time; how a tensor is added depends on its own size, never on theirs.
    """
    flats = same_buffers([like, *(adapter for _, adapter in pairs)])
    shares = [share for share, _ in pairs]
    if flats is None:
        return map_tensors(
            lambda _, *tensors: weighted_sum(list(zip(shares, tensors, strict=True))),
            like,
            *(adapter for _, adapter in pairs),
        )
    buffer = torch.zeros_like(flats[0].buffer)
    for group in flats[0].layout.groups:
        total, terms = group.rows(buffer), [group.rows(flat.buffer) for flat in flats[1:]]
        if len(pairs) * group.size <= SMALL:
            _add_small(total, shares, terms)
        else:
            for one, *parts in zip(total, *terms, strict=True):
                one.copy_(weighted_sum(list(zip(shares, parts, strict=True))))
    return view_as_adapter(FlatTensors(buffer, flats[0].layout))


def _add_small(total: Tensor, shares: list[float], terms: list[Tensor]) -> None:
    """Write the linear combination of matrices (tensors, numbers of one) into `total`, some rows of all terms at a time."""
    weights = torch.tensor(shares, dtype=torch.float64, device=total.device)
    count, size = total.shape
    step = max(1, min(count, BATCH // max(1, len(terms) * size)))
    stack = weights.new_empty(len(terms), step, size)
    for first in range(0, count, step):
        part = stack[:, : min(step, count - first)]
        for rows, term in zip(part, terms, strict=True):
            rows.copy_(term[first : first + step])
        total[first : first + step] = (weights @ part.reshape(len(terms), -1)).view(part.shape[1:])
