"""LoRA factors and adapters, and the algebra on them: cut, pad, stack, sum, truncate, measure.

A factor stands for delta_W = up @ down exactly: the scaling alpha/r is folded into `up`, so that factors of different
rank may be compared, added and cut without knowing anything else. A large layer's dense (d_out, d_in) matrix is formed only where
it is smaller than the factors that it is the product of. Decompositions are in `truncated_svd`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import copysign

import torch
from torch import Tensor

from fedloom.core.flat_buffer import FlatTable, FlatTensors, buffer_layout
from fedloom.core.truncated_svd import svd, svd_dense, svd_with_energy

NEGLIGIBLE = 1e-6
"""Length, relative to the longest, under which both sides of a direction are lost in the product's float32 rounding."""

CHUNK = 1024
"""Directions below which a product of thin factors is slower than their stack's."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Factor:
    """Low-rank change of one linear layer, delta_W = up @ down.

    Fields:
        down: (rank, d_in), A in the papers.
        up: (d_out, rank), B in the papers, with the scaling alpha/r in it.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Adapter:
    """Trained weights: a factor for each adapted layer, and dense tensors.

    Nobody writes into its tensors, so that what was found out about an adapter (its sha256, that it was checked) stays true. Those of
    an adapter with many layers usually lie in one buffer (`lay_flat`), and its tables are views of it.

    Fields:
        factors: by layer, its low-rank change.
        dense: by name, tensors that are trained and sent whole (a classification head).
    """

    factors: Mapping[str, Factor]
    dense: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def flat(self) -> FlatTensors | None:
        """The buffer with all tensors and nothing else; None: they lie apart."""
        factors, dense = self.factors, self.dense
        if type(factors) is not FlatTable or type(dense) is not FlatTable:  # a third of the cost of `isinstance`
            return None
        return factors.flat if factors.flat is dense.flat else None


def named_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the adapter's tensors under flat names: `NAME.down`, `NAME.up`, and `dense:NAME`."""
    if adapter.flat is not None:
        return dict(adapter.flat.tensors())
    flat = {f"{name}.down": factor.down for name, factor in adapter.factors.items()}
    flat |= {f"{name}.up": factor.up for name, factor in adapter.factors.items()}
    return flat | {f"dense:{name}": tensor for name, tensor in adapter.dense.items()}


def view_as_adapter(flat: FlatTensors) -> Adapter:
    """Return the adapter whose tensors lie in this buffer."""
    return Adapter(FlatTable(flat, "layers", _factor_views), FlatTable(flat, "dense", _dense_views))


FEW = 5
"""Tensors below which an adapter stays as it is: there is nothing to do together."""


def lay_flat(adapter: Adapter, in_any_order: bool = False) -> Adapter:
    """Return the adapter with its tensors copied into one buffer; itself if they lie in one.

    It stays as it is with few tensors, and where they differ in type or device, ask for a gradient, or are not contiguous: products
    round by the order in memory. Figures must not depend on that, since a part of a larger tensor is contiguous when it came in a
    message: they are taken of adapters that are laid flat `in_any_order`.
    """
    if 2 * len(adapter.factors) + len(adapter.dense) < FEW or adapter.flat is not None:
        return adapter
    tensors = named_tensors(adapter)
    kinds = {(one.dtype, one.device) for one in tensors.values()}
    if len(kinds) != 1 or any(one.requires_grad for one in tensors.values()):
        return adapter
    if not in_any_order and not all(one.is_contiguous() for one in tensors.values()):
        return adapter
    downs = tuple((name, tuple(factor.down.shape)) for name, factor in adapter.factors.items())
    ups = tuple((name, tuple(factor.up.shape)) for name, factor in adapter.factors.items())
    dense = tuple((name, tuple(tensor.shape)) for name, tensor in adapter.dense.items())
    return view_as_adapter(FlatTensors.copied(tensors, buffer_layout(downs, ups, dense)))


def same_buffers(adapters: Iterable[Adapter]) -> list[FlatTensors] | None:
    """Return the buffers of adapters that have one layout, type and device; None where one has not, or has no buffer."""
    found = list[FlatTensors]()
    for adapter in adapters:
        flat = adapter.flat
        if flat is None or not (found[0] if found else flat).same_form(flat):
            return None
        found.append(flat)
    return found


