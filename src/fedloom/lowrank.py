"""The best low-rank approximation of a product up @ down, found from its thin factors.

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

from typing import TypeAlias

import torch
from torch import Tensor

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]

SMALL = 256
"""Side up to which a dense SVD is cheap."""

OVERSAMPLE = 8
"""Directions a Krylov block carries beyond the rank: the more, the fewer blocks."""

RESOLUTION = 1e-13
"""Relative change of energy that float32 factors cannot show (their rounding, squared)."""


def svd(up: Tensor, down: Tensor, rank: int) -> Triple:
    """The best approximation of up @ down of at most `rank`, by the cheapest method that is exact to rounding.

    Householder while the stack is thin (and for float64), the dense SVD for small layers, else Krylov, else a Gram
    matrix. The thresholds are crossovers measured on a CPU; a full SVD of a large product is never the right call.
    """
    dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
    up, down = up.to(dtype), down.to(dtype)
    smaller, stacked = min(up.shape[0], down.shape[1]), up.shape[1]
    if min(rank, stacked, smaller) == 0:
        return up[:, :0], up.new_zeros(0), down[:0]
    thin = 0.5 * smaller if smaller <= SMALL else min(smaller, max(0.05 * smaller, 7 * (rank + OVERSAMPLE)))
    if stacked <= thin or dtype == torch.float64:
        return householder(up, down, rank)
    if smaller <= SMALL:
        return dense(up, down, rank)
    return krylov(up, down, rank) or (gram if stacked <= 0.7 * smaller else dense_gram)(up, down, rank)


def dense(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Form the product and decompose it: O(d_out d_in (R + n)). For small layers only."""
    left, values, right = torch.linalg.svd((up @ down).double(), full_matrices=False)
    q = min(rank, up.shape[1], len(values))
    return left[:, :q].to(up.dtype), values[:q].to(up.dtype), right[:q].to(up.dtype)


def householder(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Exact for every R: the SVD of R_U R_V^T, where U = Q_U R_U and V^T = Q_V R_V; O((d_out + d_in) R^2 + R^3).

    The Q are never formed: their reflectors are applied to the q columns that are kept. For a zero product `right`
    spans rows of `down`, so a fresh LoRA keeps its random directions.
    """
    reflect_up, core_up = _reflectors(up)
    reflect_down, core_down = _reflectors(down.T)
    left, values, right = torch.linalg.svd(core_up.double() @ core_down.double().T, full_matrices=False)
    q = min(rank, len(values))
    left, right = left[:, :q].to(up.dtype), right[:q].to(up.dtype)
    return _reflect(reflect_up, left), values[:q].to(up.dtype), _reflect(reflect_down, right.T).T


def krylov(up: Tensor, down: Tensor, rank: int, tolerance: float = 1e-6, blocks: int = 12) -> Triple | None:
    """Adaptive block Krylov on the implicit product: O(blocks (d_out + d_in) R q); None if it did not converge.

    Each block asks the product for directions that the basis does not have yet (Musco and Musco, 2015, with a stopping
    rule). It stops when a block raises the energy of the top q by less than `tolerance` of the energy that the basis
    holds beyond q. That tail is a lower bound of the squared truncation error, so the rule is on the safe side.
    """
    width = min(rank + OVERSAMPLE, *up.shape, down.shape[1])
    q = min(rank, width)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(down.shape[1], width, generator=generator, dtype=up.dtype).to(up.device)
    basis, rows, last = up[:, :0], down[:0], None
    for _ in range(blocks):
        fresh = _extend(basis, up @ (down @ probe))
        if fresh is not None:
            basis, rows = torch.cat([basis, fresh], 1), torch.cat([rows, (fresh.T @ up) @ down])
        energies, axes = torch.linalg.eigh(_gram(rows.T))
        top, tail = float(energies[-q:].sum()), float(energies[:-q].sum())
        if fresh is None or (last is not None and top - last <= max(tolerance * tail, RESOLUTION * top)):
            return _project(up, down, basis @ axes[:, -q:].to(up.dtype))
        if basis.shape[1] + width > min(up.shape[0], down.shape[1]):
            return None
        # orthonormal rows, not the rows themselves: a graded spectrum is not squared, and a tiny one does not underflow
        last, probe = top, torch.linalg.qr(rows[-width:].T)[0]
    return None


def gram(up: Tensor, down: Tensor, rank: int) -> Triple:
    """The eigenvectors of S^T (U^T U) S with V V^T = S S^T, all in float64, then one projection: O((d_out + d_in) R^2).

    The projection restores orthogonality and makes the error second order in that of the eigenvectors.
    """
    squares, axes = torch.linalg.eigh(_gram(down.T))
    root = axes * squares.clamp_min(0.0).sqrt()
    top = torch.linalg.eigh(root.T @ _gram(up) @ root)[1][:, -min(rank, up.shape[0], down.shape[1]) :]
    return _project(up, down, up @ (root @ top).to(up.dtype))


def dense_gram(up: Tensor, down: Tensor, rank: int) -> Triple:
    """Form the product, then the eigenvectors of its smaller float64 Gram matrix: for R near n or above it."""
    if up.shape[0] > down.shape[1]:
        right, values, left = dense_gram(down.T, up.T, rank)
        return left.T, values, right.T
    top = torch.linalg.eigh(_gram((up @ down).T))[1][:, -min(rank, *up.shape) :]
    return _project(up, down, top.to(up.dtype))


def _project(up: Tensor, down: Tensor, span: Tensor) -> Triple:
    """The best approximation of up @ down whose columns lie in those of `span` (d_out, q)."""
    span = torch.linalg.qr(span)[0]
    axes, core = torch.linalg.qr(((span.T @ up) @ down).T)
    left, values, right = torch.linalg.svd(core.double().T)
    return span @ left.to(up.dtype), values.to(up.dtype), right.to(up.dtype) @ axes.T


def _extend(basis: Tensor, found: Tensor) -> Tensor | None:
    """Orthonormal columns that add those of `found` to `basis`; None if it holds them all already, to rounding."""
    residual = found - basis @ (basis.T @ found)
    # largest entries, not norms: the square of a tiny or huge float32 is 0 or infinite
    if basis.shape[1] and residual.abs().max() <= 8 * torch.finfo(found.dtype).eps * found.abs().max():
        return None
    # the last columns of a Householder Q are orthogonal to the basis whatever the residual is: where the product's rank
    # is exhausted it is rounding noise, and projecting that leaves noise along the basis, whose energy counts twice
    reflectors, triangle = _reflectors(torch.cat([basis, residual], 1))
    last = torch.eye(len(triangle), dtype=found.dtype, device=found.device)[:, basis.shape[1] :]
    return _reflect(reflectors, last)


def _gram(tall: Tensor) -> Tensor:
    """tall^T tall in float64, by blocks of rows, so that no float64 copy of `tall` (n, k) is made."""
    total = tall.new_zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, len(tall), 512):
        wide = tall[start : start + 512].double()
        total.addmm_(wide.T, wide)
    return total


def _reflectors(tall: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The QR of `tall` (n, k) with Q left as reflectors, and its triangular factor (min(n, k), k)."""
    packed, scales = torch.geqrf(tall)
    return (packed[:, : len(scales)], scales), packed[: len(scales)].triu()


def _reflect(reflectors: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """Q @ columns, where `columns` (min(n, k), q) are coordinates in the columns of Q."""
    packed, scales = reflectors
    padded = columns.new_zeros(packed.shape[0], columns.shape[1])
    padded[: columns.shape[0]] = columns
    return torch.ormqr(packed, scales, padded)
