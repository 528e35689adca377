"""The second oracle of epsilon agrees with what is known exactly, and our epsilon with it, from above."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from fedloom.privacy.accounting import Gaussian, Laplace, PrivacyEvent, SampledGaussian, epsilon_of
from tests.support.loss_transform import chernoff, delta_of, log_moments, oracle_epsilon

Floats = NDArray[np.float64]


def tail(x: Floats) -> Floats:
    """Chance that a standard normal number is above x."""
    return np.vectorize(math.erfc)(x / math.sqrt(2)) / 2


def one_step(epsilon: Floats, rate: float, z: float) -> Floats:
    """Delta of one sampled step, a record taken away: outputs above x lose more than epsilon, so it is P(x) - exp(epsilon) Q(x)."""
    inside = (np.exp(epsilon) - 1 + rate) / rate
    x = np.where(inside > 0, z * z * np.log(np.maximum(inside, 1e-300)) + 0.5, -np.inf)
    with_record = (1 - rate) * tail(x / z) + rate * tail((x - 1) / z)
    return with_record - np.exp(epsilon) * tail(x / z)


def with_gaussian(epsilon: float, rate: float, z: float, mu: float) -> float:
    """Delta of a sampled step beside a Gaussian release: that of the step, at what the other has left, over all its losses."""
    x, step = np.linspace(mu - 10, mu + 10, 40001, retstep=True)
    density = np.exp(-((x - mu) ** 2) / 2) / math.sqrt(2 * math.pi)
    return float((density * one_step(epsilon - mu * x + mu * mu / 2, rate, z)).sum() * step)


@pytest.mark.parametrize(
    ("multiplier", "answers", "delta", "known"),
    [
        (1, 1, 1e-5, 4.377178),
        (4, 10, 1e-5, 3.341409),
        (10, 100, 1e-6, 4.886554),
    ],
)  # by dp-accounting's PLD, 6 digits
def test_the_oracle_has_the_known_epsilons_of_gaussian_releases(
    multiplier: int, answers: int, delta: float, known: float
) -> None:
    assert oracle_epsilon([Gaussian(math.sqrt(answers) / multiplier)], delta) == pytest.approx(known, abs=1e-6)


def test_the_oracle_has_the_known_epsilon_of_ten_answers_and_two_histograms() -> None:
    """By dp-accounting's PLD, 4 digits."""
    events = [Gaussian(math.sqrt(10) / 4), Laplace(1.0), Laplace(0.5)]
    assert oracle_epsilon(events, 1e-5) == pytest.approx(4.6071, abs=1e-4)


@pytest.mark.parametrize(("rate", "z", "epsilon"), [(0.1, 1.0, 1.5), (0.5, 2.0, 1.0), (0.02, 0.8, 2.0)])
def test_the_oracle_has_the_exact_delta_of_a_step_beside_a_release(rate: float, z: float, epsilon: float) -> None:
    moments = log_moments([SampledGaussian(rate, z), Gaussian(0.7)], added=False)
    found, exact = delta_of(moments, epsilon), with_gaussian(epsilon, rate, z, 0.7)
    assert found.value == pytest.approx(exact, rel=1e-8)
    assert found.aliasing < 1e-12 * found.value
    assert chernoff(moments, epsilon) >= exact


def test_moments_of_a_step_are_those_of_the_binomial_sum() -> None:
    """At whole powers: Mironov, Talwar and Zhang, arXiv 1908.10530, section 3.3; and the mean of a circle is its centre's."""
    rate, z, power = 0.1, 1.3, 6
    terms = [
        math.comb(power, k) * (1 - rate) ** (power - k) * rate**k * math.exp(k * (k - 1) / (2 * z * z))
        for k in range(power + 1)
    ]
    circle = power - 1 + np.exp(2j * np.pi * np.arange(64) / 64)
    at = np.concatenate([[power - 1 + 0j], circle])
    found = np.exp(log_moments([SampledGaussian(rate, z, 1)], added=False)(at))
    assert found[0] == pytest.approx(math.fsum(terms), rel=1e-12)
    assert found[1:].mean() == pytest.approx(math.fsum(terms), rel=1e-12)


def test_finer_points_change_nothing() -> None:
    events: list[PrivacyEvent] = [SampledGaussian(0.1, 2.0, 30), Gaussian(0.3), Laplace(0.2)]
    moments = log_moments(events, added=False)
    assert delta_of(moments, 2.0, finer=2).value == pytest.approx(delta_of(moments, 2.0).value, rel=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ([SampledGaussian(16 / 240, 1.0, 150)], 1e-3),
        ([SampledGaussian(0.05, 1.2, 400), Gaussian(0.3)], 1e-5),
        ([SampledGaussian(0.02, 1.1, 50), Laplace(0.2)], 1e-5),
    ],
)
def test_epsilon_of_sampled_steps_is_the_oracle_s_and_never_below(events: list[PrivacyEvent], delta: float) -> None:
    gap = epsilon_of(events, delta) / oracle_epsilon(events, delta) - 1
    assert -1e-10 < gap < 1e-6