def _factor_views(flat: FlatTensors) -> dict[str, Factor]:
    tensors = flat.tensors()
    return {name: Factor(tensors[f"{name}.down"], tensors[f"{name}.up"]) for name in flat.layout.layers}


def _dense_views(flat: FlatTensors) -> dict[str, Tensor]:
    return {name: flat.tensor(f"dense:{name}") for name in flat.layout.dense}


def from_tensors(like: Adapter, flat: Mapping[str, Tensor]) -> Adapter:
    """Return the adapter of `named_tensors`, with the layers of `like` in their order."""
    factors = {name: Factor(flat[f"{name}.down"], flat[f"{name}.up"]) for name in like.factors}
    return Adapter(factors, {name: flat[f"dense:{name}"] for name in like.dense})


def cut_factor(factor: Factor, rank: int) -> Factor:
    """Return the first `rank` directions; the best approximation of that rank if the factor came from `truncate`."""
    return factor if rank >= factor.rank else Factor(factor.down[:rank], factor.up[:, :rank])


def cut_adapter(adapter: Adapter, rank: int) -> Adapter:
    """Return the first `rank` directions of every layer; the adapter itself where it has no more."""
    whole = adapter.flat
    ranks = whole.layout.ranks if whole else {factor.rank for factor in adapter.factors.values()}
    if all(one <= rank for one in ranks):
        return adapter
    return Adapter({name: cut_factor(factor, rank) for name, factor in adapter.factors.items()}, adapter.dense)


def take_sides(sides: Collection[str], new: Adapter, old: Adapter) -> Adapter:
    """Return `new` on these sides ("down", "up", "dense") and `old` on the others; it is `old` itself without sides."""
    if not sides:
        return old
    factors = {
        name: Factor(
            new.factors[name].down if "down" in sides else factor.down,
            new.factors[name].up if "up" in sides else factor.up,
        )
        for name, factor in old.factors.items()
    }
    return Adapter(factors, new.dense if "dense" in sides else old.dense)


def pad(factor: Factor, rank: int) -> Factor:
    """Return the same product at a higher rank, by zero directions."""
    extra = rank - factor.rank
    if not extra:
        whole = factor.down.is_contiguous() and factor.up.is_contiguous()
        return factor if whole else Factor(factor.down.contiguous(), factor.up.contiguous())
    down = torch.cat([factor.down, factor.down.new_zeros(extra, factor.down.shape[1])])
    return Factor(down, torch.cat([factor.up, factor.up.new_zeros(factor.up.shape[0], extra)], 1))


def scale_product(factor: Factor, by: float | Tensor) -> Factor:
    """Return the product times a number, or each direction times its own (a tensor of length rank)."""
    return Factor(factor.down, factor.up * by)


def stack(terms: Sequence[tuple[float, Factor]]) -> Factor:
    """Return the sum of coefficient * product, exactly; its rank is the sum of the ranks. Cost: one copy.

    Each coefficient is split evenly over both sides, which keeps the stacked columns balanced and the decomposition
    of the stack well conditioned.
    """
    roots = [abs(coefficient) ** 0.5 for coefficient, _ in terms]
    signed = [copysign(root, coefficient) for root, (coefficient, _) in zip(roots, terms, strict=True)]
    down = torch.cat([root * factor.down for root, (_, factor) in zip(roots, terms, strict=True)])
    return Factor(down, torch.cat([root * factor.up for root, (_, factor) in zip(signed, terms, strict=True)], 1))


def sum_products(terms: Iterable[tuple[float, Factor]]) -> Factor | Tensor:
    """Return the sum of coefficient * product, exactly: a stack, or the matrix itself (d_out, d_in) where that is smaller.

    Terms are taken one by one and added up in chunks, so that beside them never more is held than some three matrices of
    that size, however many there are. The sum is in float32 or higher.
    """
    matrix, pending, width = None, list[tuple[float, Factor]](), 0
    for coefficient, factor in terms:
        pending.append((coefficient, factor))
        width += factor.rank
        if width >= max(CHUNK, *_sides(factor)):
            matrix, pending, width = _formed(stack(pending), matrix), [], 0
    if matrix is None and width < min(_sides(pending[0][1])):
        return stack(pending)
    return _formed(stack(pending), matrix) if pending or matrix is None else matrix


