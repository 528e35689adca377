"""Addition of products B A: exact at any mixture of ranks, then cut back to a rank by a truncated SVD.

The result is kept sorted by singular value (`down` orthonormal, `up` = U S), so that the best adapter of every lower rank is its
first directions. Each merge rotates the basis, so optimiser moments and entrywise wrappers do not survive it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from fedloom.aggregate.shared.merge_terms import (
    Divisor,
    Term,
    as_changes,
    base_offsets,
    dense_mean,
    direction_weights,
    divide_by_one,
    gather_terms,
    linear_terms,
    merge_origin,
    offset_terms,
    select_directions,
    weigh_term,
)
from fedloom.core.answer_change import window_grams
from fedloom.core.lora import (
    Adapter,
    Factor,
    balance,
    compact,
    cut_factor,
    energy_spectrum,
    lay_flat,
    pad,
    revive,
    server_rank,
    stack_with_fold,
    sum_products,
    truncate_sum,
)
from fedloom.core.policies import Merge
from fedloom.core.seeds import derive
from fedloom.core.truncated_svd import sum_from_grams
from fedloom.core.types import Budget, Model, TaskStart

WINDOW_DIRECTIONS, WINDOW_SIDE = 320, 1000
"""Directions up to which, and smaller side of a layer from which, a window is summed from remembered inner products: there it is
faster though all are computed anew after a restart.
"""


def product_terms(name: str, model: Adapter, merge: Merge, divisor: Tensor) -> Iterator[Term]:
    """Yield the weighted sum of products of one layer, term by term; direction i of an update weighs weight / divisor[i].

    With a divisor of 1 everywhere that is the plain mean of products. With `holder_weights` each direction is averaged over those
    who hold it; a direction that nobody holds (divisor 0) keeps the model's.
    """
    keep: float | Tensor = 1.0 if merge.as_delta else 1.0 - merge.step
    share: float | Tensor = merge.step
    if not bool((divisor == 1).all()):
        keep = torch.ones_like(divisor) if merge.as_delta else torch.where(divisor > 0, keep, 1.0)
        share = merge.step / torch.where(divisor > 0, divisor, 1.0)
    if bool(keep.any()) if isinstance(keep, Tensor) else keep:
        yield keep, merge_origin(model, merge).factors[name]
    for weight, update in merge.weighted_updates:
        yield weight * share, update.result.adapter.factors[name]
        if merge.as_delta:
            yield -weight * share, update.task.start.train.factors[name]


def best_approximation(
    terms: Iterable[Term], rank: int, measured: bool = True, in_window: bool = False
) -> tuple[Factor, float | None, float]:
    """Return the best approximation of at most `rank` to a sum, and the energy (squared Frobenius norm) before and after.

    Args:
        terms: coefficients and products, of the sizes of one layer.
        rank: directions that are kept, at most.
        measured: whether the energy before is wanted; else it may be None.
        in_window: whether most of the products were in the last merge too, so that their inner products are remembered.
    """
    found = list(terms)
    gathered = gather_terms(found)
    _, first = found[0]
    directions, sides = sum(factor.rank for _, factor in gathered), (first.up.shape[0], first.down.shape[1])
    if directions < min(rank, *sides):  # directions that add nothing have a `down` to learn from, which zeros have not
        gathered = found
    before: float | None
    if in_window and directions <= WINDOW_DIRECTIONS and min(sides) >= WINDOW_SIDE and gathered is not found:
        cut, before = _sum_window(gathered, rank)
    else:
        cut, before = truncate_sum([weigh_term(*term) for term in gathered], rank, measured)
    return cut, before, float(cut.up.double().square().sum())


def _sum_window(terms: Sequence[Term], rank: int) -> tuple[Factor, float]:
    """`truncate_sum` from inner products of the terms, which are remembered from merge to merge."""
    factors = [factor for _, factor in terms]
    weights = torch.cat([direction_weights(coefficient, factor) for coefficient, factor in terms])
    ups, downs = [factor.up for factor in factors], [factor.down for factor in factors]
    (left, values, right), before = sum_from_grams(ups, downs, weights, window_grams(factors), rank)
    return Factor(right, left * values), before


def merge_changes(model: Model, merge: Merge, rank: int | None = None) -> Model:
    """Return W + step * sum p_k (B_k A_k - what k received), cut to `rank` (None: the server's).

    Each client's change counts on top of the version that it was sent a part of.
    """
    return merge_products(model, as_changes(merge), rank, divide_by_one, base_offsets(model, merge))


def merge_products(
    model: Model, merge: Merge, rank: int | None, divisor: Divisor, offsets: Sequence[tuple[float, Model]] = ()
) -> Model:
    """Return the next model: products added up layer by layer, each cut to its best `rank` (None: the server's); dense parts
    averaged.

    A product of lower rank is padded with zero directions, so that the server's rank never shrinks by chance. `offsets` are terms of
    `base_offsets` to add.
    """
    rank = rank or server_rank(model.adapter)
    cuts = {}
    for name, factor in model.adapter.factors.items():
        top = max(factor.rank, *(update.result.adapter.factors[name].rank for _, update in merge.weighted_updates))
        products = product_terms(name, model.adapter, merge, divisor(name, merge, top))
        terms = chain(products, offset_terms(name, offsets))
        cuts[name] = best_approximation(terms, rank, merge.measured, in_window=bool(merge.retain))
    discarded = _discarded([energies for _, *energies in cuts.values()]) if merge.measured else None
    full = {name: pad(factor, rank) for name, (factor, _, _) in cuts.items()}
    dense = dense_mean(
        model.adapter, [*linear_terms(model.adapter, merge), *((c, base.adapter) for c, base in offsets)]
    )
    return replace(model, adapter=lay_flat(Adapter(full, dense)), basis=model.basis + 1, discarded=discarded)


def _discarded(energies: Iterable[Sequence[float | None]]) -> float:
    """The share of the energy of all layers that was cut off, from that before and after of each."""
    before, after = (sum(energy or 0.0 for energy in side) for side in zip(*energies, strict=True))
    return max(0.0, 1.0 - after / before) if before > 0 else 0.0


def truncated_start(model: Model, budget: Budget, seed: int, balanced: bool) -> TaskStart:
    """Return the leading directions at the client's rank, each able to learn; for models kept sorted by `merge_products`.

    `balanced` divides the singular value evenly over both sides; otherwise `up` carries it and `down` is orthonormal.
    """
    adapter, factors = model.adapter, {}
    for name, sorted_ in adapter.factors.items():
        factor = revive(cut_factor(sorted_, budget.rank), budget.rank, derive(seed, name))
        factors[name] = balance(factor) if balanced else factor
    if any(factors[name] is not factor for name, factor in adapter.factors.items()):
        adapter = Adapter(factors, adapter.dense)
    return TaskStart(adapter, basis=f"{model.basis}/{budget.rank}")


def add_to_fold(model: Model, pieces: Mapping[str, Sequence[Term]]) -> Adapter:
    """Return the model's fold with these products added, layer by layer, with no more directions than a layer can have."""
    factors = {}
    for name, added in pieces.items():
        before = [(1.0, model.fold.factors[name])] if model.fold and name in model.fold.factors else []
        terms = gather_terms([*before, *added]) or [(0.0, added[0][1])]
        factors[name] = compact(sum_products([weigh_term(*term) for term in terms]))
    return Adapter(factors)


def fold_untrained(model: Model, held: Iterable[int]) -> Adapter | None:
    """Return the fold of a client that trains only the directions `held`, so that it runs the whole model; None if nothing is left.

    It is not compacted: that would be a dense product for every task, and a fold is never trained.
    """
    rank, without = server_rank(model.adapter), set(held)
    rest = torch.tensor([i for i in range(rank) if i not in without], dtype=torch.long)
    if not len(rest):
        return model.fold
    others = Adapter({name: select_directions(factor, rest) for name, factor in model.adapter.factors.items()})
    return stack_with_fold(model.fold, others) if model.fold else others


def split_at_rank(factors: Mapping[str, Factor], rank: int) -> tuple[dict[str, Factor], Adapter]:
    """Divide sorted factors into their first `rank` directions, with zeros where a layer has fewer, and a fold of the others."""
    first = {name: pad(cut_factor(factor, rank), rank) for name, factor in factors.items()}
    return first, Adapter({name: Factor(f.down[rank:], f.up[:, rank:]) for name, f in factors.items()})


def energy_shares(model: Model) -> list[float]:
    """Return the share of energy of each direction, largest first, summed over layers: rank collapse shows here.

    It is that of the whole model, fold included, for as many directions as the adapter has.
    """
    everything, rank = stack_with_fold(model.adapter, model.fold), server_rank(model.adapter)
    total = torch.zeros(server_rank(everything), dtype=torch.float64)
    for factor in everything.factors.values():
        values = energy_spectrum(factor)
        total[: len(values)] += values.cpu()
    sum_ = float(total.sum())
    return [float(value) / sum_ if sum_ > 0 else 0.0 for value in total[:rank]]
