"""Laws 6, 7 and 8 for a schedule above and a schedule below, in storms of events: members and edges come, go, answer and fail."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.policies import Schedule
from fedloom.hierarchy.tree_state import Link
from tests.support import toys
from tests.support.storms import tries
from tests.support.tree_storm import PLAIN, STORM, run_tree_storm, storm_tree

every_pair = pytest.mark.parametrize(
    ("above", "below"), list(itertools.product(PLAIN, PLAIN)), ids=lambda one: type(one).__name__
)


@every_pair
@given(script=STORM, crowd=st.booleans())
@tries(10)
def test_a_storm(above: Schedule, below: Schedule, script: list[tuple[str, int, float]], crowd: bool) -> None:
    run_tree_storm(storm_tree(above, below), script, crowd)


@pytest.mark.slow
@pytest.mark.parametrize("above", toys.schedules(), ids=toys.called)
@given(data=st.data(), script=STORM)
@tries(150)
def test_a_storm_of_every_pair(above: Schedule, data: st.DataObject, script: list[tuple[str, int, float]]) -> None:
    below = data.draw(st.sampled_from(toys.schedules()))
    method = data.draw(st.sampled_from((FedIT(), ProductDelta())))
    link = data.draw(st.sampled_from((None, Link(2e4, 1e4))))
    run_tree_storm(storm_tree(above, below, method=method, rounds=data.draw(st.integers(1, 4)), link=link), script)
