"""What an answer changed: the adapter that came back against the one that was sent, in factors or as products.

The one home for all that judges or shortens an answer: clipping, noise, robust rules, norm limits and sums see the same change.
It is the decoded one: what the client received (`TaskStart.train`, as its codec left it) against what the server reads.

Two coordinates. As factors, a change is an adapter, and its norm that of all entries; that bounds the model where factors are what is
averaged. As products, it is what moves the model, whatever basis the factors are in: up' @ down' - up @ down, layer by layer, held as
one product of at most twice the rank. Norms and inner products of products come from Gram matrices of their factors, so that no
matrix of the size of a layer is formed: (d_out + d_in) R^2 multiplications for K changes of total rank R.

A window of answers, of which one is new at a time, asks for the Gram matrices of the same factors again and again: `window_grams`
remembers the block of each pair. A block is one call on two tensors that nobody writes into, so that it has the same bits when it is
computed again: what is remembered is no state, and may be forgotten at any time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedloom.core.flat_buffer import FlatTensors
from fedloom.core.lora import Adapter, Factor, cut_factor, map_tensors, product_difference, stack, take_sides
from fedloom.core.truncated_svd import Grams, double_inner
from fedloom.core.types import Side, TaskStart

SIDES: tuple[Side, ...] = ("down", "up", "dense")


def euclidean_norm(adapter: Adapter) -> float:
    """Return the Euclidean norm over all entries, in float64."""
    tensors = [tensor for factor in adapter.factors.values() for tensor in (factor.down, factor.up)]
    tensors += list(adapter.dense.values())
    return float(torch.stack([torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]).norm())


def sent_part(start: TaskStart, answer: Adapter) -> Adapter:
    """Return what was sent, at the ranks of the answer: lower where its client pruned itself."""
    factors = {name: cut_factor(start.train.factors[name], factor.rank) for name, factor in answer.factors.items()}
    return Adapter(factors, start.train.dense)


def factor_change(start: TaskStart, answer: Adapter) -> Adapter:
    """Return the change of the factors and of the dense part, entry by entry, in float64; zero on sides that may not change."""
    sent = sent_part(start, answer)
    change = map_tensors(lambda new, old: new.double() - old.double(), answer, sent)
    if not start.rules.unchanged:
        return change
    zero = map_tensors(lambda one: torch.zeros_like(one, dtype=torch.float64), sent)
    return take_sides(frozenset(SIDES) - start.rules.unchanged, change, zero)


def with_change(start: TaskStart, answer: Adapter, change: Adapter) -> Adapter:
    """Return what was sent with this change of the factors, in the answer's types; sides that may not change are as sent."""
    sent = sent_part(start, answer)
    moved = map_tensors(lambda old, more, like: (old.double() + more).to(like.dtype), sent, change, answer)
    return take_sides(frozenset(SIDES) - start.rules.unchanged, moved, sent)


@dataclass(frozen=True, slots=True)
class ProductChange:
    """A change as products: what moves the model, in whatever basis its factors are.

    Fields:
        products: the change of each trained layer's product, as one product of at most twice the rank.
        dense: the change of the dense tensors (the classification head).
    """

    products: Mapping[str, Factor]
    dense: Mapping[str, Tensor]


def product_change(start: TaskStart, answer: Adapter) -> ProductChange:
    """Return the change of the products, exactly; directions that a client gave up by pruning count as taken away."""
    sent, products = start.train, dict[str, Factor]()
    for name, new in answer.factors.items():
        old = sent.factors[name]
        change = product_difference(new, cut_factor(old, new.rank))
        if new.rank < old.rank:
            change = stack([(1.0, change), (-1.0, Factor(old.down[new.rank :], old.up[:, new.rank :]))])
        products[name] = change
    return ProductChange(products, {name: new - sent.dense[name] for name, new in answer.dense.items()})


