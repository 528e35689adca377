"""The rules of a joint plan that experiments compare: what they promise, and that a plan takes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joint_rules import Bandit, JointMemory, TimeAligned

from fedloom import FixedRank, Hierarchy, JointPlan, Limits, Link, Plan, World
from fedloom.core import schema
from fedloom.core.errors import Refused
from fedloom.core.events import Dispatch, InsideEdge
from fedloom.core.seeds import rng
from fedloom.hierarchy.joint_plan.group_cost import Choice, Device, GroupState, ObservedReward
from fedloom.hierarchy.joint_plan.shared import JointRule
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.joint_groups import SIZES, fleets, group, groups, limit
from tests.support.simulated_runs import Log
from tests.support.storms import tries

DIVIDED = TimeAligned(work_grows=False, steps=20, most=10)
GROWING = TimeAligned(steps=20, most=5)
RULES: tuple[JointRule, ...] = (GROWING, DIVIDED, Bandit(), JointMemory())
each = pytest.mark.parametrize("rule", RULES, ids=["growing", "divided", "bandit", "memory"])


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


def play(reward: Callable[[Choice, int], float], rounds: int, rule: Bandit) -> list[Choice]:
    """What a bandit chooses, round after round, for one group."""
    one, chosen = group(1.0), list[Choice]()
    for turn in range(rounds):
        (choice,) = rule([one])
        chosen.append(choice)
        seen = ObservedReward(choice.rounds, choice.depth, reward(choice, turn))
        one = replace(one, rewards=(*one.rewards, seen))
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


def test_steps_end_where_drift_eats_what_another_one_gains() -> None:
    """The peak of x (1 - drift x^2 delta^2) is at 1 / sqrt(3 drift) delta: 18.3 steps, of sixty that there is time for."""
    (one,) = JointMemory(steps=60, most=1, ranks=(8,), drift=1e-3)([group(1.0, bps=math.inf, dispersion=1.0)])
    assert one.steps == 18


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
    (one,) = DIVIDED([group(1.0, 2.0, bps=math.inf)])
    assert (one.rounds, one.depth, one.steps) == (10, 6, 20)


@given(groups, st.lists(st.floats(0.0, 1.0), min_size=5, max_size=5))
@tries(100)
def test_more_gradient_mass_in_lower_layers_never_means_less_depth(one: GroupState, moved: list[float]) -> None:
    """Every layer below the top has at least as large a share, at the expense of the top one; nobody drifts."""
    before = replace(one, dispersion=0.0, mass=(10.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    after = replace(before, mass=(10.0 - sum(moved), *(1.0 + more for more in moved)))
    quick, rule = group(0.2, memory=1.2e9), JointMemory(most=4)
    assert rule([after, quick])[0].depth >= rule([before, quick])[0].depth


@pytest.mark.parametrize(
    "rule", [TimeAligned(8, 4, rank=4), Bandit(8, rank=4, cuts=2), JointMemory(8, 4, ranks=(2, 4))], ids=toys.called
)
def test_a_plan_takes_each_of_them(rule: JointRule) -> None:
    """A tree of two edges runs to its end, and each task of an edge says why it is as it is."""
    shape = replace(toys.SHAPE, layers=2, depths={"query": 2, "value": 1})
    hierarchy, limits = Hierarchy(plan=JointPlan(rule, batch_tokens=50), link=Link(1e5, 1e5)), Limits(versions=6)
    given: dict[str, Any] = {"start": toys.fresh(4), "shape": shape, "assign": Plan(FixedRank(4), 3), "limits": limits}
    tree, log = toys.tree((4, 2), hierarchy, **given), Log()
    Simulation(tree, toys.Quadratic(), World(jitter=0.3), toys.profiles(6), lambda model: {"loss": 0.0}, log).run()
    tasks = [one.command.task for one in log.all(InsideEdge) if isinstance(one.command, Dispatch)]
    assert tree.state.version == 6
    assert all(task.budget.why for task in tasks)


@pytest.mark.parametrize("rule", [TimeAligned, Bandit, JointMemory])
def test_a_rule_needs_no_arguments_and_prints_as_python(rule: Any) -> None:
    schema.check_fields(rule())
    assert eval(repr(rule()), {rule.__name__: rule}) == rule()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: TimeAligned(steps=0), "steps"),
        (lambda: TimeAligned(steps=20, most=3), "most"),
        (lambda: Bandit(frequencies=()), "frequencies"),
        (lambda: Bandit(frequencies=(3,)), "frequencies"),
        (lambda: Bandit(discount=0.0), "discount"),
        (lambda: Bandit(cuts=0), "cuts"),
        (lambda: JointMemory(ranks=()), "ranks"),
        (lambda: JointMemory(ranks=(4, 0)), "ranks"),
        (lambda: JointMemory()([group(1.0, memory=1e9)]), "memory"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(make: Any, field: str) -> None:
    with pytest.raises(Refused, match=field):
        make()
