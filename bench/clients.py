"""The clients of the aggregation benchmark, their aggregate, and how far from the best it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fedloom.aggregate.shared.product_space import best_approximation
from fedloom.core.lora import Factor, energy_spectrum, stack

ALPHA = 16.0
MIXED = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Case:
    """One Linear(d_in, d) and the LoRA rank of each client; d_in is d unless it is given."""

    d: int
    ranks: tuple[int, ...]
    time_bar: float | None = None
    memory_bar: float | None = None
    wide: int | None = None

    @property
    def d_in(self) -> int:
        return self.wide or self.d

    @property
    def slow(self) -> bool:
        """Whether a dense SVD takes so long that one run must do."""
        return self.d > 2048

    @property
    def rank(self) -> int:
        return max(self.ranks)

    @property
    def facts(self) -> dict[str, int]:
        """What the figures of a case are about."""
        shape = {"d": self.d} if self.d_in == self.d else {"d": self.d, "d_in": self.d_in}
        return {**shape, "clients": len(self.ranks), "sum_rank": sum(self.ranks), "rank": self.rank, "q": self.rank}

    def __str__(self) -> str:
        span = "..".join(str(rank) for rank in sorted({min(self.ranks), self.rank}))
        shape = str(self.d) if self.d_in == self.d else f"{self.d}x{self.d_in}"
        return f"d={shape}  clients={len(self.ranks)}  ranks={span}  sum of ranks={sum(self.ranks)}"


def draw_ranks(clients: int) -> tuple[int, ...]:
    """Ranks drawn evenly from 2..64; 50 clients have 1,030 directions together, 1,000 have 20,732."""
    generator = torch.Generator().manual_seed(0)
    return tuple(MIXED[i] for i in torch.randint(0, len(MIXED), (clients,), generator=generator).tolist())


def make_clients(case: Case) -> list[Factor]:
    """A (r, d_in) and B (d, r) of each client, as PEFT holds them: the scaling alpha/r is not yet in B.

    Each is a decaying signal that all clients share, plus noise of its own: the slow decay past q is what an inexact
    method gets wrong.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, 65).float().rsqrt()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / sqrt(case.d)

    down, up = sizes[:, None] * normal(64, case.d_in), sizes * normal(case.d, 64)
    return [Factor(down[:r] + 0.3 * normal(r, case.d_in), up[:, :r] + 0.3 * normal(case.d, r)) for r in case.ranks]


def weighted(case: Case) -> list[tuple[float, Factor]]:
    """The clients with their coefficients: equal weights times alpha/r."""
    return [(ALPHA / client.rank / len(case.ranks), client) for client in make_clients(case)]


def server_call(case: Case) -> Callable[[], Factor]:
    """The aggregate as a server does it: truncated once at the highest rank, energy before and after for its log."""
    terms = weighted(case)
    return lambda: best_approximation(terms, case.rank)[0]


def worst_gap(case: Case, result: Factor) -> float:
    """error / optimal error - 1 in float64, the worst over the client ranks, each a cut of `result`.

    error^2 = |M|^2 - 2 <M, kept> + |kept|^2, which float64 resolves to 1e-15 of |M|^2.
    """
    left, right = result.up.double(), result.down.double()
    terms = [(weight, Factor(client.down.double(), client.up.double())) for weight, client in weighted(case)]
    if sum(case.ranks) < case.d:
        sum_ = stack(terms)
        squares, inside = energy_spectrum(sum_), ((left.T @ sum_.up) * (right @ sum_.down.T)).sum(1)
    else:
        dense = torch.zeros(case.d, case.d_in, dtype=torch.float64)
        for weight, client in terms:
            dense.addmm_(client.up, client.down, alpha=weight)
        squares, inside = torch.linalg.eigvalsh(dense @ dense.T).flip(0), (left.T @ dense * right).sum(1)
    kept = (left.T @ left) * (right @ right.T)

    def error(rank: int) -> float:
        squared = float(squares.sum() - 2 * inside[:rank].sum() + kept[:rank, :rank].sum())
        return sqrt(squared)

    return max(error(rank) / float(squares[rank:].sum().sqrt()) - 1 for rank in set(case.ranks))
