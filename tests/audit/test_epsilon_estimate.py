"""Estimates and bounds of epsilon: right for Gaussians, never above what was there, and an alarm that only a fault sets off."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedloom.audit.epsilon_estimate import certified_epsilon, estimate_epsilon, guessed_epsilon
from fedloom.privacy.accounting import gaussian_epsilon

DELTA, CUTS = 1e-5, tuple(0.25 * step for step in range(-4, 17))


def test_two_gaussians_have_the_epsilon_of_their_distance() -> None:
    inside = list[bool]()
    for seed in range(5):
        draw = np.random.default_rng(seed)
        found = estimate_epsilon(draw.normal(1.0, size=200), draw.normal(size=200), DELTA, CUTS)
        true = gaussian_epsilon(1.0, DELTA)
        assert found.low <= found.estimate <= found.high
        assert found.surely <= found.low
        assert found.certified < true
        assert not found.contradicts(true)
        inside.append(found.low <= true <= found.high)
    assert sum(inside) >= 4


def test_an_estimate_a_little_above_epsilon_is_no_fault_and_one_far_above_it_is() -> None:
    scores = np.random.default_rng(0).normal(size=400)
    found = estimate_epsilon(scores + 1.05, scores[::-1], DELTA, CUTS)
    assert found.separation == pytest.approx(1.05 / np.std(scores, ddof=1))
    true = gaussian_epsilon(found.separation - 0.05, DELTA)
    assert found.estimate > true
    assert not found.contradicts(true)
    assert found.contradicts(gaussian_epsilon(found.separation / 2, DELTA))


def test_scores_that_tell_nothing_or_are_too_few() -> None:
    same = [1.0] * 10
    found = estimate_epsilon(same, same, DELTA, CUTS)
    assert (found.estimate, found.certified) == (0.0, 0.0)
    with pytest.raises(ValueError, match="two canaries"):
        estimate_epsilon([1.0], [0.0], DELTA, CUTS)


def test_perfect_separation_of_a_hundred_certifies_no_more_than_their_number_allows() -> None:
    """All of 100 in and none of 100 out, at 10 cuts, two directions: log(p / (1 - p)) with p = (0.05 / 20 / 2)^(1/100)."""
    cuts = np.linspace(0.1, 0.9, 10)
    least = (0.05 / 20 / 2) ** 0.01
    assert certified_epsilon(np.ones(100), np.zeros(100), 0.0, cuts) == pytest.approx(
        math.log(least / (1 - least)), rel=1e-6
    )
    assert certified_epsilon(np.ones(100), np.zeros(100), 0.0, cuts) == certified_epsilon(
        -np.zeros(100), -np.ones(100), 0.0, -cuts
    )


def test_guesses_certify_what_randomised_response_allows() -> None:
    """All of 100 right, without a delta: p^100 = 0.05 for p = 1 / (1 + exp(-epsilon)). Half right: nothing."""
    p = 0.05**0.01
    assert guessed_epsilon(100, 100, 100, 0.0) == pytest.approx(math.log(p / (1 - p)), rel=1e-6)
    assert guessed_epsilon(200, 100, 50, 1e-5) == 0.0
    assert guessed_epsilon(1000, 100, 100, 1e-3) < guessed_epsilon(1000, 100, 100, 0.0)


def test_guesses_of_a_mechanism_certify_less_than_its_epsilon() -> None:
    """Randomised response with epsilon 1, 500 coins: the bound holds with 95 % confidence."""
    above = 0
    for seed in range(40):
        right = int(np.random.default_rng(seed).binomial(500, 1 / (1 + math.exp(-1.0))))
        above += guessed_epsilon(500, 500, right, 0.0) > 1.0
    assert above <= 5
