"""How alike the changes of the clients of a merge are: cosines of their directions, and ratios of their lengths, of any ranks.

Each answer is compared by its own change, from what its client received, so that a stale one is judged like a fresh one. In the
coordinates of the method: products, where products are what is merged, by Gram matrices of their factors in float64; otherwise
factors, entry by entry in the server's directions. Two clients are compared on what both changed: layers, sides and directions that
one of them left as they were (it is shallower, of lower rank, or trains the other side) say nothing about the other.

Adapters, dense tensors (the head) and control variates are parts of their own, so that none hides behind another: a cosine is the
mean over the parts, a ratio of lengths the largest. Several answers of one client are one change, their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedloom.aggregate.shared.merge_terms import held_directions
from fedloom.core.answer_change import ProductChange, factor_change, inner_products, product_change
from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import ClientId, TaskStart, Update

Space: TypeAlias = Literal["factor", "product"]
PartSums: TypeAlias = tuple[Tensor, Tensor]
"""Inner products (K, K), and squared lengths (K, K): entry (i, j) is that of i, on what j changed too."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """Changes of K clients beside each other, float64.

    Fields:
        clients: their names, sorted.
        shares: weight of each, all its answers together, (K,); above 0, and they sum to 1.
        cosines: between each two directions, (K, K); 0 where they have nothing in common.
        lengths: of each change, over the median of those of the others, (K,); 1 where there is nothing to compare with.
        trusted: cosines with the trusted change, (K,); None without one.
        reach: lengths over that of the trusted change, (K,); None without one.
    """

    clients: tuple[ClientId, ...]
    shares: Tensor
    cosines: Tensor
    lengths: Tensor
    trusted: Tensor | None = None
    reach: Tensor | None = None

    @property
    def inner(self) -> Tensor:
        """Inner products of the changes, (K, K), in units of the median length."""
        return self.cosines * self.lengths[:, None] * self.lengths


def measured_change(update: Update, space: Space) -> Adapter:
    """Return what an answer changed: products of twice its rank, or factors in the server's directions."""
    start, answer = update.task.start, update.result.adapter
    if space == "product":
        change = product_change(start, answer)
        return Adapter(change.products, change.dense)
    return in_server_directions(start, factor_change(start, answer))


def in_server_directions(start: TaskStart, held: Adapter) -> Adapter:
    """Return an adapter of a client with each direction in its place at the server, zero in those that the client does not hold."""
    if start.directions is None:
        return held
    rank, factors = max(start.directions) + 1, dict[str, Factor]()
    for name, factor in held.factors.items():
        place = held_directions(start, factor.rank).to(factor.up.device)
        down = factor.down.new_zeros(rank, factor.down.shape[1]).index_copy(0, place, factor.down)
        factors[name] = Factor(down, factor.up.new_zeros(factor.up.shape[0], rank).index_copy(1, place, factor.up))
    return Adapter(factors, held.dense)


def compare_changes(
    weighted_updates: Sequence[tuple[float, Update]], space: Space, reference: Adapter | None = None
) -> Likeness:
    """Return how alike the clients of these answers changed; `reference` is the trusted change (None: there is none).

    Cost: the Gram matrix of all answers, or one pass over their factors.
    """
    clients = tuple(sorted({update.task.client for _, update in weighted_updates}))
    weights = torch.zeros(len(clients), len(weighted_updates), dtype=torch.float64)
    for k, (weight, update) in enumerate(weighted_updates):
        weights[clients.index(update.task.client), k] = weight
    # a client whose answers all have weight 0 is compared too, by their plain mean
    owner = torch.where(weights.sum(1, keepdim=True) > 0, weights, _answers(clients, weighted_updates))
    shares = weights.sum(1).clamp_min(1e-12)
    owner = owner / owner.sum(1, keepdim=True)
    changes = [measured_change(update, space) for _, update in weighted_updates]
    controls = [
        in_server_directions(update.task.start, update.result.control) if update.result.control else Adapter({})
        for _, update in weighted_updates
    ]
    if reference is not None:
        changes, controls = [*changes, reference], [*controls, Adapter({})]
        owner = torch.nn.functional.pad(owner, (0, 1, 0, 1))
        owner[-1, -1] = 1.0
    cosines, ratios = _combined([_sum(blocks, len(owner)) for blocks in _parts(changes, controls, owner, space)])
    count = len(clients)
    last = reference is not None
    return Likeness(
        clients,
        shares / shares.sum(),
        cosines[:count, :count],
        _lengths(ratios[:count, :count]),
        cosines[:count, -1] if last else None,
        ratios[:count, -1] if last else None,
    )


