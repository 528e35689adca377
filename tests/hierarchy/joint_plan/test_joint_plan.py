"""The plan of the root of a hierarchy: what it makes of what edges told, and that a run follows it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedloom import (
    BestRoundTime,
    FedFa,
    FedSA,
    FixedRank,
    GradientScore,
    Hierarchy,
    JointPlan,
    Limits,
    Link,
    LossRate,
    Plan,
    Refused,
    Rounds,
    World,
)
from fedloom.core.events import Dispatch, InsideEdge, Report
from fedloom.core.types import Budget, GroupHistory, GroupStatistics, MemberWork, Profile
from fedloom.hierarchy.group_statistics import REMEMBERED_TASKS
from fedloom.hierarchy.joint_plan.group_cost import Choice, ObservedReward
from fedloom.hierarchy.joint_plan.joint_plan import (
    barrier_seconds,
    group_state,
    layer_mass,
    loss_fall,
    member_device,
    rewards_between_tasks,
    rewards_within_tasks,
    slow_link_seconds,
)
from fedloom.hierarchy.joint_plan.shared import JointRule
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.simulated_runs import Log

SHAPE = replace(toys.SHAPE, layers=2, depths={"query": 2, "value": 1})
RULES: tuple[JointRule, ...] = (
    GradientScore(8, 4, rank=4),
    BestRoundTime(GradientScore(8, 4, rank=4)),
    LossRate(8, 4, rank=4, patience=2),
)
EDGE, SLOW = Profile("edge0", 30, 1e4, 1e5, 1e5), Profile("c0", 10, 1e4, 1e4, 1e4)
LOG = GroupHistory(EDGE, (SLOW, replace(SLOW, client="c1", flops=2e4)))

TASK = Budget(4, 8)


def told(budget: Budget = TASK, **more: Any) -> GroupStatistics:
    """Of a task in which c0 took 2 s a step and c1 took no part."""
    spent = MemberWork("c0", budget.rank, budget.depth, budget.rounds, budget.steps, 3.0, 2.0 * budget.steps, 6.0)
    given: dict[str, Any] = {"work": (spent,), "mass": {}, "spread": 0.0, "energy": (), "loss": None, "seconds": 10.0}
    return GroupStatistics(budget, **(given | more))


def carried_out(rule: JointRule, **more: Any) -> tuple[Any, Log]:
    """A run of two edges, of four and two members, by this rule."""
    given: dict[str, Any] = {"start": toys.fresh(4), "shape": SHAPE, "assign": Plan(FixedRank(4), 3)}
    given |= {"limits": Limits(versions=6, evaluate_every=2)} | more
    tree, log = toys.tree((4, 2), Hierarchy(plan=JointPlan(rule, batch_tokens=50), link=Link(1e5, 1e5)), **given), Log()
    Simulation(tree, toys.Quadratic(), World(jitter=0.3), toys.profiles(6), lambda model: {"loss": 0.0}, log).run()
    return tree, log


def asked(log: Log) -> list[Budget]:
    """The budgets of the edges' tasks."""
    told = [command for _, _, commands in log.steps for command in commands if isinstance(command, InsideEdge)]
    return [one.command.task.budget for one in told if isinstance(one.command, Dispatch)]


def test_links_that_stay_surprise_nobody_and_one_slow_draw_does() -> None:
    """A task whose slowest link took as long as is known adds nothing to an inner round; a slower one, what it was more."""
    known = group_state(LOG, SHAPE, 50)
    usual = max(known.link_seconds(known.layers, TASK.rank))
    (spent,) = told().work
    as_known = replace(spent, down=usual / 2, up=usual / 2, answers=1)
    assert slow_link_seconds(told(work=(as_known,)), known) == pytest.approx(0.0, abs=1e-9)
    assert slow_link_seconds(told(work=(replace(as_known, up=usual / 2 + 7.0),)), known) == pytest.approx(7.0)
    assert slow_link_seconds(told(work=()), known) == 0.0


def test_before_anything_was_told_profiles_tell() -> None:
    """Forward through all blocks and backward through the top ones: depth 2 costs more; twice the speed, half the time."""
    slow, fast = group_state(LOG, SHAPE, 50).members
    assert slow.seconds[0] < slow.seconds[1]
    assert fast.seconds == pytest.approx([one / 2 for one in slow.seconds])
    assert (slow.up_bps, slow.down_bps) == pytest.approx((1e4, 1e4))
    assert (group_state(LOG, SHAPE, 50).up_bps, group_state(LOG, SHAPE, 50).mass) == (1e5, ())


