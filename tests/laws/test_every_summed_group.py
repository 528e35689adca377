"""Summed groups below every method and schedule, and storms of members and sums whose books must agree with the edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom import FedBuff, FedFa, Limits, Plan, RandomRank, Refused, Rounds, World
from fedloom.aggregate.ace import ACE
from fedloom.aggregate.ca2fl import CA2FL
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Event,
    OpenSum,
    Publish,
    Reject,
    Report,
    Stop,
    SumFailed,
    TaskFailed,
    TimerFired,
)
from fedloom.core.policies import Schedule, aggregator_layers
from fedloom.core.types import Profile
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.tree_state import Link
from fedloom.schedule.shared.weights import uniform
from fedloom.simulate.simulation import Simulation, open_sum
from tests.support import toys
from tests.support.simulated_runs import QUADRATIC, Log
from tests.support.storms import tries
from tests.support.summed_groups import RANKS, SECURE, group

REFUSED = {"FLoRA", "FedEx", "FedPLoRA", "FedSA", "HetLoRA", "Scaffold"}
"""Methods of groups that are refused; of a wrapper its method is the groups', and HLoRA as published is refused too."""


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Rounds(2), FedFa(2, 2), FedBuff(2, 2)], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)
def test_every_method_and_schedule_runs_over_summed_groups_or_is_refused(method: Any, schedule: Schedule) -> None:
    summed = Hierarchy(secure=SECURE, link=Link(1e5, 1e5))
    published, judges = getattr(method, "published_alpha", None), getattr(method, "judges_answers", False)
    if type(method).__name__ in REFUSED or published or judges:
        with pytest.raises(Refused):
            toys.tree((5, 6), summed, method=method, schedule=schedule, start=toys.fresh(4))
        return
    if isinstance(method, ACE | CA2FL):
        method = replace(method, clients=2)
    settings: dict[str, Any] = {
        "start": toys.fresh(4),
        "assign": Plan(RandomRank(2, 4), 12),
        "limits": Limits(versions=6),
    }
    if getattr(schedule, "reuses_answers", False) and any(
        getattr(layer, "each_once", None) for layer in aggregator_layers(method)
    ):
        return  # refused as without sums
    seen, losses = replace(summed, secure=None, schedule=Rounds(6, weigh=uniform)), list[float]()
    for hierarchy in (summed, seen):
        log = Log()
        tree = toys.tree((5, 6), hierarchy, method=method, schedule=schedule, **settings)
        Simulation(tree, QUADRATIC, World(), toys.profiles(11), log.score, log).run()
        assert bool(log.all(OpenSum)) is (hierarchy is summed)
        losses.append(log.losses[-1])
    assert losses[0] < 1.3 * losses[1] + 0.1


KINDS = (*["join"] * 4, "lose", *["ready"] * 12, "fail", "timer", *["open"] * 4, "no sum", "edge")


class SumStorm:
    """A driver of one edge that keeps books of its own: which tasks are out, ready, or in a sum that was asked for."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.made, self.now = group(ranks, replace(SECURE, deadline=20.0, threshold=0.51), rounds=9), 1.0
        self.out = {task.id: client for client, task in self.made.tasks.items()}
        self.wanted: OpenSum | None = None
        self.summed: set[int] = set()
        self.reports, self.down = 0, False

    def tell(self, event: Event) -> None:
        self.follow(self.made.do(event, self.now))

    def follow(self, commands: Sequence[Command]) -> None:
        """Write down what follows, and hold it against the books."""
        for command in commands:
            match command:
                case Dispatch(task):
                    assert task.id not in self.out
                    assert self.made.held.keys().isdisjoint({task.id})
                    self.out[task.id] = task.client
                case Cancel(number, client):
                    assert self.out.pop(number) == client
                case OpenSum(_, blocks, least, _, _):
                    assert self.wanted is None
                    assert all(len(block.tasks) >= least == 3 for block in blocks)
                    assert set(blocks[0].tasks) <= self.out.keys() & self.made.held.keys()
                    assert self.summed.isdisjoint(blocks[0].tasks), "no task is in two sums"
                    self.summed |= set(blocks[0].tasks)
                    self.wanted = command
                case Publish(_, _, updates):
                    for update in updates:
                        assert self.out.pop(update.task.id) == update.task.client
                case Report() | Stop():
                    self.reports += 1
                    assert not self.out
                case Reject():
                    raise AssertionError(command)
        busy, due = self.made.edge.state.server.busy, self.made.edge.state.due
        assert due is None or due >= self.now, "it is never called in vain for ever"
        assert {number: task.client for number, task in busy.items()} == self.out

    def step(self, kind: str, pick: int, later: float) -> None:
        """One event of this kind."""
        self.now += later
        made, waiting = self.made, sorted(self.out.keys() - self.made.held.keys())
        client = f"c{pick % len(RANKS)}"
        if self.wanted and not set(self.wanted.blocks[0].tasks) <= self.out.keys():
            self.wanted = None  # its tasks were cancelled
        match kind:
            case "join":
                self.tell(ClientJoined(Profile(client, 10)))
            case "lose":
                asked_for = self.wanted.blocks[0].tasks if self.wanted else ()
                gone = [n for n, one in self.out.items() if one == client and n not in asked_for]
                for number in gone:
                    del self.out[number]
                self.tell(ClientLost(client))
            case "ready" if waiting and not self.down:
                number = waiting[pick % len(waiting)]
                made.tasks[self.out[number]] = made.edge.state.server.busy[number]
                self.follow(made.ready(self.out[number], now=self.now))
            case "fail" if self.out:
                number = sorted(self.out)[pick % len(self.out)]
                in_sum = self.wanted is not None and number in self.wanted.blocks[0].tasks
                one = self.out[number] if in_sum else self.out.pop(number)
                self.tell(TaskFailed(one, number, "no power"))
            case "timer":
                self.now = max(self.now, made.edge.state.due or self.now)
                self.tell(TimerFired())
            case "open" | "no sum" if self.wanted:
                wanted, self.wanted = self.wanted, None
                self.tell(open_sum(wanted, made.held) if kind == "open" else SumFailed(wanted.task, "no"))
            case "edge":
                self.wanted, self.down = None, not self.down
                self.follow(made.edge.go_down(self.now) if self.down else made.edge.come_back(self.now))


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.sampled_from((0.0, 0.0, 0.5, 5.0))), max_size=80),
    st.permutations(RANKS),
)
@tries(20)
def test_a_storm_of_members_and_sums_agrees_with_the_books(
    script: list[tuple[str, int, float]], ranks: Sequence[int]
) -> None:
    storm = SumStorm(ranks)
    for step in script:
        storm.step(*step)
    assert storm.reports <= 1
