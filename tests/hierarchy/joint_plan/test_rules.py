"""How often each group averages inside, how deep it trains, at which rank and for how many steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.hierarchy.joint_plan.bandit import Bandit
from fedloom.hierarchy.joint_plan.gradient_score import GradientScore
from fedloom.hierarchy.joint_plan.group_cost import Choice, Device, GroupState, Observed, Sizes
from fedloom.hierarchy.joint_plan.joint_memory import JointMemory
from fedloom.hierarchy.joint_plan.shared import Joint
from fedloom.hierarchy.joint_plan.time_aligned import TimeAligned
from tests.support.storms import tries

SIZES = Sizes(
    up=lambda depth, rank: 1e4 * depth * rank,
    down=lambda depth, rank: 1e5 * rank,
    memory=lambda depth, rank: 1e9 + 1e8 * depth + 1e6 * depth * rank,
)
DIVIDED = TimeAligned(work_grows=False, steps=20, most=10)
GROWING = TimeAligned(steps=20, most=5)
EVERY: tuple[Joint, ...] = (GROWING, DIVIDED, GradientScore(), Bandit(), JointMemory())
each = pytest.mark.parametrize("rule", EVERY, ids=["growing", "divided", "scored", "bandit", "memory"])


def line(base: float, layers: int = 6) -> tuple[float, ...]:
    """t(d) = a + b d, as HierFedLoRA's cost model has it, with b = a / layers."""
    return tuple(base * (1 + depth / layers) for depth in range(1, layers + 1))


def group(*bases: float, bps: float = 1e7, memory: float = math.inf, **more: Any) -> GroupState:
    """Members of these speeds behind one kind of link."""
    members = (Device(f"c{place}", line(base), bps, bps, memory) for place, base in enumerate(bases))
    return GroupState(tuple(members), SIZES, **more)


devices = st.builds(
    lambda base, up, down, memory: Device("c", line(base), up, down, memory),
    st.floats(0.05, 3.0),
    st.floats(1e6, 1e8),
    st.floats(1e6, 1e8) | st.just(math.inf),
    st.floats(1.2e9, 2.0e9),
)
groups = st.builds(
    lambda members, dispersion, mass, up: GroupState(
        tuple(members), SIZES, up, up, dispersion, tuple(mass), (5.0, 2.0, 1.0)
    ),
    st.lists(devices, min_size=1, max_size=4),
    st.floats(0.0, 3.0),
    st.lists(st.floats(0.0, 9.0), min_size=6, max_size=6),
    st.floats(1e7, 1e9) | st.just(math.inf),
)
fleets = st.lists(groups, min_size=1, max_size=4)


def limit(fleet: Sequence[GroupState], most: int, steps: int, rank: int = 8) -> float:
    """T*: the fastest group at its most rounds and the depth that its memory allows."""
    return min(one.seconds(Choice(most, one.depths(rank)[-1], rank, steps)) for one in fleet)


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
def test_every_choice_fits_every_members_memory(rule: Joint, fleet: list[GroupState]) -> None:
    for one, choice in zip(fleet, rule(fleet), strict=True):
        assert all(SIZES.memory(choice.depth, choice.rank) <= member.memory for member in one.members)
        assert 1 <= choice.depth <= one.layers
        assert choice.steps % choice.rounds == 0
        assert choice.why
    assert rule(fleet) == rule(list(fleet))


@given(fleets)
@tries(60)
def test_work_that_grows_ends_within_one_inner_round_of_the_fastest(fleet: list[GroupState]) -> None:
    """ParallelSFL, Eq. 17: in time, and one more inner round would be late; one round at the least depth if nothing is in time."""
    end, part = limit(fleet, 5, 20), 4
    for one, choice in zip(fleet, GROWING(fleet), strict=True):
        more = replace(choice, rounds=choice.rounds + 1, steps=choice.steps + part)
        assert choice.steps == part * choice.rounds
        assert choice.rounds == 5 or one.seconds(more) > end * (1 - 1e-6)
        deeper = [depth for depth in one.depths(8) if depth > choice.depth]
        assert all(one.seconds(Choice(1, depth, 8, part)) > end * (1 - 1e-6) for depth in deeper)
        late = one.seconds(choice) > end * (1 + 1e-6)
        assert not late or (choice.rounds, choice.depth) == (1, one.depths(8)[0])


