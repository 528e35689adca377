"""The learning rate of an adapter follows its rank: (reference / r) ** power times that of the run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.core.rate_by_rank import RateByRank, rate_bounds

RANKS, POWERS = st.integers(1, 256), st.floats(0.0, 2.0)


@given(POWERS, RANKS, RANKS, RANKS)
def test_ranks_alike_have_rates_alike_and_smaller_ones_larger(
    power: float, reference: int, one: int, other: int
) -> None:
    rule = RateByRank(power, reference)
    assert rule.multiple(reference) == 1.0
    assert math.isclose(rule.multiple(one) / rule.multiple(other), (other / one) ** power, rel_tol=1e-9)
    assert RateByRank(0.0, reference).multiple(one) == 1.0


@given(POWERS, RANKS, RANKS, st.data())
def test_the_bounds_are_those_of_all_ranks_and_of_a_head(
    power: float, reference: int, largest: int, data: st.DataObject
) -> None:
    rule = RateByRank(power, reference)
    least, most = rate_bounds(rule, largest)
    assert least <= min(1.0, rule.multiple(data.draw(st.integers(1, largest)))) <= most
    assert {least, most} <= {1.0, rule.multiple(1), rule.multiple(largest)}
    assert rate_bounds(None, largest) == (1.0, 1.0)


@pytest.mark.parametrize(("power", "reference"), [(-0.1, None), (2.1, 8), (math.nan, 8), (0.5, 0), (0.5, 2**21)])
def test_other_rules_are_refused(power: float, reference: int | None) -> None:
    with pytest.raises(Refused, match=r"plan\.rate\."):
        RateByRank(power, reference)


def test_without_a_reference_there_is_no_rate() -> None:
    with pytest.raises(ValueError, match="reference"):
        RateByRank().multiple(4)
