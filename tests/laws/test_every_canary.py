"""A canary that never fails changes no byte, for every schedule; an answer that one sets aside is as if it had never arrived."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedloom.aggregate.ace import ACE
from fedloom.aggregate.ca2fl import CA2FL
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.canary import Canary
from fedloom.core.errors import Refused
from fedloom.core.events import CheckCanary, SetAside
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator, Schedule, require_fresh_answers
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.runs.observation import RunObservation, TaskEnded
from fedloom.runs.trace import ENCODER
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import uniform
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.canary_world import ALWAYS, STRICT, Play
from tests.support.simulated_runs import QUADRATIC, Log

METHODS: list[Aggregator] = [FedIT(), ProductDelta(), Momentum(FedIT()), CA2FL(FedIT()), ACE(FedIT(), clients=6)]


def same_bytes(schedule: Schedule, method: Aggregator, versions: int) -> None:
    """A run without a canary, one with, and one that scores every second version send the same tasks and make the same versions."""
    try:
        require_fresh_answers(method, schedule)
    except Refused:
        return
    without, with_one = (Play(schedule, method, canary, versions=versions).run() for canary in (None, ALWAYS))
    seldom = Play(schedule, method, Canary(1, ALWAYS.margin, every=2), versions=versions).run()
    assert without.told == with_one.told == seldom.told
    assert without.model == with_one.model == seldom.model
    assert len(with_one.checks) > len(seldom.checks) >= 2


@pytest.mark.parametrize("schedule", toys.schedules(), ids=toys.called)
def test_one_that_never_fails_changes_no_byte(schedule: Schedule) -> None:
    same_bytes(schedule, ProductDelta(), versions=2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", toys.schedules(), ids=toys.called)
def test_nor_with_a_method_that_remembers(schedule: Schedule) -> None:
    for method in METHODS:
        same_bytes(schedule, method, versions=4)


@pytest.mark.parametrize("method", METHODS[:2], ids=toys.called)
@pytest.mark.parametrize(
    ("schedule", "seed"),
    [
        (FedAsync(max_in_flight=4), 1),
        (FedFa(window=3, max_in_flight=4), 1),
        (FedFa(window=4, max_in_flight=3, delta_rate=0.25, max_staleness=2), 2),
        (Immediate(server_learning_rate=0.2, max_in_flight=3, steady=4, max_staleness=3), 1),
        (Rounds(cohort_size=3, deadline=5.0), 1),
        (Rounds(cohort_size=2, over_selection=1.5, deadline=3.0, weigh=uniform), 1),
    ],
    ids=lambda one: toys.called(one),
)
def test_what_is_set_aside_is_as_if_it_had_never_arrived(method: Aggregator, schedule: Schedule, seed: int) -> None:
    """To the byte: every task that is sent, every version. Other schedules count an answer when it arrives (a buffer's place)."""
    poisoned = Play(schedule, method, STRICT, poisoned=("c3",), times=50, versions=5, seed=seed).run()
    absent = Play(schedule, method, STRICT, absent=("c3",), versions=5, seed=seed).run()
    assert {one.client for one in poisoned.set_aside} == {"c3"}
    assert poisoned.told == absent.told
    assert poisoned.model == absent.model


def tree_run(canary: Canary | None, score: Callable[[], float], above: Schedule, **more: Any) -> tuple[Log, str]:
    """A tree of three groups without links, so that reports of one moment come together; the canary is the root's."""
    log = Log()
    given: dict[str, Any] = {"start": toys.fresh(4), "assign": Plan(RandomRank(2, 4), 12), "canary": canary}
    tree = toys.tree((2, 2, 2), Hierarchy(), schedule=above, **(given | more))
    world, check = World(jitter=0.0), lambda model: (score(),)
    return log, Simulation(tree, QUADRATIC, world, toys.profiles(6), log.score, log, check=check).run()


@pytest.mark.parametrize("above", [Rounds(cohort_size=3), FedFa(window=2), FedBuff(buffer_size=2)], ids=toys.called)
def test_at_the_root_of_a_tree_one_that_never_fails_changes_no_byte(above: Schedule) -> None:
    """Reports that arrive while a score is outstanding wait their turn, as messages do."""
    runs = [tree_run(canary, lambda: 0.5, above)[0] for canary in (None, Canary(1, 0.5))]
    without, with_one = (
        [ENCODER.encode(one) for one in log.all(object) if not isinstance(one, CheckCanary)] for log in runs
    )
    assert without == with_one
    assert len(runs[1].all(CheckCanary)) >= 4


def test_at_the_root_of_a_tree_a_group_is_set_aside() -> None:
    """Its report ends unused in every reading of the run, and the run ends when nothing passes."""
    scores = iter([0.5])
    log, reason = tree_run(
        Canary(1, 0.1), lambda: next(scores, 0.1), Rounds(cohort_size=3), limits=Limits(3, failures=5)
    )
    assert "the canary score of a version with it is 0.1000" in reason
    aside, seen = log.all(SetAside), RunObservation(("edge0", "edge1", "edge2"))
    assert {one.client for one in aside} == {"edge0", "edge1", "edge2"}
    facts = [fact for step in log.steps for fact in seen.read(*step)]
    ended = {fact.open.task.id: fact for fact in facts if isinstance(fact, TaskEnded) and fact.by_edge}
    assert all(ended[one.task].status == "unused" and ended[one.task].reason == one.reason for one in aside)
    assert sum(seen.set_aside.values()) == len(aside) == 6