@pytest.mark.parametrize("depth", [1, 2])
def test_what_a_member_took_takes_the_place_of_its_profile(depth: int) -> None:
    """t(d) at the depth that was seen, and seconds a byte of the adapter of that depth."""
    log = replace(LOG, statistics=(told(Budget(4, 8, depth, 2)),))
    seen = member_device(SLOW, log, SHAPE, 50)
    assert seen.seconds[depth - 1] == pytest.approx(2.0)
    assert 8.0 * 2 * SHAPE.payload(4, depth) / seen.up_bps == pytest.approx(6.0)
    assert 8.0 * 2 * SHAPE.payload(4) / seen.down_bps == pytest.approx(3.0)
    assert member_device(log.members[1], log, SHAPE, 50) == member_device(LOG.members[1], LOG, SHAPE, 50), (
        "it took no part"
    )


def test_mass_is_what_a_layer_was_last_seen_to_change_and_the_mean_where_it_was_never() -> None:
    first, second = told(mass={"query": 3.0, "value": 1.0}), told(mass={"value": 5.0})
    assert layer_mass(replace(LOG, statistics=(first, second)), SHAPE) == (5.0, 3.0)
    assert layer_mass(replace(LOG, statistics=(second,)), SHAPE) == (5.0, 5.0)
    with_head = told(mass={"query": 3.0, "value": 1.0, "head": 2.0})
    assert layer_mass(replace(LOG, statistics=(with_head,)), SHAPE) == (3.0, 3.0), "the head is trained at any depth"


def test_dispersion_follows_the_spread_and_rewards_the_loss() -> None:
    """delta^2 <- 0.8 delta^2 + 0.2 seen; the reward is the fall of the loss since the task before, a second."""
    tasks = (told(spread=0.5, loss=2.0), told(Budget(4, 8, 1, 4), spread=1.0, loss=1.5), told(loss=None))
    log = replace(LOG, statistics=tasks)
    assert group_state(log, SHAPE, 50).dispersion ** 2 == pytest.approx(0.8 * (0.8 * 0.5 + 0.2 * 1.0))
    assert [*rewards_between_tasks(tasks, SHAPE)] == [ObservedReward(4, 1, pytest.approx(0.05))]


def test_a_choice_earned_what_its_members_own_losses_fell() -> None:
    """Mean fall from an answer to the next, by rounds, by seconds: (0.6 / 3 + 0.1) / 2 * 4 / 10; one answer tells nothing."""
    (spent,) = told().work
    three = replace(spent, answers=4, first_loss=1.0, last_loss=0.4)
    two, one = (
        replace(spent, answers=2, first_loss=0.5, last_loss=0.4),
        replace(spent, answers=1, first_loss=9.0, last_loss=9.0),
    )
    tasks = (told(Budget(4, 8, 1, 4), work=(three, two, one)), told(work=(one,)))
    assert [loss_fall(member) for member in (three, two, one)] == pytest.approx([0.2, 0.1, None])
    assert [*rewards_within_tasks(tasks, SHAPE)] == [ObservedReward(4, 1, pytest.approx(0.06))]


def test_what_inner_rounds_waited_is_learnt() -> None:
    """30 s on the edge's side, 3 + 16 + 6 of them the busiest member's own: 5 s in 2 rounds, seen in each group's time."""
    log = replace(LOG, statistics=(told(Budget(4, 8, None, 2), seconds=34.0, down=1.0, up=3.0),))
    assert barrier_seconds(log.statistics[0]) == pytest.approx(2.5)
    found = group_state(log, SHAPE, 50)
    without = replace(found, barrier=0.0)
    one = Choice(4, 2, 4, 8)
    assert found.seconds(one) == pytest.approx(without.seconds(one) + 4 * 2.5)


def test_a_pace_is_the_one_that_earns_most_a_second() -> None:
    """Against every other time: no limit gives all groups together more score a second. Slow links: few rounds; free ones: many."""
    rule = BestRoundTime(GradientScore(8, 8, rank=4))
    for times, fewer in ((2e3, True), (1e9, False)):
        link = {"up_bps": times, "down_bps": times}
        log = GroupHistory(EDGE, tuple(replace(one, **link) for one in LOG.members))
        groups = [
            replace(group_state(log, SHAPE, 5), dispersion=0.9),
            replace(group_state(log, SHAPE, 20), dispersion=0.5),
        ]
        plan = rule(groups)
        others = [
            tuple(rule.inner.choose(one, limit) for one in groups) for limit in torch.logspace(-2, 5, 200).tolist()
        ]
        assert rule.score_rate(groups, plan) >= max(rule.score_rate(groups, other) for other in others) - 1e-12
        assert (plan[0].rounds < 8) is fewer
    assert rule(()) == ()


