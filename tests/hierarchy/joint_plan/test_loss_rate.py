"""Depth by what it earned, steps and rounds by what a second brings."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom import LossRate, Refused
from fedloom.hierarchy.joint_plan.group_cost import Choice, Device, GroupState, ObservedReward, Sizes
from fedloom.hierarchy.joint_plan.loss_rate import rewards_by_depth, shallowest_of_best
from tests.support.storms import tries

SIZES = Sizes(lambda d, r: 1e4 * d * r, lambda d, r: 1e5 * r, lambda d, r: 1e9 + 1e8 * d)
KNOWN: dict[str, Any] = {"mass": (1.0,) * 6, "dispersion": 1.0}
rewards = st.lists(st.floats(-1.0, 1.0), min_size=2, max_size=8)
devices = st.builds(
    lambda base, bps, memory: Device("c", tuple(base * (1 + d / 6) for d in range(1, 7)), bps, bps, memory),
    st.floats(0.05, 3.0),
    st.floats(1e6, 1e8),
    st.floats(1.2e9, 2.0e9),
)


def group(*bases: float, bps: float = 1e7, **more: Any) -> GroupState:
    """Members of these speeds, whose links are alike."""
    members = (Device("c", tuple(base * (1 + d / 6) for d in range(1, 7)), bps, bps) for base in bases)
    return GroupState(tuple(members), SIZES, **more)


def measured(one: GroupState, *pairs: tuple[int, float]) -> GroupState:
    """The group with these (depth, reward)."""
    return replace(one, inner_rewards=tuple(ObservedReward(2, depth, reward) for depth, reward in pairs), tasks=8)


@given(st.lists(devices, min_size=1, max_size=4), st.floats(0.0, 3.0), st.floats(1e7, 1e9), st.floats(1e-4, 1e-2))
@tries(40)
def test_no_other_rounds_and_steps_bring_more_a_second(
    members: list[Device], delta: float, bps: float, drift: float
) -> None:
    """f p (1 - drift delta^2 p^2 (1 + f^2 / n)) / T(f, p), by brute force; within the memory of every member."""
    one = GroupState(tuple(members), SIZES, bps, bps, delta, (1.0,) * 6)
    (choice,) = LossRate(6, 4, drift=drift)([one])

    def rate(f: int, p: int) -> float:
        lost = drift * delta**2 * p**2 * (1 + f**2 / len(one.members))
        return f * p * max(0.0, 1 - lost) / one.seconds(Choice(f, choice.depth, 8, f * p))

    best = max(rate(f, p) for f in range(1, 5) for p in range(1, 7))
    assert rate(choice.rounds, choice.steps // choice.rounds) == pytest.approx(best)
    assert all(SIZES.memory(choice.depth, 8) <= member.memory for member in one.members)
    assert choice.steps % choice.rounds == 0
    assert choice.why


@given(devices, st.floats(1.0, 9.0))
@tries(60)
def test_the_slow_do_fewer_steps_and_slow_links_let_do_more(one: Device, times: float) -> None:
    """argmax of p (1 - k p^2) / (p t + l) rises with l / t."""
    slow = replace(one, seconds=tuple(times * second for second in one.seconds))
    far = replace(one, up_bps=one.up_bps / times, down_bps=one.down_bps / times)
    usual, slower, farther = (
        LossRate(40, 1)([GroupState((member,), SIZES, **KNOWN)])[0].steps for member in (one, slow, far)
    )
    assert slower <= usual <= farther


def test_steps_are_about_a_cube_root() -> None:
    """(l / (2 k t))^(1/3) of t seconds, where an inner round costs l on links, members drift by k p^2 and reports are free."""
    one = group(1.0, 1.0, **KNOWN)
    (link, _), price = one.link_seconds(1, 8), 1e-5
    (choice,) = LossRate(100, 1, drift=price / 1.5)([one])
    assert choice.steps == pytest.approx((link / (2 * price * one.step_seconds(1)[0])) ** (1 / 3), rel=0.05)


def test_dear_reports_are_made_cheap_by_inner_rounds() -> None:
    near, dear = group(1.0, bps=1e8, **KNOWN), group(1.0, bps=1e8, up_bps=1e5, down_bps=1e6, **KNOWN)
    free, costly = LossRate()([near, dear])
    assert free.rounds < costly.rounds


@given(rewards, rewards)
def test_the_shallower_keeps_its_place_within_one_standard_error(low: list[float], high: list[float]) -> None:
    error = math.hypot(stdev(low) / len(low) ** 0.5, stdev(high) / len(high) ** 0.5)
    deeper = fmean(high) - fmean(low) > error + 1e-12
    if deeper or fmean(high) - fmean(low) < error - 1e-12:
        assert shallowest_of_best((1, 6), {1: low, 6: high}) == (6 if deeper else 1)


def test_the_first_tasks_are_shallow_and_what_is_not_known_is_tried_in_two_rounds() -> None:
    fresh = group(1.0, 2.0, **KNOWN)
    old, half = replace(fresh, tasks=4), measured(fresh, (1, 0.1), (4, 0.1))
    assert [one.depth for one in LossRate()([fresh, old, half])] == [1, 6, 6]
    assert LossRate()([old])[0].rounds >= 2
    assert {one.depth for one in LossRate(cuts=1)([fresh, old, half])} == {1}


def test_what_all_groups_measured_decides_for_each() -> None:
    flat = measured(group(1.0, **KNOWN), (1, 0.20), (4, 0.21), (6, 0.20))
    steep = measured(group(1.0, **KNOWN), (1, 0.20), (4, 0.30), (6, 0.24))
    assert rewards_by_depth([flat, steep]) == {1: [0.20, 0.20], 4: [0.21, 0.30], 6: [0.20, 0.24]}
    assert [one.depth for one in LossRate()([flat, steep])] == [4, 4]
    assert [one.depth for one in LossRate()([flat, flat])] == [4, 4], "no spread: the best itself"
    assert [one.depth for one in LossRate()([flat, measured(flat, (1, 0.22), (4, 0.20), (6, 0.20))])] == [1, 1]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"most": 0}, {"cuts": 0}, {"patience": 0}, {"drift": -1.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(wrong))):
        LossRate(**wrong)
