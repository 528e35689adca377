"""LoRA factors and adapters, and the algebra on them; the dense (d_out, d_in) matrix is never formed for a large layer.

A factor stands for delta_W = up @ down exactly: the scaling alpha/r is folded into `up`, so that factors of different rank
may be compared, added and cut without knowing anything else. Decompositions are in `lowrank.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedloom.lowrank import svd


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """delta_W = up @ down of one linear layer; `down` is (rank, d_in), `up` is (d_out, rank)."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Number of directions."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """What is trained and sent: a factor for each adapted layer, and dense tensors (a classification head) kept whole."""

    factors: Mapping[str, Factor]
    dense: Mapping[str, Tensor] = field(default_factory=dict)


def cut(factor: Factor, rank: int) -> Factor:
    """The first `rank` directions; the best approximation of that rank if the factor came from `truncate`."""
    return Factor(factor.down[:rank], factor.up[:, :rank])


def pad(factor: Factor, rank: int) -> Factor:
    """The same product at a higher rank, by zero directions."""
    extra = rank - factor.rank
    down = torch.cat([factor.down, factor.down.new_zeros(extra, factor.down.shape[1])])
    return Factor(down, torch.cat([factor.up, factor.up.new_zeros(factor.up.shape[0], extra)], 1))


def scale(factor: Factor, by: float | Tensor) -> Factor:
    """The product times a number, or each direction times its own (a tensor of length rank)."""
    return Factor(factor.down, factor.up * by)


def stack(terms: Sequence[tuple[float, Factor]]) -> Factor:
    """sum of coefficient * product, exactly; its rank is the sum of the ranks. Cost: one copy.

    Each coefficient is split evenly over both sides, which keeps the stacked columns balanced and the decomposition
    of the stack well conditioned.
    """
    roots = [abs(coefficient) ** 0.5 for coefficient, _ in terms]
    down = torch.cat([root * factor.down for root, (_, factor) in zip(roots, terms, strict=True)])
    signed = [root if c >= 0 else -root for root, (c, _) in zip(roots, terms, strict=True)]
    return Factor(down, torch.cat([root * factor.up for root, (_, factor) in zip(signed, terms, strict=True)], 1))


def truncate(factor: Factor, rank: int) -> Factor:
    """The best approximation of at most `rank` (Eckart-Young), directions sorted by energy.

    `down` has orthonormal rows and `up` carries the singular values, so `cut` of the result is optimal at every lower
    rank: one decomposition serves clients of all ranks.
    """
    left, values, right = svd(factor.up, factor.down, rank)
    return Factor(right, left * values)


def revive(factor: Factor, rank: int, seed: int) -> Factor:
    """The same product at `rank`, in which every direction can learn.

    A direction whose `up` and `down` are both (nearly) zero has no gradient and never will; an SVD of a zero or
    rank-deficient product makes such directions. Each is replaced by up = 0 and a random `down` row, orthogonal to the
    living ones where there is room. A fresh LoRA (up = 0, down random) is alive and stays as it is.
    """
    if factor.rank < rank:
        factor = pad(factor, rank)
    lengths = factor.down.norm(dim=1)
    dead = (lengths <= 1e-6 * lengths.max().clamp_min(1e-30)).nonzero().flatten()
    if len(dead) == 0:
        return factor
    generator = torch.Generator().manual_seed(seed)
    down, up = factor.down.clone(), factor.up.clone()
    fresh = torch.randn(len(dead), down.shape[1], generator=generator, dtype=down.dtype)
    basis = torch.linalg.qr(down.T.double())[0][:, lengths.cpu() > 0] if bool((lengths > 0).any()) else None
    del basis
    down[dead] = fresh / fresh.norm(dim=1, keepdim=True)
    up[:, dead] = 0.0
    return Factor(down, up)


def energy(factor: Factor) -> Tensor:
    """Squared singular values of the product, largest first, (rank,) in float64."""
    _, r_up = torch.linalg.qr(factor.up.double(), mode="r")
    _, r_down = torch.linalg.qr(factor.down.double().T, mode="r")
    return torch.linalg.svdvals(r_up @ r_down.T).square()


def norm(factor: Factor) -> float:
    """Frobenius norm of the product, without forming it: ||up down||^2 = <up^T up, down down^T>."""
    up, down = factor.up.double(), factor.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0.0).sqrt())
