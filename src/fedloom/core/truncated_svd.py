"""Best low-rank approximation of a product up @ down, computed from its thin factors.

`svd` is what the rest of the package calls; it picks one of the methods below, all of which answer the same question
and may be called alone. U is `up` (d_out, R), V is `down` (R, d_in), n = min(d_out, d_in), and a result is (left,
values, right): orthonormal columns (d_out, q), singular values, descending (q,), orthonormal rows (q, d_in), with
q = min(rank, R, d_out, d_in). `left` and `right` are orthonormal even where a value is zero, so that a direction
without energy can still learn.

The large products run in the dtype of the factors (at least float32); the small cores and the Gram matrices are
float64, since a Gram matrix squares the condition number and float32 would lose every value below 3e-4 of the largest.
Nothing here draws from a global generator, and the factors stay on their device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
Grams: TypeAlias = tuple[Tensor, Tensor]
"""U^T U and V V^T (R, R), each up to a positive factor."""

Reflectors: TypeAlias = tuple[Tensor, Tensor]
"""Orthogonal matrix Q as LAPACK's geqrf leaves it: vectors below the diagonal (n, k), and their scales (k,)."""

SMALL = 256
"""Side up to which a dense SVD is cheap."""

OVERSAMPLE = 8
"""Directions a Krylov block carries beyond the rank: the more, the fewer blocks."""

BLOCKS = 7
"""Krylov blocks that cost as much as an exact method on as many directions."""

RESOLUTION = 1e-13
"""Relative change of energy that float32 factors cannot show (their rounding, squared)."""

WIDE = 16
"""Times the width of a Krylov block from which on the Gram matrices of a stack cost more than the blocks that they save."""


COPIED = 2**16
"""Numbers of a factor that are copied to float64 at a time (512 kB)."""


def svd_with_energy(up: Tensor, down: Tensor, rank: int, measured: bool) -> tuple[Triple, float | None]:
    """Return `svd` and the energy of the product (squared Frobenius norm, right to 1e-6; None: neither measured nor for nothing).

    The triple is the same whether the energy is measured or not.
    """
    up, down = _floats(up, down)
    stacked, smaller = up.shape[1], min(up.shape[0], down.shape[1])
    q = min(rank, stacked, smaller)
    if q and _is_thin(stacked, smaller, q):
        return _householder(up, down, q)
    wide = stacked > WIDE * (q + OVERSAMPLE)
    near, energy = grams(up, down) if measured or not wide else (None, None)
    return svd(up, down, rank, None if wide else near), energy


def svd(up: Tensor, down: Tensor, rank: int, near: Grams | None = None) -> Triple:
    """Return the best approximation of up @ down of at most `rank`, by the cheapest method that is exact to rounding.

    Householder while the stack is thin (and for float64), the dense SVD for small layers, else Krylov, else a Gram
    matrix. A product smaller than its factors (R >= n) is formed. The thresholds are crossovers measured on a CPU; a
    full SVD of a large product is never the right call. `near`, from `grams`, saves Krylov half of its blocks.
    """
    up, down = _floats(up, down)
    smaller, stacked = min(up.shape[0], down.shape[1]), up.shape[1]
    rank = min(rank, stacked, smaller)
    if rank == 0:
        return up[:, :0], up.new_zeros(0), down[:0]
    if _is_thin(stacked, smaller, rank) or up.dtype == torch.float64:
        return householder(up, down, rank)
    if stacked >= smaller or smaller <= SMALL:
        return svd_dense(up @ down, rank)
    triple = krylov([up, down], rank, near)
    if triple is None:
        return gram(up, down, rank) if stacked <= 0.7 * smaller else dense_gram(up @ down, rank)
    return triple


def svd_dense(matrix: Tensor, rank: int) -> Triple:
    """Return `svd` of a matrix that is given whole."""
    smaller = min(matrix.shape)
    if min(rank, smaller) == 0 or smaller <= SMALL or matrix.dtype == torch.float64:
        return dense(matrix, rank)
    triple = krylov([matrix], rank) if smaller > BLOCKS * (rank + OVERSAMPLE) else None
    return triple or dense_gram(matrix, rank)


