"""What the methods share: a `Merge` spelt out as terms, means of factors, sums of products cut to a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from fedloom.aggregate.mean import mean
from fedloom.errors import Refused
from fedloom.lora import (
    Adapter,
    Factor,
    balance,
    compact,
    cut,
    cut_to,
    each,
    energy,
    joined,
    pad,
    revive,
    scale,
    server_rank,
    total,
    truncate_sum,
)
from fedloom.seeds import derive
from fedloom.types import Budget, Merge, Model, Start


def terms(model: Adapter, merge: Merge) -> list[tuple[float, Adapter]]:
    """The merge as (coefficient, adapter) pairs, so that the new model is their sum.

    Towards the clients' models: (1 - step) model + step * sum(w * client). As delta: model + step * sum(w * (client - start)).
    """
    keep = 1.0 if merge.as_delta else 1.0 - merge.step
    pairs = [(keep, standing(model, merge))] if keep else []
    for weight, update in merge.parts:
        pairs.append((merge.step * weight, update.result.adapter))
        if merge.as_delta:
            pairs.append((-merge.step * weight, update.task.start.train))
    return pairs


def standing(model: Adapter, merge: Merge) -> Adapter:
    """What a merge moves from."""
    return merge.anchor.adapter if merge.anchor else model


def apart(model: Model, merge: Merge) -> list[tuple[float, Model]]:
    """By how much the models that a merge is about are not the server's, as terms to add to a merge of changes.

    A method that adds changes means by a client's model the global one that it was sent a part of, with its change. So a mean of
    models is model + [(1 - step) anchor + step * sum(w * base) - model] + step * sum(w * change), and this is the bracket: empty
    as long as everybody started from `model`, and nothing folded is counted twice.
    """
    if merge.as_delta:
        return []
    shares = [(-1.0, model), (1.0 - merge.step, merge.anchor or model)]
    shares += [(merge.step * weight, update.base or model) for weight, update in merge.parts]
    found: list[tuple[float, Model]] = []
    for share, one in shares:
        k = next((k for k, (_, known) in enumerate(found) if _same(known, one)), len(found))
        found[k : k + 1] = [(share + (found[k][0] if k < len(found) else 0.0), one)]
    return [(share, one) for share, one in found if abs(share) > 1e-12]


def changes(merge: Merge) -> Merge:
    """The same answers as changes of the server's model; what `apart` says is added beside them."""
    return replace(merge, as_delta=True, anchor=None)


def _same(one: Model, other: Model) -> bool:
    """Whether they are the same version, whatever a wrapper wrote beside it."""
    return one.adapter is other.adapter and one.fold is other.fold


def apart_terms(name: str, away: Iterable[tuple[float, Model]]) -> Iterator[tuple[float, Factor]]:
    """The same for one layer, as a sum of products, folds included."""
    for share, one in away:
        yield share, one.adapter.factors[name]
        if one.fold and name in one.fold.factors:
            yield share, one.fold.factors[name]


def dense_mean(model: Adapter, pairs: list[tuple[float, Adapter]]) -> dict[str, Tensor]:
    """The dense part (classification head): a plain mean with the schedule's weights, by default the examples'."""
    return {name: mean([(c, adapter.dense[name]) for c, adapter in pairs]) for name in model.dense}


def padded_mean(model: Model, merge: Merge, head: Merge | None = None) -> Model:
    """Factors averaged apart, lower ranks padded with zeros: A = sum p_k A_k, B = sum p_k B_k.

    A direction that nobody held would be zero on both sides and could never learn again: its `down` is drawn anew, once for
    all clients, and the basis counts as changed. The dense part is averaged as `head` says, where its weights are others.
    """
    rank = server_rank(model.adapter)
    pairs = terms(model.adapter, merge)
    means = {}
    for name in model.adapter.factors:
        padded = [(c, pad(adapter.factors[name], rank)) for c, adapter in pairs]
        means[name] = Factor(mean([(c, f.down) for c, f in padded]), mean([(c, f.up) for c, f in padded]))
    factors = {name: revive(factor, rank, derive(model.basis, name)) for name, factor in means.items()}
    redrawn = any(factors[name] is not factor for name, factor in means.items())
    dense = dense_mean(model.adapter, terms(model.adapter, head or merge))
    return replace(model, adapter=Adapter(factors, dense), basis=model.basis + redrawn)