def truncate(factor: Factor, rank: int) -> Factor:
    """Return the best approximation of at most `rank` (Eckart-Young), directions sorted by energy.

    `down` has orthonormal rows and `up` carries the singular values, so `cut_factor` of the result is optimal at every
    lower rank: one decomposition serves clients of all ranks.
    """
    left, values, right = svd(factor.up, factor.down, rank)
    return Factor(right, left * values)


def truncate_sum(
    terms: Iterable[tuple[float, Factor]], rank: int, measured: bool = True
) -> tuple[Factor, float | None]:
    """Return `truncate` of a sum, and the sum's energy (squared Frobenius norm), right to 1e-6.

    Where the energy is not `measured` it may be None; the factor is the same.
    """
    sum_, energy = sum_products(terms), None
    if isinstance(sum_, Tensor):
        left, values, right = svd_dense(sum_, rank)
        if measured:
            energy = sum(float(rows.double().square().sum()) for rows in torch.split(sum_, 512))
    else:
        (left, values, right), energy = svd_with_energy(sum_.up, sum_.down, rank, measured)
    return Factor(right, left * values), energy


def balance(factor: Factor) -> Factor:
    """Return the same product with both sides of each direction equally long, so that one step size suits both.

    A direction with a (nearly) empty side stays as it is: scaling it would make the other side empty too.
    """
    up, down = factor.up.norm(dim=0), factor.down.norm(dim=1)
    alive = torch.minimum(up, down) > NEGLIGIBLE * torch.maximum(up, down).max().clamp_min(1e-30)
    root = torch.where(alive, (up / torch.where(alive, down, 1.0)).sqrt(), 1.0)
    return Factor(factor.down * root[:, None], factor.up / root)


def revive(factor: Factor, rank: int, seed: int) -> Factor:
    """Return the same product at `rank` or more directions, every one of which can learn.

    The gradient of `up` is proportional to `down` and that of `down` to `up`, so a direction is dead only if both are
    (nearly) zero, as after `pad`; it then gets up = 0 and a random `down` row as long as its living neighbours (their
    median; 1 if none lives), orthogonal to them where there is room. A fresh LoRA (up = 0, down random) is alive.
    """
    if factor.rank < rank:
        factor = pad(factor, rank)
    lengths = torch.linalg.vector_norm(factor.down, dim=1)
    plain = lengths.tolist()
    if min(plain) > 2 * NEGLIGIBLE * max(plain):  # implies that all directions are present, and is much cheaper
        return factor
    present = lengths > NEGLIGIBLE * lengths.max()
    if bool(present.all()):
        return factor
    ups = factor.up.norm(dim=0)
    dead = ~present & (ups <= NEGLIGIBLE * ups.max())
    if not bool(dead.any()):
        return factor
    rows = _fresh_rows(factor.down[~dead], int(dead.sum()), seed)
    down, up = factor.down.clone(), factor.up.clone()
    down[dead] = rows * (lengths[present].median() if bool(present.any()) else 1.0)
    up[:, dead] = 0.0
    return Factor(down, up)


def initial_factor(like: Factor, rank: int, seed: int) -> Factor:
    """Return a LoRA at its start: `up` zero, `down` random orthogonal rows as long as those of `like` (their median)."""
    rows = _fresh_rows(like.down[:0], rank, seed) * like.down.norm(dim=1).median()
    return Factor(rows, like.up.new_zeros(like.up.shape[0], rank))


def compact(product: Factor | Tensor) -> Factor:
    """Return the same product with no more directions than a matrix of its size can have: a wide one as itself times identity."""
    if isinstance(product, Factor):
        if product.rank <= min(_sides(product)):
            return product
        product = _formed(product, None)
    d_out, d_in = product.shape
    eye = torch.eye(min(d_out, d_in), dtype=product.dtype, device=product.device)
    return Factor(product, eye) if d_out <= d_in else Factor(eye, product)


