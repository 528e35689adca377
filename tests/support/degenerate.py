"""Factors that are hard for a truncated SVD, and the error of a decomposition of them; for tests and `bench.aggregate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

D_OUT, D_IN = 300, 280
RANKS = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Case:
    """Clients' (up, down) pairs to be averaged and cut to `rank`; made on demand, the same every time."""

    name: str
    rank: int
    clients: Callable[[torch.Generator], list[tuple[Tensor, Tensor]]]

    def build(self) -> tuple[Tensor, Tensor, int]:
        """The stacked up (d_out, R) and down (R, d_in) in float32, and the rank."""
        pairs = self.clients(torch.Generator().manual_seed(0))
        root = len(pairs) ** -0.5
        up = torch.cat([up for up, _ in pairs], 1) * root
        return up.float(), (torch.cat([down for _, down in pairs]) * root).float(), self.rank


def size(up: Tensor, down: Tensor) -> float:
    """The scale of rounding in up @ down: its norm, or that of its terms where they cancel."""
    terms = up.double().norm(dim=0) * down.double().norm(dim=1)
    return max(float(terms.norm()), float((up.double() @ down.double()).norm()), 1e-30)


def measure(up: Tensor, down: Tensor, triple: tuple[Tensor, Tensor, Tensor]) -> tuple[bool, float]:
    """Whether the result is finite, and its error beyond the optimum relative to `size`."""
    left, values, right = (part.double() for part in triple)
    product = up.double() @ down.double()
    best = torch.linalg.svdvals(product)[len(values) :].norm()
    finite = all(bool(part.isfinite().all()) for part in triple)
    return finite, float((product - (left * values) @ right).norm() - best) / size(up, down)


def _normal(rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    up = torch.randn(D_OUT, rank, generator=generator, dtype=torch.float64) / D_OUT**0.5
    return up, torch.randn(rank, D_IN, generator=generator, dtype=torch.float64) / D_IN**0.5


def _many(ranks: tuple[int, ...]) -> Callable[[torch.Generator], list[tuple[Tensor, Tensor]]]:
    return lambda generator: [_normal(rank, generator) for rank in ranks]


def _copies(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    return [_normal(5, generator)] * 20


def _zeroed(up: Callable[[int], int], down: int) -> Callable[[torch.Generator], list[tuple[Tensor, Tensor]]]:
    """Twelve clients of rank 8, client k's up times `up(k)` and all downs times `down`."""
    return lambda generator: [(up(k) * b, down * a) for k, (b, a) in enumerate(_many((8,) * 12)(generator))]


def _shared_down(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    pairs = _many((16,) * 10)(generator)
    return [(up, pairs[0][1]) for up, _ in pairs]


def _graded(count: int) -> Callable[[torch.Generator], list[tuple[Tensor, Tensor]]]:
    """A spectrum from 1 to 1e-9 and near-duplicate clients: the worst for Gram matrices."""

    def clients(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        up, down = _normal(64, generator)
        left, right = torch.linalg.qr(up)[0], torch.linalg.qr(down.T)[0].T
        sizes = torch.logspace(0, -4.5, 64, dtype=torch.float64)
        noise = [(rank, *_normal(rank, generator)) for rank in (RANKS * count)[:count]]
        return [
            (left[:, :rank] * sizes[:rank] + 1e-7 * b, sizes[:rank, None] * right[:rank] + 1e-7 * a)
            for rank, b, a in noise
        ]

    return clients


def _sparse(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Only three output rows are not zero, so exact unit vectors meet the completion of a QR."""
    pairs = _many((8,) * 12)(generator)
    for up, _ in pairs:
        up[3:] = 0
    return pairs


def _equal(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Every singular value the same: any q directions are the best q, and a Krylov basis cannot grow."""
    return [(torch.linalg.qr(up)[0], torch.linalg.qr(down.T)[0].T) for up, down in [_normal(200, generator)]]


CASES = (
    Case("basis outgrows the rank", 16, _many((2, 4, 8, 16, 32))),  # the first Krylov prototype counted energy twice
    Case("20 copies of one client", 16, _copies),
    Case("up all zero", 8, _zeroed(lambda _: 0, 1)),
    Case("down all zero", 8, _zeroed(lambda _: 1, 0)),
    Case("both all zero", 8, _zeroed(lambda _: 0, 0)),
    Case("half of up zero", 8, _zeroed(lambda k: k % 2, 1)),
    Case("clients cancel", 8, lambda g: [pair for up, down in [_normal(24, g)] for pair in [(up, down), (-up, down)]]),
    Case("shared down", 16, _shared_down),
    Case("graded to 1e-9, 10 clients", 64, _graded(10)),
    Case("graded to 1e-9, 50 clients", 64, _graded(50)),
    Case("rank above the stack", 64, _many((3,))),
    Case("three living rows", 16, _sparse),
    Case("all values equal", 16, _equal),
)