@pytest.mark.parametrize("rule", RULES, ids=toys.called)
def test_a_run_follows_its_rule(rule: JointRule) -> None:
    """Every task of an edge is what the rule chooses from what the root knew at that moment, and says why."""
    tree, log = carried_out(rule)
    budgets = asked(log)
    assert len(budgets) == 2 * 6
    assert all(budget.why and budget.rank <= 4 and budget.rounds <= budget.steps for budget in budgets)
    assert len({(b.rounds, b.depth, b.rank, b.steps) for b in budgets}) > 1, "groups differ, or it learns"
    reports = [
        one
        for _, _, commands in log.steps
        for one in commands
        if isinstance(one, InsideEdge) and isinstance(one.command, Report)
    ]
    assert len(reports) == 12
    assert all(len(tree.root.state.groups[edge].statistics) == min(6, REMEMBERED_TASKS) for edge in ("edge0", "edge1"))
    for one in reports:
        learnt = one.command.statistics
        assert {spent.client for spent in learnt.work} == {c.client for c in tree.topology.members[one.edge]}
        assert all(spent.train > 0 and spent.answers == learnt.budget.rounds for spent in learnt.work)
        assert set(learnt.mass) == {"head", "value"} | (set() if learnt.budget.depth == 1 else {"query"})
        assert 0 <= learnt.spread <= 1
        assert math.fsum(learnt.energy) == pytest.approx(1.0, abs=0.2)


def test_a_run_is_the_same_twice_and_works_across_fedfa() -> None:
    first, second = (carried_out(GradientScore(8, 4, rank=4), schedule=FedFa(2, 2)) for _ in range(2))
    assert asked(first[1]) == asked(second[1])
    assert len(asked(first[1])) >= 6


def test_alike_members_have_no_spread_and_one_alone_neither() -> None:
    """1 - |mean change|^2 / mean |change|^2: 0 of one member, for its change is the version's."""
    tree = toys.tree(
        (1, 1),
        Hierarchy(plan=JointPlan(GradientScore(4, rank=4))),
        start=toys.fresh(4),
        shape=SHAPE,
        schedule=Rounds(2),
    )
    Simulation(tree, toys.Quadratic(), World(jitter=0.0), toys.profiles(2), lambda model: {"loss": 0.0}, Log()).run()
    assert all(one.spread < 1e-6 for log in tree.root.state.groups.values() for one in log.statistics)
    assert all(log.statistics for log in tree.root.state.groups.values())


def test_a_choice_can_be_fixed_in_part() -> None:
    fleet = toys.fleet(shape=SHAPE, groups={"edge0": LOG}, first=toys.server(start=toys.fresh(4)).state.model)
    rule = GradientScore(8, 4, rank=4)
    chosen: Choice = rule((group_state(LOG, SHAPE, 2048),))[0]
    assert JointPlan(rule)(EDGE, fleet) == Budget(4, 8, None, chosen.rounds, chosen.why)
    fixed = JointPlan(rule, rounds=2, depth=1)(EDGE, fleet)
    assert (fixed.rounds, fixed.depth, fixed.steps) == (2, 1, 8)
    assert fixed.why.startswith("the depth is fixed; rounds are fixed; ")


def test_what_cannot_be_planned_is_refused_before_the_run() -> None:
    given: dict[str, Any] = {"start": toys.fresh(4), "shape": SHAPE, "assign": Plan(FixedRank(4), 3)}
    with pytest.raises(Refused, match="server's rank is 4"):
        toys.tree((2,), Hierarchy(plan=JointPlan(GradientScore(rank=8))), **given)
    with pytest.raises(Refused, match="cannot train one layer at rank 4"):
        toys.tree((2,), Hierarchy(plan=JointPlan(GradientScore(rank=4), batch_tokens=10**9)), **given)
    with pytest.raises(Refused, match="no list of blocks"):
        toys.tree((2,), Hierarchy(plan=JointPlan(GradientScore(rank=4))), **(given | {"shape": toys.SHAPE}))
    with pytest.raises(Refused, match="has 2 blocks"):
        toys.tree((2,), Hierarchy(plan=JointPlan(GradientScore(rank=4), depth=3)), **given)
    with pytest.raises(Refused, match="FedSA"):
        toys.tree((2,), Hierarchy(plan=JointPlan(GradientScore(rank=4))), method=FedSA(), **given)
    with pytest.raises(Refused, match=r"Hierarchy\(plan=JointPlan"):
        toys.server(assign=JointPlan()).budget_rule(SLOW, toys.fleet())
    with pytest.raises(Refused, match=r"hierarchy\.plan\.rounds"):
        JointPlan(rounds=0)