def _answers(clients: Sequence[ClientId], weighted_updates: Sequence[tuple[float, Update]]) -> Tensor:
    """Return which answer is whose, (K, answers)."""
    rows = [[float(update.task.client == client) for _, update in weighted_updates] for client in clients]
    return torch.tensor(rows, dtype=torch.float64)


def _parts(
    changes: Sequence[Adapter], controls: Sequence[Adapter], owner: Tensor, space: Space
) -> Iterator[Iterator[PartSums]]:
    """Yield the blocks of each part: adapters, dense tensors, control variates."""
    yield _product_blocks(changes, owner) if space == "product" else _factor_blocks(changes, owner)
    yield _dense_blocks([change.dense for change in changes], owner)
    yield _factor_blocks(controls, owner)
    yield _dense_blocks([control.dense for control in controls], owner)


def _product_blocks(changes: Sequence[Adapter], owner: Tensor) -> Iterator[PartSums]:
    for name in dict.fromkeys(name for change in changes for name in change.factors):
        of_layer = [{name: change.factors[name]} if name in change.factors else {} for change in changes]
        inner = owner @ inner_products([ProductChange(products, {}) for products in of_layer]) @ owner.T
        yield inner, _where_both_changed(inner.diagonal().clamp_min(0.0)[:, None])


def _factor_blocks(changes: Sequence[Adapter], owner: Tensor) -> Iterator[PartSums]:
    for name in dict.fromkeys(name for change in changes for name in change.factors):
        held = [change.factors.get(name) for change in changes]
        for sides in (
            {k: one.down for k, one in enumerate(held) if one is not None},
            {k: one.up.T for k, one in enumerate(held) if one is not None},
        ):
            rank, width = (max(one.shape[axis] for one in sides.values()) for axis in (0, 1))
            rows = torch.zeros(len(held), rank, width, dtype=torch.float64)
            for k, one in sides.items():
                rows[k, : len(one)] = one.double().cpu()
            mean = torch.einsum("kn,nrw->krw", owner, rows)
            yield mean.flatten(1) @ mean.flatten(1).T, _where_both_changed(mean.square().sum(2))


def _dense_blocks(changes: Sequence[Mapping[str, Tensor]], owner: Tensor) -> Iterator[PartSums]:
    for name in dict.fromkeys(name for change in changes for name in change):
        held = [change.get(name) for change in changes]
        size = max(one.numel() for one in held if one is not None)
        rows = [torch.zeros(size, dtype=torch.float64) if one is None else one.double().cpu().flatten() for one in held]
        mean = owner @ torch.stack(rows)
        yield mean @ mean.T, _where_both_changed(mean.square().sum(1)[:, None])


def _where_both_changed(squares: Tensor) -> Tensor:
    """Return the squared lengths of each of K on what each other one changed too, (K, K), from those of its pieces (K, pieces)."""
    both: Tensor = squares @ (squares > 0).double().T
    return both


def _sum(blocks: Iterator[PartSums], count: int) -> PartSums:
    inner, squares = (torch.zeros(count, count, dtype=torch.float64) for _ in range(2))
    for one, other in blocks:
        inner, squares = inner + one, squares + other
    return inner, squares


def _combined(parts: Sequence[PartSums]) -> PartSums:
    """Return cosines and ratios of lengths over the parts that somebody changed."""
    used = [part for part in parts if bool((part[1] > 0).any())]
    count = len(parts[0][0])
    cosines, ratios = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for inner, squares in used:
        both = (squares * squares.T).sqrt()
        cosines += torch.where(both > 0, inner / both.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0) / len(used)
        ratio = (squares / squares.T.clamp_min(1e-300)).sqrt()
        # a part that only one of two changed says nothing of their lengths, but one that changed nothing is of length 0
        ratios = torch.maximum(ratios, torch.where(squares.T > 0, ratio, 0.0))
    return cosines, ratios


def _lengths(ratios: Tensor) -> Tensor:
    """Return the median of each one's ratios to the others that have something in common with it."""
    lengths = torch.ones(len(ratios), dtype=torch.float64)
    for k, row in enumerate(ratios):
        others = torch.cat([row[:k], row[k + 1 :]])
        others = others[others > 0]
        if len(others):
            lengths[k] = others.quantile(0.5)
    return lengths