def moved(model: Adapter, merge: Merge, reach: Reach) -> Adapter:
    """Factors averaged apart, each entry over those who trained it; whoever did not train it votes for the model's value.

    A client moves the directions that it holds (`start.slots`), on the sides that it was free to change, by
    step * weight / reach * (its value - the model's, or with `as_delta` what it was sent).
    """
    factors = {}
    for name, own in standing(model, merge).factors.items():
        divisor = reach(name, merge, own.rank)
        down, up = own.down.double(), own.up.double()
        for weight, update in merge.parts:
            start, given = update.task.start, update.result.adapter.factors[name]
            held = held_by(start, given.rank).to(down.device)
            origin = cut(start.train.factors[name], given.rank) if merge.as_delta else slots(own, held)
            share = (merge.step * weight / torch.where(divisor > 0, divisor, 1.0)).to(down.device)[held]
            if "down" not in start.rules.kept:
                down = down.index_add(0, held, share[:, None] * (given.down.double() - origin.down.double()))
            if "up" not in start.rules.kept:
                up = up.index_add(1, held, share * (given.up.double() - origin.up.double()))
        factors[name] = Factor(down.to(own.down), up.to(own.up))
    return Adapter(factors, dense_mean(model, terms(model, merge)))


def moved_whole(model: Model, merge: Merge) -> Adapter:
    """Factors averaged apart, where a client means the whole model that it was sent a part of, with its change.

    So an answer counts by its weight on the side and in the directions that it trained, and says on the others what it was cut
    from: as long as everybody starts from `model`, that is the server's value.
    """
    away = apart(model, merge)
    if not away:
        return moved(model.adapter, merge, everyone)
    return added(moved(model.adapter, changes(merge), everyone), away)


def added(adapter: Adapter, away: Sequence[tuple[float, Model]]) -> Adapter:
    """The adapter and these terms of `apart`, entry by entry; folds apart."""
    shares, others = [1.0, *(share for share, _ in away)], [one.adapter for _, one in away]
    return each(lambda *entries: mean(list(zip(shares, entries, strict=True))), adapter, *others) if away else adapter


def held_by(start: Start, rank: int) -> Tensor:
    """The numbers of the server's directions that an answer of this rank is about."""
    return torch.tensor(range(rank) if start.slots is None else start.slots[:rank], dtype=torch.long)


def slots(factor: Factor, chosen: Tensor) -> Factor:
    """The directions with these numbers."""
    return Factor(factor.down[chosen], factor.up[:, chosen])


Reach: TypeAlias = Callable[[str, Merge, int], Tensor]
"""(layer name, merge, rank) -> by what the weight of direction i is divided, (rank,) in float64; 0 keeps the model's."""


def check_rank(rank: int | None) -> None:
    """Raise Refused for a server without directions."""
    if rank is not None and rank < 1:
        raise Refused("aggregator.rank", rank, "the server must keep at least 1 direction")


def everyone(name: str, merge: Merge, rank: int) -> Tensor:
    """No division: whoever does not hold a direction votes zero on it."""
    return torch.ones(rank, dtype=torch.float64)


def slot_weights(name: str, merge: Merge, rank: int) -> Tensor:
    """Total weight of the updates that hold direction i of layer `name`, (rank,) in float64."""
    reach = torch.zeros(rank, dtype=torch.float64)
    for weight, update in merge.parts:
        reach[held_by(update.task.start, update.result.adapter.factors[name].rank)] += weight
    return reach


def weigh(factor: Factor, by: Tensor) -> Factor:
    """Each direction times its weight, in the factor's own dtype; `by` may be longer than the factor's rank."""
    return scale(factor, by[: factor.rank].to(factor.up))


def product_terms(name: str, model: Adapter, merge: Merge, reach: Tensor) -> Iterator[tuple[float, Factor]]:
    """The weighted sum of products of one layer, term by term; direction i of an update weighs weight / reach[i].

    With reach = 1 everywhere that is the plain mean of products. With `slot_weights` each direction is averaged over those
    who hold it; a direction that nobody holds (reach 0) keeps the model's.
    """
    kept = torch.ones_like(reach) if merge.as_delta else torch.where(reach > 0, 1.0 - merge.step, 1.0)
    share = merge.step / torch.where(reach > 0, reach, 1.0)
    if bool(kept.any()):
        yield 1.0, weigh(pad(standing(model, merge).factors[name], len(reach)), kept)
    for weight, update in merge.parts:
        yield 1.0, weigh(update.result.adapter.factors[name], weight * share)
        if merge.as_delta:
            yield 1.0, weigh(update.task.start.train.factors[name], -weight * share)


