"""A budget's learning rate is that of the rank that it has in the end, whoever lowered it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.types import Budget, Profile
from fedloom.hierarchy.edge import MemberBudget
from fedloom.hierarchy.hierarchy import EdgeBudget
from fedloom.hierarchy.secure_edge import SharedRanks
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank, RandomRank
from tests.support.toys import adapter, fleet, make_task

CLIENT = Profile("a", 10)


def test_the_runs_learning_rate_is_that_of_the_largest_rank_unless_the_rule_says_which() -> None:
    rank = RandomRank(2, 8)
    for number in range(20):
        budget = Plan(rank, rate=RateByRank(0.5))(CLIENT, fleet(dispatched={"a": number}))
        assert budget.rate_multiple == pytest.approx((8 / budget.rank) ** 0.5)
    assert Plan(FixedRank(8), rate=RateByRank(0.5))(CLIENT, fleet()).rate_multiple == 1.0
    assert Plan(FixedRank(8), rate=RateByRank(1.0, 16))(CLIENT, fleet()).rate_multiple == 2.0
    assert Plan(FixedRank(8))(CLIENT, fleet()) == Budget(8, 10)


@given(st.integers(1, 8))
def test_who_is_given_a_lower_rank_trains_at_its_rate(most: int) -> None:
    plan, limited = Plan(FixedRank(8), rate=RateByRank(0.5)), replace(CLIENT, most=Budget(most, 10))
    outer = make_task(adapter(most), most)
    lowered = [
        plan(CLIENT, fleet()).at_most(limited.most),
        MemberBudget(plan)(CLIENT, fleet(outer=outer)),
        EdgeBudget(plan, most, 1)(CLIENT, fleet()),
        SharedRanks(plan, 3)(limited, fleet(idle={"a": limited})),
    ]
    assert {budget.rank for budget in lowered} == {most}
    assert {budget.rate_multiple for budget in lowered} == {(8 / most) ** 0.5}
