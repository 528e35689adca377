"""Whether epsilon is that of an oracle, and never below it.

Gaussian releases have a closed form here; their oracle is dp-accounting's privacy loss distributions. Steps on sampled batches are
composed by dp-accounting; their oracle is an integral over the loss's moment generating function (`tests.support.loss_transform`),
which is right to about 1e-11. Mixtures of both, and of Laplace noise, are asked of that one too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from fedloom.privacy.accounting import Gaussian, Laplace, PrivacyEvent, SampledGaussian, epsilon_of
from tests.support.loss_transform import oracle_epsilon

Case = tuple[Sequence[PrivacyEvent], float]
BELOW = 1e-10
"""Share by which an epsilon is below its oracle before it counts: the oracle's own rounding."""
GAUSSIAN: Sequence[tuple[float, int, float]] = (
    (1.0, 1, 1e-5),
    (4.0, 10, 1e-5),
    (10.0, 100, 1e-6),
    (0.6, 1, 1e-5),
    (6.0, 100, 1e-5),
    (50.0, 3, 1e-3),
)
"""Noise multiplier, answers of one client, delta."""
QUICK: Sequence[Case] = (
    ([SampledGaussian(16 / 240, 1.0, 150)], 1e-3),
    ([SampledGaussian(0.1, 2.0, 300)], 1e-5),
    ([SampledGaussian(0.05, 1.2, 400), Gaussian(0.3)], 1e-5),
    ([SampledGaussian(0.02, 1.1, 200), SampledGaussian(0.1, 2.0, 50), Laplace(0.2)], 1e-5),
    ([SampledGaussian(0.01, 1.0, 1000)], 1e-5),
    ([Gaussian(0.5), Laplace(0.5)], 1e-5),
)
LONG: Sequence[Case] = (
    ([SampledGaussian(0.001, 0.8, 10_000)], 1e-6),
    ([SampledGaussian(0.01, 0.6, 100)], 1e-6),
    ([SampledGaussian(0.5, 0.7, 20)], 1e-5),
    ([SampledGaussian(0.2, 5.0, 1)], 1e-5),
    ([SampledGaussian(32 / 11_400, 0.7, 2000)], 1e-5),
)


def figures(quick: bool) -> Mapping[str, object]:
    """The largest difference, and how many cases were below their oracle."""
    pairs = list(compared(quick))
    below = sum(ours < oracle * (1 - BELOW) for ours, oracle in pairs)
    return {
        "epsilon_gap": max(abs(ours - oracle) for ours, oracle in pairs),
        "below_oracle": below,
        "cases": len(pairs),
    }


def compared(quick: bool) -> Iterator[tuple[float, float]]:
    """Our epsilon and the oracle's, case by case."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    for multiplier, answers, delta in GAUSSIAN:
        ours = epsilon_of([Gaussian(1 / multiplier)] * answers, delta)
        mu = math.sqrt(answers) / multiplier
        accountant = PLDAccountant(value_discretization_interval=5e-5 * min(1.0, mu))
        accountant.compose(dp_accounting.GaussianDpEvent(1 / mu))  # one distribution: no grid is convolved
        yield shown(f"{answers} answers, z = {multiplier}", ours, float(accountant.get_epsilon(delta)))
    for events, delta in (*QUICK, *(() if quick else LONG)):
        yield shown(f"{events}", epsilon_of(events, delta, fine=True), oracle_epsilon(events, delta))


def shown(name: str, ours: float, oracle: float) -> tuple[float, float]:
    """The two, once they are printed."""
    print(f"   {ours:.9f}, oracle {oracle:.9f} ({ours - oracle:+.1e}): {name}", flush=True)
    return ours, oracle