def best(terms: Iterable[tuple[float, Factor]], rank: int) -> tuple[Factor, float, float]:
    """The best approximation of at most `rank` to a sum, and the energy (squared Frobenius norm) before and after."""
    kept, before = truncate_sum(terms, rank)
    return kept, before, float(kept.up.double().square().sum())


def merge_changes(model: Model, merge: Merge, rank: int) -> Model:
    """W + step * sum p_k (B_k A_k - what k received), for each client on top of the model that it was sent a part of."""
    return merge_products(model, changes(merge), rank, everyone, apart(model, merge))


def merge_products(
    model: Model, merge: Merge, rank: int, reach: Reach, away: Sequence[tuple[float, Model]] = ()
) -> Model:
    """The next model: products added up layer by layer, each cut to its best `rank`; dense parts averaged.

    A product of lower rank is padded with zero directions, so that the server's rank never shrinks by chance. `away` is added.
    """
    cuts = {}
    for name, factor in model.adapter.factors.items():
        top = max(factor.rank, *(update.result.adapter.factors[name].rank for _, update in merge.parts))
        everything = chain(product_terms(name, model.adapter, merge, reach(name, merge, top)), apart_terms(name, away))
        cuts[name] = best(everything, rank)
    before = sum(energy for _, energy, _ in cuts.values())
    after = sum(energy for _, _, energy in cuts.values())
    discarded = max(0.0, 1.0 - after / before) if before > 0 else 0.0
    full = {name: pad(factor, rank) for name, (factor, _, _) in cuts.items()}
    dense = dense_mean(model.adapter, [*terms(model.adapter, merge), *((c, one.adapter) for c, one in away)])
    return replace(model, adapter=Adapter(full, dense), basis=model.basis + 1, discarded=discarded)


def handed_out(model: Model, budget: Budget, seed: int, balanced: bool) -> Start:
    """The model's leading directions at the client's rank, each able to learn; for models kept sorted by `merge_products`.

    `balanced` divides the singular value evenly over both sides; otherwise `up` carries it and `down` is orthonormal.
    """
    adapter, factors = model.adapter, {}
    for name, sorted_ in adapter.factors.items():
        factor = revive(cut(sorted_, budget.rank), budget.rank, derive(seed, name))
        factors[name] = balance(factor) if balanced else factor
    return Start(Adapter(factors, adapter.dense), basis=f"{model.basis}/{budget.rank}")


def leading(model: Model, budget: Budget) -> Start:
    """The first directions at the client's rank, as they are: all clients share them, and the basis stays."""
    return Start(cut_to(model.adapter, budget.rank), basis=f"{model.basis}/{budget.rank}")


def folded(model: Model, pieces: Mapping[str, Sequence[tuple[float, Factor]]]) -> Adapter:
    """The model's fold with these products added, layer by layer, with no more directions than a layer can have."""
    factors = {}
    for name, terms in pieces.items():
        before = [(1.0, model.fold.factors[name])] if model.fold and name in model.fold.factors else []
        factors[name] = compact(total([*before, *terms]))
    return Adapter(factors)


def tail(model: Model, held: Iterable[int]) -> Adapter | None:
    """What a client that trains only the directions `held` needs beside them to run the whole model; None if nothing.

    Not compacted: that would be a dense product for every task, and a fold is never trained.
    """
    rank, without = server_rank(model.adapter), set(held)
    rest = torch.tensor([i for i in range(rank) if i not in without], dtype=torch.long)
    if not len(rest):
        return model.fold
    others = Adapter({name: slots(factor, rest) for name, factor in model.adapter.factors.items()})
    return joined(model.fold, others) if model.fold else others


def energy_shares(model: Model) -> list[float]:
    """Share of energy per direction, largest first, summed over layers: the picture in which rank collapse is seen.

    Of the whole model, fold included, for as many directions as the adapter has.
    """
    everything, kept = joined(model.adapter, model.fold), server_rank(model.adapter)
    total = torch.zeros(server_rank(everything), dtype=torch.float64)
    for factor in everything.factors.values():
        values = energy(factor)
        total[: len(values)] += values.cpu()
    sum_ = float(total.sum())
    return [float(value) / sum_ if sum_ > 0 else 0.0 for value in total[:kept]]
