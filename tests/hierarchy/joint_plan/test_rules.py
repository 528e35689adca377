"""How often each group averages inside, how deep it trains, at which rank and for how many steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom import BestRoundTime, GradientScore, LossRate
from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.hierarchy.joint_plan.group_cost import Choice, Device, GroupState, Sizes
from fedloom.hierarchy.joint_plan.shared import JointRule
from tests.support.joint_groups import SIZES, fleets, group, groups, limit
from tests.support.storms import tries

RULES: tuple[JointRule, ...] = (GradientScore(), BestRoundTime())
each = pytest.mark.parametrize("rule", RULES, ids=["score", "best time"])


def test_a_round_lasts_as_long_as_its_slowest_member_and_both_links() -> None:
    """Methods 4b.2: T = H t + f (up + down) of the slowest, and the edge's own link; by hand."""
    one = GroupState(
        (Device("a", (1.0, 2.0), 8e5, 4e5), Device("b", (3.0, 4.0), 8e6, 8e6)),
        Sizes(lambda d, r: 1e5 * d, lambda d, r: 2e5, lambda d, r: 0.0),
        up_bps=8e5,
        down_bps=math.inf,
    )
    # a: 10 x 2 s and 4 x (2 s up + 4 s down) = 44 s; b: 10 x 4 s and 4 x (0.2 + 0.2) = 41.6 s; the edge sends 2 s
    assert one.seconds(Choice(4, 2, 8, 10)) == pytest.approx(46.0)
    assert one.seconds(Choice(1, 2, 8, 10)) == pytest.approx(42.4)


@each
@given(fleet=fleets)
@tries(25)
def test_every_choice_fits_every_members_memory(rule: JointRule, fleet: list[GroupState]) -> None:
    for one, choice in zip(fleet, rule(fleet), strict=True):
        assert all(SIZES.memory(choice.depth, choice.rank) <= member.memory for member in one.members)
        assert 1 <= choice.depth <= one.layers
        assert choice.steps % choice.rounds == 0
        assert choice.why
    assert rule(fleet) == rule(list(fleet))


@given(fleets, st.floats(0.0, 0.1))
@tries(60)
def test_scored_takes_the_best_on_the_curve_of_equal_time(fleet: list[GroupState], drift: float) -> None:
    """Methods 4b.2, R2, by brute force: the highest G(d) - drift (H / f)^2 delta^2 over all (f, d) that are in time."""
    end = limit(fleet, 10, 20)
    for one, choice in zip(fleet, GradientScore(drift=drift)(fleet), strict=True):
        scores = {}
        for depth in one.depths(8):
            for f in (1, 2, 4, 5, 10):
                if one.seconds(Choice(f, depth, 8, 20)) <= end * (1 + 1e-9):
                    total = sum(one.mass)
                    mass = sum(one.mass[:depth]) / total if total else depth / 6
                    scores[f, depth] = math.sqrt(mass) - drift * (20 / f * one.dispersion) ** 2
        if scores:
            assert scores[choice.rounds, choice.depth] == pytest.approx(max(scores.values()), abs=1e-9)
        else:
            assert (choice.rounds, choice.depth) == (1, one.depths(8)[0])


@given(groups, st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5), st.floats(1e-4, 0.1))
@tries(100)
def test_more_gradient_mass_in_lower_layers_never_means_less_depth(
    one: GroupState, moved: list[float], drift: float
) -> None:
    """Every layer below the top has at least as large a share, at the expense of the top one."""
    before = replace(one, mass=(10.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    after = replace(one, mass=(10.0 - sum(moved), *(1.0 + more for more in moved)))
    quick = group(0.2, memory=1.2e9)
    rule = GradientScore(drift=drift)
    assert rule([after, quick])[0].depth >= rule([before, quick])[0].depth


def test_depth_gives_way_to_averages_where_members_drift_apart() -> None:
    """The trade of R2: on a slow link, depth costs bytes that averages could have."""
    slow = {"bps": 3e6, "mass": (6.0, 1.0, 1.0, 1.0, 1.0, 1.0)}
    fast = group(1.2, bps=3e7)
    alike, apart = (GradientScore()([fast, group(1.0, **slow, dispersion=delta)])[1] for delta in (0.0, 2.0))
    assert alike.depth > apart.depth
    assert alike.rounds < apart.rounds


@each
def test_degenerate_groups_have_a_choice(rule: JointRule) -> None:
    one = GroupState((Device("a", (1.0,)),), SIZES)
    (alone,) = rule([one])
    assert alone.depth == 1
    assert rule([]) == ()
    assert len(rule([group(1.0, dispersion=0.0, mass=(0.0,) * 6), group(9.0, bps=math.inf)])) == 2
    twins = rule([group(1.0), group(1.0)])
    assert twins[0] == twins[1]


def test_free_links_mean_as_many_averages_as_allowed() -> None:
    (one,) = GradientScore()([group(1.0, 2.0, bps=math.inf)])
    assert (one.rounds, one.depth, one.steps) == (10, 6, 20)


def test_of_equals_the_deepest() -> None:
    (one,) = GradientScore()([group(1.0, bps=math.inf, mass=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0))])
    assert one.depth == 6


def test_a_reason_has_the_numbers_that_decided() -> None:
    (one,) = GradientScore()([group(1.0, 2.0, bps=math.inf)])
    assert one.why == (
        "gradient norm 1.00 less drift 0 is the best of 6 depths; 10 rounds of 2 steps at depth 6 take 80 s, "
        "the fastest group 80 s; the slowest of 2 members needs 4 s a step"
    )


@pytest.mark.parametrize("rule", [GradientScore, BestRoundTime, LossRate])
def test_a_rule_needs_no_arguments_and_prints_as_python(rule: Any) -> None:
    schema.check_fields(rule())
    assert eval(repr(rule()), {one.__name__: one for one in (GradientScore, rule)}) == rule()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: GradientScore(most=0), "most"),
        (lambda: GradientScore(drift=-1.0), "drift"),
        (lambda: GradientScore(drift=math.nan), "drift"),
        (lambda: Device("a", ()), "seconds"),
        (lambda: Device("a", (0.0,)), "seconds"),
        (lambda: Device("a", (1.0,), up_bps=0.0), "up_bps"),
        (lambda: Device("a", (1.0,), memory=math.nan), "memory"),
        (lambda: GroupState((), SIZES), "members"),
        (lambda: GroupState((Device("a", (1.0,)), Device("b", (1.0, 2.0))), SIZES), "members"),
        (lambda: group(1.0, mass=(1.0,)), "mass"),
        (lambda: group(1.0, dispersion=math.nan), "dispersion"),
        (lambda: group(1.0, up_bps=-1.0), "up_bps"),
        (lambda: GradientScore()([group(1.0, memory=1e9)]), "memory"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(make: Any, field: str) -> None:
    with pytest.raises(Refused, match=field):
        make()