@given(fleets)
@tries(60)
def test_work_that_is_divided_ends_within_one_divisor_of_the_fastest(fleet: list[GroupState]) -> None:
    """Methods 4b.2, R1: f(d) by brute force over all that it can be."""
    end = limit(fleet, 10, 20)
    for one, choice in zip(fleet, DIVIDED(fleet), strict=True):
        timely = [
            (depth, f)
            for depth in one.depths(8)
            for f in (1, 2, 4, 5, 10)
            if one.seconds(Choice(f, depth, 8, 20)) <= end * (1 + 1e-9)
        ]
        assert (choice.depth, choice.rounds) == max(timely, default=(one.depths(8)[0], 1))
        assert choice.steps == 20


@given(groups, st.floats(1.0, 4.0), st.sampled_from([GROWING, DIVIDED]))
@tries(60)
def test_a_slower_group_never_averages_more_often_at_the_same_depth(
    one: GroupState, slower: float, rule: TimeAligned
) -> None:
    late = replace(
        one,
        members=tuple(replace(m, seconds=tuple(slower * step for step in m.seconds)) for m in one.members),
    )
    end = limit([one, late], rule.most, rule.steps)
    for depth in one.depths(8):
        assert rule._rounds(late, end, depth) <= rule._rounds(one, end, depth)
    quick, slow = rule([one, late])
    assert (slow.depth, slow.rounds) <= (quick.depth, quick.rounds)


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
    alike = [replace(state, dispersion=0.0) for state in (before, after)]
    for rule, (shallow, deep) in ((GradientScore(drift=drift), (before, after)), (JointMemory(most=4), alike)):
        assert rule([deep, quick])[0].depth >= rule([shallow, quick])[0].depth


def test_depth_gives_way_to_averages_where_members_drift_apart() -> None:
    """The trade of R2: on a slow link, depth costs bytes that averages could have."""
    slow = {"bps": 3e6, "mass": (6.0, 1.0, 1.0, 1.0, 1.0, 1.0)}
    fast = group(1.2, bps=3e7)
    alike, apart = (GradientScore()([fast, group(1.0, **slow, dispersion=delta)])[1] for delta in (0.0, 2.0))
    assert alike.depth > apart.depth
    assert alike.rounds < apart.rounds


def play(reward: Callable[[Choice, int], float], rounds: int, rule: Bandit) -> list[Choice]:
    """What a bandit chooses, round after round, for one group."""
    one, chosen = group(1.0), list[Choice]()
    for turn in range(rounds):
        (choice,) = rule([one])
        chosen.append(choice)
        seen = Observed(choice.rounds, choice.depth, reward(choice, turn))
        one = replace(one, observed=(*one.observed, seen))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_a_bandits_regret_falls(seed: int) -> None:
    """Stationary noisy rewards: in the last third less is lost than in the first, and less than half of what chance loses."""

    def mean(choice: Choice) -> float:
        return 0.01 * (choice.depth / 6 + (0.5 if choice.rounds == 4 else 0.0))

    def reward(choice: Choice, turn: int) -> float:
        return mean(choice) + 0.0005 * rng(seed, "reward", turn).gauss(0.0, 1.0)

    chosen = play(reward, 90, Bandit())
    lost = [0.015 - mean(choice) for choice in chosen]
    chance = 0.015 - sum(mean(Choice(f, d, 8, 20)) for f, d in Bandit().arms(group(1.0))) / 6
    assert sum(lost[60:]) < 0.8 * sum(lost[:30])
    assert sum(lost[60:]) / 30 < 0.5 * chance


def test_a_bandit_follows_what_has_become_better() -> None:
    """Discounting: after a change of the best arm it is the favourite within twenty rounds."""
    chosen = play(lambda choice, turn: float((choice.rounds == 4) == (turn < 40)) + choice.depth / 20, 80, Bandit())
    assert sum(choice.rounds == 4 for choice in chosen[20:40]) > 14
    assert sum(choice.rounds == 1 for choice in chosen[60:]) > 14


def test_a_bandit_tries_everything_once_the_deepest_first() -> None:
    chosen = play(lambda choice, turn: 0.0, 6, Bandit())
    assert [(c.rounds, c.depth) for c in chosen] == [(4, 6), (1, 6), (4, 4), (1, 4), (4, 2), (1, 2)]


