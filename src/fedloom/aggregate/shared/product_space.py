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
    as_changes,
    base_offsets,
    dense_mean,
    divide_by_one,
    linear_terms,
    merge_origin,
    offset_terms,
    select_directions,
    weigh_directions,
)
from fedloom.core.lora import (
    Adapter,
    Factor,
    balance,
    compact,
    cut_factor,
    energy_spectrum,
    pad,
    revive,
    server_rank,
    stack_with_fold,
    sum_products,
    truncate_sum,
)
from fedloom.core.policies import Merge
from fedloom.core.seeds import derive
from fedloom.core.types import Budget, Model, TaskStart


def product_terms(name: str, model: Adapter, merge: Merge, divisor: Tensor) -> Iterator[tuple[float, Factor]]:
    """Yield the weighted sum of products of one layer, term by term; direction i of an update weighs weight / divisor[i].

    With a divisor of 1 everywhere that is the plain mean of products. With `holder_weights` each direction is averaged over those
    who hold it; a direction that nobody holds (divisor 0) keeps the model's.
    """
    keep = torch.ones_like(divisor) if merge.as_delta else torch.where(divisor > 0, 1.0 - merge.step, 1.0)
    share = merge.step / torch.where(divisor > 0, divisor, 1.0)
    if bool(keep.any()):
        yield 1.0, weigh_directions(pad(merge_origin(model, merge).factors[name], len(divisor)), keep)
    for weight, update in merge.weighted_updates:
        yield 1.0, weigh_directions(update.result.adapter.factors[name], weight * share)
        if merge.as_delta:
            yield 1.0, weigh_directions(update.task.start.train.factors[name], -weight * share)


def best_approximation(terms: Iterable[tuple[float, Factor]], rank: int) -> tuple[Factor, float, float]:
    """Return the best approximation of at most `rank` to a sum, and the energy (squared Frobenius norm) before and after."""
    cut, before = truncate_sum(terms, rank)
    return cut, before, float(cut.up.double().square().sum())


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
        cuts[name] = best_approximation(chain(products, offset_terms(name, offsets)), rank)
    before = sum(energy for _, energy, _ in cuts.values())
    after = sum(energy for _, _, energy in cuts.values())
    discarded = max(0.0, 1.0 - after / before) if before > 0 else 0.0
    full = {name: pad(factor, rank) for name, (factor, _, _) in cuts.items()}
    dense = dense_mean(
        model.adapter, [*linear_terms(model.adapter, merge), *((c, base.adapter) for c, base in offsets)]
    )
    return replace(model, adapter=Adapter(full, dense), basis=model.basis + 1, discarded=discarded)


def truncated_start(model: Model, budget: Budget, seed: int, balanced: bool) -> TaskStart:
    """Return the leading directions at the client's rank, each able to learn; for models kept sorted by `merge_products`.

    `balanced` divides the singular value evenly over both sides; otherwise `up` carries it and `down` is orthonormal.
    """
    adapter, factors = model.adapter, {}
    for name, sorted_ in adapter.factors.items():
        factor = revive(cut_factor(sorted_, budget.rank), budget.rank, derive(seed, name))
        factors[name] = balance(factor) if balanced else factor
    return TaskStart(Adapter(factors, adapter.dense), basis=f"{model.basis}/{budget.rank}")


def add_to_fold(model: Model, pieces: Mapping[str, Sequence[tuple[float, Factor]]]) -> Adapter:
    """Return the model's fold with these products added, layer by layer, with no more directions than a layer can have."""
    factors = {}
    for name, added in pieces.items():
        before = [(1.0, model.fold.factors[name])] if model.fold and name in model.fold.factors else []
        factors[name] = compact(sum_products([*before, *added]))
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