def squared_change(new: FlatTensors, old: FlatTensors) -> tuple[float, float]:
    """Return the squared norms of the change of all products and of all factors, with a few calls for all layers of a shape.

    From A and B to A + dA and B + dB the square of the change of a product, dB (A + dA) + B dA, is <dB^T dB, (A + dA) (A + dA)^T> +
    2 <dB^T B, (A + dA) dA^T> + <B^T B, dA dA^T>: nothing cancels where the change is small.
    """
    products = factors = 0.0
    grams: dict[str, dict[int, list[Tensor]]] = {"down": {}, "up": {}}
    names: dict[str, dict[int, list[str]]] = {"down": {}, "up": {}}
    for group in new.layout.groups:
        if group.side == "dense":
            continue
        after, before = group.view(new.buffer), group.view(old.buffer)
        change, kept = after - before, after if group.side == "down" else before
        if group.side == "down":
            change, kept = change.mT, kept.mT  # (layers, width, rank), as `up` is
        of_change = change.mT @ change
        factors += float(of_change.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64))
        blocks = torch.stack([of_change, change.mT @ kept, kept.mT @ kept]).double()
        grams[group.side].setdefault(change.shape[2], []).append(blocks)
        layers = [name.removesuffix(f".{group.side}") for name in group.names]
        names[group.side].setdefault(change.shape[2], []).extend(layers)
    for rank, layers in names["down"].items():
        down, up = torch.cat(grams["down"][rank], 1), torch.cat(grams["up"][rank], 1)
        if layers != names["up"][rank]:  # sides are grouped by different widths
            place = {name: k for k, name in enumerate(names["up"][rank])}
            up = up[:, [place[name] for name in layers]]
        squares = (up[0] * down[2] + 2 * up[1] * down[1].mT + up[2] * down[0]).sum((1, 2))
        products += float(squares.clamp_min(0.0).sum())
    return products, factors


def inner_products(changes: Sequence[ProductChange], dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the inner products of changes with each other, (K, K) in float64; a layer that one has not trained is zero there.

    Args:
        changes: K changes, of any ranks.
        dtype: type of the multiplications. float32 is right to 1e-7 of the norms, so distances of changes that nearly agree are not.
    """
    found = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in dict.fromkeys(name for change in changes for name in change.products):
        rows = [k for k, change in enumerate(changes) if name in change.products]
        factors = [changes[k].products[name] for k in rows]
        of_up, of_down = stacked_grams(factors, dtype)
        owner = torch.tensor([k for k, factor in zip(rows, factors, strict=True) for _ in range(factor.rank)])
        block = (of_up * of_down).double().cpu()
        found += torch.zeros_like(found).index_put_((owner[:, None], owner[None]), block, accumulate=True)
    for name in dict.fromkeys(name for change in changes for name in change.dense):
        rows = [k for k, change in enumerate(changes) if name in change.dense]
        flat = torch.stack([changes[k].dense[name].to(dtype).flatten() for k in rows])
        held = torch.tensor(rows)
        found[held[:, None], held[None]] += (flat @ flat.T).double().cpu()
    return found


def stacked_grams(factors: Sequence[Factor], dtype: torch.dtype = torch.float64) -> Grams:
    """Return the Gram matrices of `up` and `down` over all directions of all factors, (R, R), by one product of their stacks."""
    down = torch.cat([factor.down.to(dtype) for factor in factors])
    up = torch.cat([factor.up.to(dtype) for factor in factors], 1)
    return up.T @ up, down @ down.T


_BLOCKS: WeakKeyDictionary[Factor, WeakKeyDictionary[Factor, Grams]] = WeakKeyDictionary()


def window_grams(factors: Sequence[Factor]) -> Grams:
    """Return what `stacked_grams` does, in float64, pair by pair; blocks of factors that were together before are remembered."""
    of_up, of_down = list[Tensor](), list[Tensor]()
    for k, later in enumerate(factors):
        blocks = [_block(earlier, later) for earlier in factors[: k + 1]]
        for rows, side in ((of_up, 0), (of_down, 1)):
            rows.append(torch.cat([block[side] for block in blocks]))
    return _mirrored(of_up), _mirrored(of_down)


def _block(earlier: Factor, later: Factor) -> Grams:
    """The inner products of one factor's directions with those of another, (r, r') for each side; the order of the two is fixed."""
    known = _BLOCKS.setdefault(earlier, WeakKeyDictionary())
    if later not in known:
        known[later] = (double_inner(earlier.up, later.up), double_inner(earlier.down.T, later.down.T))
    return known[later]


def _mirrored(columns: Sequence[Tensor]) -> Tensor:
    """The symmetric matrix of which these are the columns down to the diagonal, factor by factor."""
    total = columns[0].new_zeros(len(columns[-1]), len(columns[-1]))
    for column in columns:
        last, first = len(column), len(column) - column.shape[1]
        total[:last, first:last] = column
        total[first:last, :last] = column.T
    return total
