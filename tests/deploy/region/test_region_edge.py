"""An edge in the place of a server: what the driver is told when a new task takes the place of one that is not done."""

from __future__ import annotations

from dataclasses import replace

from fedloom.core.events import Cancel, ClientJoined, Command, Discarded, Dispatch, Event, TaskReceived, UpdateArrived
from fedloom.core.types import Budget, Task
from fedloom.deploy.region.region import RegionServer
from fedloom.deploy.server.driver import Deployment
from fedloom.hierarchy.edge import Edge, MemberBudget
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.deployed_processes import TERMS
from tests.support.simulated_link import Net


def test_a_new_task_cancels_what_is_under_way_for_the_old_one_and_says_what_is_dropped() -> None:
    """One of three has answered: the other two are at work for nobody, and its answer will be in no version."""
    policies = toys.server(Rounds(cohort_size=3), start=toys.adapter(2), assign=MemberBudget(Plan(FixedRank(2), 4)))
    edge, told = Edge(policies), list[Command]()
    running = Deployment(RegionServer(edge, edge.state), Net({}), TERMS, {}, opened=True)

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        told[:] = commands

    running.observe = observe
    for profile in toys.profiles(3).values():
        running.handle(ClientJoined(profile))
    start = policies.aggregator.start(policies.state.model, Budget(2, 4), 0)
    outer = Task(7, "north", 0, start, Budget(2, 4, rounds=2), 0.0)
    running.handle(TaskReceived(outer))
    first, *others = [one.task for one in told if isinstance(one, Dispatch)]
    assert len(others) == 2
    result = toys.make_result(toys.changed(first.start, 1))
    running.handle(UpdateArrived(first.client, first.id, result))
    assert running.tasks == {one.id: one for one in others}

    running.handle(TaskReceived(replace(outer, id=8)))
    assert {one.task for one in told if isinstance(one, Cancel)} == {one.id for one in others}
    assert [(one.task, one.client) for one in told if isinstance(one, Discarded)] == [(first.id, first.client)]
    anew = [one.task for one in told if isinstance(one, Dispatch)]
    assert len(anew) == 3
    assert running.tasks == {one.id: one for one in anew}, "nobody waits for the others, and nobody is late with them"