def dense(matrix: Tensor, rank: int) -> Triple:
    """Return the truncated SVD from all singular values, in float64: for small layers only."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left[:, :rank].to(matrix.dtype), values[:rank].to(matrix.dtype), right[:rank].to(matrix.dtype)


def householder(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Return the SVD by that of R_U R_V^T, where U = Q_U R_U and V^T = Q_V R_V. Exact for every R; O((d_out + d_in) R^2 + R^3).

    The Q are never formed: their reflectors are applied to the q columns that are kept. For a zero product `right`
    spans rows of `down`, so a fresh LoRA keeps its random directions.
    """
    return _householder(up, down, rank)[0]


def _householder(up: Tensor, down: Tensor, rank: int) -> tuple[Triple, float]:
    """`householder`, and the energy of the product, which the core's singular values are."""
    reflect_up, core_up = _reflectors(up)
    reflect_down, core_down = _reflectors(down.T)
    left, values, right = torch.linalg.svd(core_up.double() @ core_down.double().T, full_matrices=False)
    q, energy = min(rank, len(values)), float(values.square().sum())
    left, right = left[:, :q].to(up.dtype), right[:q].to(up.dtype)
    return (_reflect(reflect_up, left), values[:q].to(up.dtype), _reflect(reflect_down, right.T).T), energy


def krylov(
    product: Sequence[Tensor], rank: int, near: Grams | None = None, tolerance: float = 1e-6, blocks: int = 12
) -> Triple | None:
    """Return the SVD by adaptive block Krylov on an implicit product: O(blocks (d_out + d_in) R q); None if it did not converge.

    `product` is (up, down), or a matrix alone. Each block asks it for directions that the basis does not have yet (Musco
    and Musco, 2015, with a stopping rule). It stops when a block raises the energy of the top q by less than `tolerance`
    of the energy that the basis holds beyond q. That tail is a lower bound of the squared truncation error, so the rule
    is on the safe side. The first block is random, or comes from the Gram matrices `near` of both factors.
    """
    d_out, d_in, first = product[0].shape[0], product[-1].shape[1], product[0]
    width = min(rank + OVERSAMPLE, d_out, *(part.shape[1] for part in product))
    q = min(rank, width)
    probe = _normal(d_in, width, first) if near is None else _leading(product[-1], near, width)
    reflectors, rows, last = (first.new_zeros(d_out, 0), first.new_zeros(0)), first.new_zeros(0, d_in), None
    squares = first.new_zeros(0, 0, dtype=torch.float64)
    for _ in range(blocks):
        reflectors, fresh = _extend(reflectors, _times(product, probe))
        rows = torch.cat([rows, _under(fresh.T, product)])
        cross = double_inner(rows.T, rows[-width:].T)
        squares = torch.cat([torch.cat([squares, cross[:-width].T]), cross], 1)
        energies, axes = torch.linalg.eigh(squares)
        top, tail = float(energies[-q:].sum()), float(energies[:-q].sum())
        if last is not None and top - last <= max(tolerance * tail, RESOLUTION * top):
            chosen = axes[:, -q:].to(first.dtype)
            return _sorted(_reflect(reflectors, chosen), chosen.T @ rows)
        if len(rows) + width > min(d_out, d_in):
            return None
        # orthonormal rows, not the rows themselves: a graded spectrum is not squared, and a tiny one does not underflow
        last, probe = top, torch.linalg.qr(rows[-width:].T)[0]
    return None


