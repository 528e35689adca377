"""What an answer changed: the adapter that came back against the one that was sent, in factors or as products.

The one home for all that judges or shortens an answer: clipping, noise, robust rules, norm limits and sums see the same change.
It is the decoded one: what the client received (`TaskStart.train`, as its codec left it) against what the server reads.

Two coordinates. As factors, a change is an adapter, and its norm that of all entries; that bounds the model where factors are what is
averaged. As products, it is what moves the model, whatever basis the factors are in: up' @ down' - up @ down, layer by layer, held as
one product of at most twice the rank. Norms and inner products of products come from Gram matrices of their factors, so that no
matrix of the size of a layer is formed: (d_out + d_in) R^2 multiplications for K changes of total rank R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloom.core.lora import Adapter, Factor, cut_factor, map_tensors, product_difference, stack, take_sides
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
        down = torch.cat([factor.down.to(dtype) for factor in factors])
        up = torch.cat([factor.up.to(dtype) for factor in factors], 1)
        owner = torch.tensor([k for k, factor in zip(rows, factors, strict=True) for _ in range(factor.rank)])
        block = ((up.T @ up) * (down @ down.T)).double().cpu()
        found += torch.zeros_like(found).index_put_((owner[:, None], owner[None]), block, accumulate=True)
    for name in dict.fromkeys(name for change in changes for name in change.dense):
        rows = [k for k, change in enumerate(changes) if name in change.dense]
        flat = torch.stack([changes[k].dense[name].to(dtype).flatten() for k in rows])
        held = torch.tensor(rows)
        found[held[:, None], held[None]] += (flat @ flat.T).double().cpu()
    return found