@given(fleets)
@tries(25)
def test_memory_rule_is_the_best_by_brute_force(fleet: list[GroupState]) -> None:
    """Over every rank, depth, number of rounds and of steps that is in the fastest group's time and in memory."""
    rule = JointMemory(most=3, ranks=(2, 4), drift=1e-2, steps=9)
    ranks = [max(rank for rank in (2, 4) if SIZES.memory(1, rank) <= min(m.memory for m in g.members)) for g in fleet]
    end = min(limit([one], 3, 9, rank) for one, rank in zip(fleet, ranks, strict=True))
    for one, choice in zip(fleet, rule(fleet), strict=True):
        every = [
            Choice(rounds, depth, rank, rounds * part)
            for rank in (2, 4)
            for depth in one.depths(rank)
            for rounds in (1, 2, 3)
            for part in range(1, 41)
        ]
        timely = [each for each in every if one.seconds(each) <= end * (1 + 1e-9)]
        if timely:
            best = max(rule.progress(one, each) for each in timely)
            assert rule.progress(one, choice) >= best - 1e-9 * abs(best)
            assert one.seconds(choice) <= end * (1 + 1e-6)
        else:
            assert (choice.rounds, choice.steps, choice.rank) == (1, 1, 2)


def test_memory_buys_rank_and_depth() -> None:
    """The same speed, more memory: never less of both."""
    poor, rich = JointMemory()([group(1.0, memory=1.25e9), group(1.0, memory=2e9)])
    assert (poor.depth, poor.rank) < (rich.depth, rich.rank)
    assert poor.depth <= rich.depth
    assert poor.rank <= rich.rank


@each
def test_degenerate_groups_have_a_choice(rule: Joint) -> None:
    one = GroupState((Device("a", (1.0,)),), SIZES)
    (alone,) = rule([one])
    assert alone.depth == 1
    assert rule([]) == ()
    assert len(rule([group(1.0, dispersion=0.0, mass=(0.0,) * 6), group(9.0, bps=math.inf)])) == 2
    twins = rule([group(1.0), group(1.0)])
    assert twins[0] == twins[1]


def test_free_links_mean_as_many_averages_as_allowed() -> None:
    for rule in (DIVIDED, GradientScore()):
        (one,) = rule([group(1.0, 2.0, bps=math.inf)])
        assert (one.rounds, one.depth, one.steps) == (10, 6, 20)


def test_of_equals_the_deepest() -> None:
    (one,) = GradientScore()([group(1.0, bps=math.inf, mass=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0))])
    assert one.depth == 6


def test_steps_end_where_drift_eats_what_another_one_gains() -> None:
    """The peak of x (1 - drift x^2 delta^2) is at 1 / sqrt(3 drift) delta: 18.3 steps, of sixty that there is time for."""
    (one,) = JointMemory(steps=60, most=1, ranks=(8,), drift=1e-3)([group(1.0, bps=math.inf, dispersion=1.0)])
    assert one.steps == 18


def test_a_reason_has_the_numbers_that_decided() -> None:
    (one,) = GradientScore()([group(1.0, 2.0, bps=math.inf)])
    assert one.why == (
        "gradient norm 1.00 less drift 0 is the best of 6 depths; 10 rounds of 2 steps at depth 6 take 80 s, "
        "the fastest group 80 s; the slowest of 2 members needs 4 s a step"
    )


@pytest.mark.parametrize("rule", [TimeAligned, GradientScore, Bandit, JointMemory])
def test_a_rule_needs_no_arguments_and_prints_as_python(rule: Any) -> None:
    schema.check_fields(rule())
    assert eval(repr(rule()), {rule.__name__: rule}) == rule()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TimeAligned(steps=0), "steps"),
        (lambda: TimeAligned(steps=20, most=3), "most"),
        (lambda: GradientScore(most=0), "most"),
        (lambda: GradientScore(drift=-1.0), "drift"),
        (lambda: GradientScore(drift=math.nan), "drift"),
        (lambda: Bandit(frequencies=()), "frequencies"),
        (lambda: Bandit(frequencies=(3,)), "frequencies"),
        (lambda: Bandit(discount=0.0), "discount"),
        (lambda: Bandit(cuts=0), "cuts"),
        (lambda: JointMemory(ranks=()), "ranks"),
        (lambda: JointMemory(ranks=(4, 0)), "ranks"),
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
        (lambda: JointMemory()([group(1.0, memory=1e9)]), "memory"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(make: Any, field: str) -> None:
    with pytest.raises(Refused, match=field):
        make()