def stack_with_fold(adapter: Adapter, fold: Adapter | None) -> Adapter:
    """Return adapter and fold as one adapter, stacked; a layer that only one of them holds is as it is there."""
    if fold is None:
        return adapter
    trained, folded = adapter.factors, fold.factors
    both = {name: stack([(1.0, factor), (1.0, folded[name])]) for name, factor in trained.items() if name in folded}
    return Adapter({**trained, **folded, **both}, adapter.dense)


def compact_with_fold(adapter: Adapter, fold: Adapter | None) -> Adapter:
    """Return adapter and fold as one adapter of no more directions than needed: the whole change of the base model."""
    both = stack_with_fold(adapter, fold)
    return Adapter({name: compact(factor) for name, factor in both.factors.items()}, both.dense)


def pad_to_one_rank(adapter: Adapter, rank: int | None = None) -> Adapter:
    """Return the same products with one rank for all layers, by zero directions: this one, or the highest of them."""
    rank, flat = rank or server_rank(adapter), adapter.flat
    if flat is not None and flat.layout.ranks <= {rank}:
        return adapter
    return Adapter({name: pad(factor, rank) for name, factor in adapter.factors.items()}, adapter.dense)


def map_tensors(rule: Callable[..., Tensor], *adapters: Adapter) -> Adapter:
    """Apply `rule` to every tensor of adapters of one shape."""
    first = adapters[0]
    factors = {
        name: Factor(
            rule(*(adapter.factors[name].down for adapter in adapters)),
            rule(*(adapter.factors[name].up for adapter in adapters)),
        )
        for name in first.factors
    }
    dense = {name: rule(*(adapter.dense[name] for adapter in adapters)) for name in first.dense}
    return Adapter(factors, dense)


def server_rank(adapter: Adapter) -> int:
    """Return the highest rank of the adapter's layers: what the server keeps unless a method says otherwise."""
    if adapter.flat is not None:
        return max(adapter.flat.layout.ranks)
    return max(factor.rank for factor in adapter.factors.values())


def energy_spectrum(factor: Factor) -> Tensor:
    """Return the squared singular values of the product, largest first, (min(rank, d_out, d_in),) in float64."""
    values: Tensor = torch.linalg.svdvals(_core(factor))
    return values.square()


def product_norm(factor: Factor) -> float:
    """Return the Frobenius norm of the product, in float64, safe where terms of a stack cancel."""
    return float(_core(factor).norm())


def product_difference(new: Factor, old: Factor) -> Factor:
    """Return the difference of the products, new - old.

    At equal ranks it is B'A' - BA = (B' - B) A' + B (A' - A), so that nothing cancels where they are near.
    """
    if new.rank != old.rank:
        return stack([(1.0, new), (-1.0, old)])
    return Factor(torch.cat([new.down, new.down - old.down]), torch.cat([new.up - old.up, old.up], 1))


def _sides(factor: Factor) -> tuple[int, int]:
    """d_out and d_in."""
    return factor.up.shape[0], factor.down.shape[1]


def _formed(factor: Factor, onto: Tensor | None) -> Tensor:
    """The product itself in float32 or higher, added to `onto` in place."""
    dtype = torch.promote_types(torch.promote_types(factor.up.dtype, factor.down.dtype), torch.float32)
    matrix = factor.up.to(dtype) @ factor.down.to(dtype)
    return matrix if onto is None else onto.add_(matrix)


def _core(factor: Factor) -> Tensor:
    """Return a matrix of at most (rank, rank) with the singular values of the product: R_u R_d^T of the QR of both sides."""
    of_up: Tensor = torch.linalg.qr(factor.up.double(), mode="r").R
    of_down: Tensor = torch.linalg.qr(factor.down.double().T, mode="r").R
    return of_up @ of_down.T


def _fresh_rows(living: Tensor, count: int, seed: int) -> Tensor:
    """`count` random rows of length 1, orthogonal to `living` (k, d_in) and to each other if k + count <= d_in."""
    generator = torch.Generator().manual_seed(seed)
    fresh: Tensor = torch.randn(count, living.shape[1], generator=generator, dtype=torch.float64).to(living.device)
    if len(living) + count <= living.shape[1]:
        fresh = torch.linalg.qr(torch.cat([living.double(), fresh]).T)[0].T[-count:]
    fresh = fresh / fresh.norm(dim=1, keepdim=True)
    return fresh.to(living.dtype)
