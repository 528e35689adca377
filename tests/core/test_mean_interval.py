"""The interval of a mean, against Student's t as scipy has it."""

from __future__ import annotations

import math
from statistics import stdev

import pytest
from scipy.stats import t

from fedloom.core.mean_interval import half_width


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11, 31, 200])
def test_it_is_that_of_students_t(count: int) -> None:
    values = [float(number * number) for number in range(count)]
    wanted = t.ppf(0.975, count - 1) * stdev(values) / math.sqrt(count)
    assert half_width(values) == pytest.approx(wanted, rel=2e-3)


def test_one_value_tells_nothing_of_the_spread() -> None:
    assert half_width([3.0]) == math.inf
