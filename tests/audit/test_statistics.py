"""Intervals of shares, areas and means, against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedloom.audit.statistics import at_least, auc, auc_interval, share_interval


def test_the_area_counts_ties_half() -> None:
    assert auc([1, 1], [1, 1]) == 0.5
    assert auc([2, 3], [0, 1]) == 1.0


def test_the_interval_of_a_share_is_that_of_clopper_and_pearson() -> None:
    """None of ten: 1 - 0.025^(1/10); 3 of 10: Beta(3, 8) and Beta(4, 7) at 2.5 and 97.5 %."""
    assert share_interval(0, 10) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert share_interval(10, 10) == pytest.approx((0.025**0.1, 1.0))
    assert share_interval(3, 10) == pytest.approx((0.066740, 0.652453), abs=1e-6)


def test_the_tail_of_a_binomial_is_the_sum_of_its_terms() -> None:
    expected = sum(math.comb(12, k) * 0.3**k * 0.7 ** (12 - k) for k in range(5, 13))
    assert at_least(5, 12, 0.3) == pytest.approx(expected)
    assert (at_least(0, 3, 0.2), at_least(4, 3, 0.2), at_least(2, 3, 0.0), at_least(3, 3, 1.0)) == (1, 0, 0, 1)


@pytest.mark.parametrize("separation", [0.0, 1.0])
def test_the_interval_of_an_area_holds_the_true_one_in_about_nineteen_of_twenty(separation: float) -> None:
    draw, true, right = np.random.default_rng(0), 0.5 * (1 + math.erf(separation / 2)), 0
    for _ in range(200):
        area = auc(draw.normal(separation, size=25), draw.normal(size=25))
        low, high = auc_interval(area, 25, 25)
        right += low <= true <= high
    assert 180 <= right <= 199


def test_an_area_of_one_is_no_certainty() -> None:
    low, high = auc_interval(1.0, 5, 5)
    assert 0.5 < low < 0.8
    assert high == 1.0
    assert auc_interval(0.0, 5, 5) == pytest.approx((0.0, 1 - low))
