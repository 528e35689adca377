"""Epsilon: known values, dp-accounting as a second opinion, and that nothing is ever below the truth."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.privacy.accounting import (
    Gaussian,
    Laplace,
    PureEpsilon,
    SampledGaussian,
    epsilon_of,
    gaussian_delta,
    gaussian_epsilon,
    merged_events,
    multiplier_for,
)

DELTAS = st.sampled_from([1e-9, 1e-6, 1e-5, 1e-3, 0.1])


@pytest.mark.parametrize(
    ("multiplier", "answers", "delta", "expected"),
    [(1, 1, 1e-5, 4.377178), (4, 10, 1e-5, 3.341409), (10, 100, 1e-6, 4.886554)],  # by dp-accounting's PLD, 6 digits
)
def test_gaussian_answers_have_the_known_epsilon(multiplier, answers, delta, expected):
    events = [Gaussian(1 / multiplier)] * answers
    assert epsilon_of(events, delta) == pytest.approx(expected, abs=1e-6)


def exact_delta(epsilon, mu):
    """Balle and Wang 2018, Theorem 8, with 60 digits."""
    import mpmath

    with mpmath.workdps(60):
        e, m = mpmath.mpf(epsilon), mpmath.mpf(mu)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


@given(st.floats(1e-4, 40), DELTAS)
def test_epsilon_of_a_gaussian_is_the_truth_rounded_up(mu, delta):
    epsilon = gaussian_epsilon(mu, delta)
    assert exact_delta(epsilon, mu) <= delta
    if epsilon:
        assert exact_delta(epsilon * (1 - 1e-6), mu) > delta


@given(st.floats(1e-3, 30), st.floats(0, 100))
def test_delta_of_a_gaussian_is_never_below_the_truth(mu, epsilon):
    found, exact = gaussian_delta(epsilon, mu), exact_delta(epsilon, mu)
    assert exact <= found <= float(exact) * (1 + 1e-6) + 1e-13


@given(st.lists(st.floats(0, 3), max_size=8), st.randoms(use_true_random=False))
def test_events_may_come_in_any_order_and_one_by_one(mus, shuffle: random.Random):
    events = [Gaussian(mu) for mu in mus]
    together = epsilon_of(events, 1e-5)
    shuffle.shuffle(events)
    one_by_one = ()
    for event in events:
        one_by_one = merged_events((*one_by_one, event))
    assert epsilon_of(one_by_one, 1e-5) == pytest.approx(together, rel=1e-9, abs=1e-9)


def test_sampling_at_rate_one_and_without_records_are_what_they_say():
    assert merged_events([SampledGaussian(1.0, 2.0, 4), Gaussian(0.0)]) == (Gaussian(1.0),)
    assert merged_events(
        [SampledGaussian(0.1, 2.0, 4), SampledGaussian(0.1, 2.0, 6), SampledGaussian(0.0, 1.0, 9)]
    ) == (SampledGaussian(0.1, 2.0, 10),)
    assert epsilon_of([], 1e-5) == epsilon_of([Laplace(0.0), PureEpsilon(0.0)], 1e-5) == 0.0


@pytest.mark.parametrize("epsilon", [math.nan, math.inf, -1.0])
def test_an_event_that_is_none_is_refused(epsilon):
    for kind in (Gaussian, Laplace, PureEpsilon):
        with pytest.raises(Refused):
            kind(epsilon)
    with pytest.raises(Refused):
        SampledGaussian(0.1, epsilon)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_none_is_refused(delta):
    with pytest.raises(Refused, match="delta"):
        epsilon_of([Gaussian(1.0)], delta)


def test_what_protects_nobody_is_infinite():
    assert epsilon_of([Gaussian(1e6)], 1e-5) == math.inf


@pytest.mark.parametrize(("answers", "expected"), [(1, 0.60), (10, 1.90), (100, 6.00)])
def test_noise_for_epsilon_eight_is_the_known_one(answers, expected):
    found = multiplier_for(8, 1e-5, lambda z: [Gaussian(1 / z)] * answers)
    assert found == pytest.approx(expected, abs=0.005)
    assert epsilon_of([Gaussian(1 / found)] * answers, 1e-5) <= 8


# With dp-accounting ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_budget_of_answers_histogram_and_counts():
    events = [Gaussian(math.sqrt(10) / 4), Laplace(1.0), Laplace(0.5)]
    assert epsilon_of(events, 1e-5) == pytest.approx(4.6071, abs=1e-4)
    pure = epsilon_of([events[0], PureEpsilon(1.0), PureEpsilon(0.5)], 1e-5)
    assert (
        4.6071 < pure < epsilon_of(events[:1], 1e-5) + 1.5
    )  # geometric noise costs more than continuous, and less than added up


@pytest.mark.slow
def test_the_closed_form_is_not_below_the_library():
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    for mu, delta in ((1.0, 1e-5), (math.sqrt(10) / 4, 1e-5), (2.5, 1e-6)):
        accountant = PLDAccountant()
        accountant.compose(dp_accounting.GaussianDpEvent(1 / mu))
        theirs, ours = accountant.get_epsilon(delta), epsilon_of([Gaussian(mu)], delta)
        assert 0 <= ours - theirs <= 1e-6


@pytest.mark.slow
def test_sampled_steps_without_sampling_are_gaussian():
    """A rate just below 1 costs as much as no sampling: the library and the closed form meet."""
    sampled = epsilon_of([SampledGaussian(1 - 1e-9, 4.0, 10)], 1e-5)
    assert sampled == pytest.approx(epsilon_of([Gaussian(math.sqrt(10) / 4)], 1e-5), rel=1e-3)


def test_a_delta_that_rounding_would_reach_is_refused():
    with pytest.raises(Refused, match="too small"):
        epsilon_of([SampledGaussian(0.1, 1.0, 10_000)], 1e-12)