def gram(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Return the SVD by the eigenvectors of S^T (U^T U) S with V V^T = S S^T, in float64, and one projection: O((d_out + d_in) R^2).

    The projection restores orthogonality and makes the error second order in that of the eigenvectors.
    """
    mix = leading_mix(double_inner(up, up), double_inner(down.T, down.T), min(rank, up.shape[0], down.shape[1]))
    return _project((up, down), up @ mix.to(up.dtype))


def leading_mix(of_up: Tensor, of_down: Tensor, rank: int) -> Tensor:
    """Return how the columns of `up` mix (R, q) to span the leading left directions of the product; Gram matrices in float64."""
    root, failed = torch.linalg.cholesky_ex(of_down)
    if bool(failed):  # dependent directions; any other root of the same matrix serves as well, at five times the cost
        squares, axes = torch.linalg.eigh(of_down)
        root = axes * squares.clamp_min(0.0).sqrt()
    top: Tensor = root @ torch.linalg.eigh(root.T @ of_up @ root)[1][:, -rank:]
    return top


def sum_from_grams(
    ups: Sequence[Tensor], downs: Sequence[Tensor], weights: Tensor, squares: Grams, rank: int
) -> tuple[Triple, float]:
    """Return the SVD of a weighted sum of products, and its energy, from the Gram matrices of all their factors together.

    Each factor is read where it lies, so that nothing is stacked.

    Args:
        ups: (d_out, r) of each product.
        downs: (r, d_in) of each.
        weights: weight of each direction, in float64 (R,), with R the sum of all r.
        squares: U^T U and V V^T of all directions, without weights, in float64 (R, R).
        rank: directions of the result, at most.
    """
    weights, dtype = weights.to(squares[0].device), torch.promote_types(ups[0].dtype, torch.float32)
    ups, downs = [up.to(dtype) for up in ups], [down.to(dtype) for down in downs]
    of_up, of_down = weights[:, None] * squares[0] * weights, squares[1]
    q = min(rank, len(weights), ups[0].shape[0], downs[0].shape[1])
    mix = (weights[:, None] * leading_mix(of_up, of_down, q)).to(dtype)
    places, shares = [up.shape[1] for up in ups], weights.to(dtype)
    span = ups[0].new_zeros(len(ups[0]), q)
    for up, part in zip(ups, torch.split(mix, places), strict=True):
        span.addmm_(up, part)
    basis, rows = torch.linalg.qr(span)[0], downs[0].new_zeros(q, downs[0].shape[1])
    for up, down, share in zip(ups, downs, torch.split(shares, places), strict=True):
        rows.addmm_((basis.T @ up) * share, down)
    return _sorted(basis, rows), float((of_up * of_down).sum())


def _floats(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return both factors in one type, float32 or higher."""
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    return up.to(dtype), down.to(dtype)


def _is_thin(stacked: int, smaller: int, rank: int) -> bool:
    """Whether so few directions are stacked that Householder is the cheapest method."""
    if smaller <= SMALL:
        return stacked <= 0.5 * smaller
    return stacked <= min(smaller, max(0.05 * smaller, BLOCKS * (rank + OVERSAMPLE)))


def dense_gram(matrix: Tensor, rank: int) -> Triple:
    """Return the SVD of a matrix by the eigenvectors of its smaller float64 Gram matrix: O(d_out d_in n + n^3)."""
    if matrix.shape[0] > matrix.shape[1]:
        right, values, left = dense_gram(matrix.T, rank)
        return left.T, values, right.T
    top = torch.linalg.eigh(double_inner(matrix.T, matrix.T))[1][:, -min(rank, len(matrix)) :]
    return _project([matrix], top.to(matrix.dtype))


def grams(up: Tensor, down: Tensor) -> tuple[Grams, float]:
    """Return U^T U and V V^T, each up to a positive factor, and the squared Frobenius norm of up @ down, right to 1e-6."""
    of_up, size_up = _scaled_gram(up)
    of_down, size_down = _scaled_gram(down.T)
    return (of_up, of_down), float((of_up.double() * of_down).sum()) * size_up * size_down


def _scaled_gram(tall: Tensor) -> tuple[Tensor, float]:
    """Return tall^T tall / size in float32 or higher, and the size: the largest entry, so that nothing under- or overflows."""
    tall = tall.to(torch.promote_types(tall.dtype, torch.float32))
    size, total = float(tall.abs().max()) or 1.0, tall.new_empty(tall.shape[1], tall.shape[1])
    for start in range(0, tall.shape[1], 128):  # only the blocks on and above the diagonal
        stop = start + 128
        block = (tall[:, start:stop] / size).T @ tall[:, start:]
        total[start:stop, start:], total[start:, start:stop] = block, block.T
    return total, size


def _leading(down: Tensor, near: Grams, width: int) -> Tensor:
    """Return orthonormal columns (d_in, width) near the leading right directions of the product.

    Six steps of subspace iteration in the R coordinates of the factors, where a step costs R / (d_out + d_in) of one of
    Krylov: V^T U^T U V (V^T x) = V^T (U^T U) (V V^T) x. Too coarse to be an answer (the condition number is squared).
    """
    of_up, of_down = ((gram / (float(gram.abs().max()) or 1.0)).to(down.dtype) for gram in near)
    block = _normal(len(of_up), width, down)
    for _ in range(6):
        block = torch.linalg.qr(of_up @ (of_down @ block))[0]
    probe: Tensor = torch.linalg.qr(down.T @ block)[0]
    return probe


def _normal(rows: int, columns: int, like: Tensor) -> Tensor:
    """Return random entries, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype).to(like.device)


def _times(product: Sequence[Tensor], columns: Tensor) -> Tensor:
    """Return the product times `columns`, factor by factor from the right."""
    for part in reversed(product):
        columns = part @ columns
    return columns


def _under(rows: Tensor, product: Sequence[Tensor]) -> Tensor:
    """Return `rows` times the product, factor by factor from the left."""
    for part in product:
        rows = rows @ part
    return rows


def _project(product: Sequence[Tensor], span: Tensor) -> Triple:
    """Return the best approximation of the product whose columns lie in those of `span` (d_out, q)."""
    span = torch.linalg.qr(span)[0]
    return _sorted(span, _under(span.T, product))


def _sorted(span: Tensor, rows: Tensor) -> Triple:
    """Return the SVD of span @ rows, where `span` (d_out, q) has orthonormal columns."""
    axes, core = torch.linalg.qr(rows.T)
    left, values, right = torch.linalg.svd(core.double().T)
    return span @ left.to(span.dtype), values.to(span.dtype), right.to(span.dtype) @ axes.T


def _extend(reflectors: Reflectors, columns: Tensor) -> tuple[Reflectors, Tensor]:
    """Return the basis with as many directions more as there are columns, and these directions.

    The basis is the Q of a QR that grows by blocks and is kept as reflectors. Its columns are orthonormal whatever
    `columns` are: where the product's rank is exhausted what is left of them is rounding noise, and a projection would
    leave it with a part along the basis, whose energy would count twice.
    """
    packed, scales = reflectors
    size = len(scales)
    turned = torch.ormqr(packed, scales, columns, transpose=True) if size else columns
    more, factors = torch.geqrf(turned[size:])
    # by columns, as LAPACK wants it: ormqr would copy the other order at every call
    packed = torch.cat([packed.T, torch.cat([turned[:size], more]).T]).T
    scales = torch.cat([scales, factors])
    last = torch.eye(len(scales), dtype=columns.dtype, device=columns.device)[:, size:]
    return (packed, scales), _reflect((packed, scales), last)


def double_inner(one: Tensor, other: Tensor) -> Tensor:
    """Return one^T other in float64, by blocks of rows, so that no float64 copy of a tall matrix (n, k) is made."""
    total = one.new_zeros(one.shape[1], other.shape[1], dtype=torch.float64)
    rows = max(512, COPIED // max(1, one.shape[1], other.shape[1]))
    for start in range(0, len(one), rows):
        total.addmm_(one[start : start + rows].double().T, other[start : start + rows].double())
    return total


def _reflectors(tall: Tensor) -> tuple[Reflectors, Tensor]:
    """Return the QR of `tall` (n, k): Q as reflectors, and the triangular factor (min(n, k), k)."""
    packed, scales = torch.geqrf(tall)
    return (packed[:, : len(scales)], scales), packed[: len(scales)].triu()


def _reflect(reflectors: Reflectors, columns: Tensor) -> Tensor:
    """Return Q @ columns, where `columns` (min(n, k), q) are coordinates in the columns of Q."""
    packed, scales = reflectors
    padded = columns.new_zeros(columns.shape[1], packed.shape[0]).T
    padded[: columns.shape[0]] = columns
    return torch.ormqr(packed, scales, padded)
