"""The virtual clock with toy trainers: every pair of an aggregator and a schedule learns, twice the same."""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest

import fedloom.schedule
from fedloom.aggregate.adam import Adam
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fadas import FADAS
from fedloom.aggregate.fedsvd import FedSVD
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.folded_delta import FoldedDelta
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.rolora import RoLoRA
from fedloom.core.errors import Refused
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    Dispatch,
    Publish,
    Reject,
    ScoresReady,
    UpdateArrived,
)
from fedloom.core.fingerprint import fingerprint
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import uniform
from fedloom.simulate.devices import World
from tests.support import toys
from tests.support.drift import pace
from tests.support.pairs import goes_together
from tests.support.simulated_runs import JITTER, QUADRATIC, Log, run, simulation
from tests.support.storms import one_in
from tests.support.toys import Null, profiles

PLAIN = [schedule for schedule in toys.schedules() if schedule not in toys.FLAGGED[fedloom.schedule]]
PAIRS = [
    *(pair for pair in itertools.product(toys.aggregators(), PLAIN) if goes_together(*pair)),
    *itertools.product([FoldedDelta(), RoLoRA()], toys.FLAGGED[fedloom.schedule]),
]
every_pair = pytest.mark.parametrize(("method", "schedule"), one_in(11, PAIRS), ids=toys.called)
FAR = 8.0
LEARNT: dict[type, float] = {Adam: 0.97, FADAS: 1.0, Clip: 0.9, FFA: 0.85, FedSVD: 0.9}
"""Squared error to reach where it is not 0.3: steps of 0.005 or 0.001 an entry and version, however far others go; steps of norm
1; rows that stay in their random span."""


@functools.cache
def versions_of(schedule: Schedule) -> int:
    """Every pair goes as far as 8 rounds of FedAvg, because a version is a small step to some schedules (law 11)."""
    return pace(schedule, profiles(6), JITTER, FAR)


@every_pair
def test_every_pair_learns_and_twice_the_same(method: Aggregator, schedule: Schedule) -> None:
    """At equal effective server step; the first versions of a second run of one seed are the same bytes, and of another not."""
    if isinstance(
        method, Momentum
    ):  # a geometric series of changes: this rate makes its step that of the wrapped method
        method = Momentum(beta=0.5, learning_rate=0.5)
    plan, versions = Plan(RandomRank(2, 4), 8), versions_of(schedule)
    log = run(method, schedule, versions=versions, assign=plan)
    assert len(log.losses) == versions + 1
    if any(update.task.start.rules.private for publish in log.all(Publish) for update in publish.updates):
        log.losses = [
            update.result.metrics["loss"] for update in log.all(Publish)[-1].updates
        ]  # each has its own model
    else:
        assert log.losses[0] == pytest.approx(1.0)
    assert sorted(log.losses[-3:])[len(log.losses[-3:]) // 2] < LEARNT.get(type(method), 0.3)
    first, (again, other) = log.traced(), (run(method, schedule, 3, assign=plan, seed=k).traced() for k in (0, 1))
    assert again[:-2] == first[: len(again) - 2]  # the last two are the stop, and what came of it
    assert other[:-2] != first[: len(other) - 2]


def test_the_order_in_which_profiles_are_given_does_not_matter() -> None:
    backwards = dict(reversed(list(profiles(6).items())))
    assert run(versions=4).file.getvalue() == run(versions=4, profiles=backwards).file.getvalue()


def test_what_happens_at_the_same_time_happens_in_the_order_in_which_it_was_made() -> None:
    alike = {f"c{k}": Profile(f"c{k}", 10) for k in range(6)}
    log = run(versions=2, trainer=Null(), assign=Plan(RandomRank(2, 2), 1), profiles=alike, devices=World(jitter=0.0))
    assert [event.profile.client for _, event, _ in log.steps if isinstance(event, ClientJoined)] == sorted(alike)
    assert [event.task for _, event, _ in log.steps if isinstance(event, UpdateArrived)] == list(range(1, 13))


def test_nothing_learned_is_nothing_changed() -> None:
    log = run(versions=5, trainer=Null(), assign=Plan(RandomRank(4, 4), 12))
    assert log.losses == [log.losses[0]] * 6


def test_a_cohort_is_trained_together_in_order_of_ids() -> None:
    cohorts = []

    class Watched(Null):
        def train(self, work: Any) -> list[tuple[Result, ClientState]]:
            cohorts.append([task.id for task, _ in work])
            return super().train(work)

    run(schedule=Rounds(cohort_size=4), versions=2, trainer=Watched())
    assert cohorts == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_answers_arrive_when_the_device_and_the_link_say() -> None:
    log = run(schedule=Rounds(cohort_size=6), versions=1, devices=World(jitter=0.0))
    arrivals = {event.client: (now, event) for now, event, _ in log.steps if isinstance(event, UpdateArrived)}
    assert len(arrivals) == 6
    tasks = {command.task.client: command.task for command in log.all(Dispatch)}
    for client, (now, event) in arrivals.items():
        took = World(jitter=0.0).seconds(tasks[client], event.result, profiles(6)[client], toys.SHAPE, 0)
        assert now == took.total == event.result.metrics["seconds"]
        assert event.result.metrics["seconds_up"] == took.up
    assert [now for now, _, _ in log.steps] == sorted(now for now, _, _ in log.steps)


def test_the_cancelled_never_arrive_and_keep_what_they_had() -> None:
    log = run(schedule=Rounds(cohort_size=2, over_selection=2.0), versions=5)
    cancelled = {command.task for command in log.all(Cancel)}
    arrived = {event.task for _, event, _ in log.steps if isinstance(event, UpdateArrived)}
    assert len(cancelled) == 5 * 2
    assert not cancelled & arrived
    assert not log.all(Reject)
    assert Counter(len(publish.updates) for publish in log.all(Publish)) == {2: 5}


def test_moments_come_back_to_the_client_that_made_them_and_only_if_its_answer_arrived() -> None:
    given: dict[int, str] = {}
    clients: dict[int, str] = {}

    class Marking(Null):
        def train(self, work: Any) -> list[tuple[Result, ClientState]]:
            given.update({task.id: local.basis for task, local in work})
            clients.update({task.id: task.client for task, _ in work})
            return [
                (result, ClientState(f"task {task.id}"))
                for (task, _), (result, _) in zip(work, super().train(work), strict=True)
            ]

    log = run(schedule=Rounds(cohort_size=2, over_selection=1.5), versions=8, trainer=Marking())
    answered = {event.task for _, event, _ in log.steps if isinstance(event, UpdateArrived)}
    for number, basis in given.items():
        earlier = [n for n in answered if n < number and clients[n] == clients[number]]
        assert basis == (f"task {max(earlier)}" if earlier else "")


def test_what_a_refused_task_left_behind_is_not_kept() -> None:
    given: list[ClientState] = []

    class Poisoned(Null):
        def train(self, work: Any) -> list[tuple[Result, ClientState]]:
            given.extend(local for _, local in work)
            return [(replace(r, metrics={"loss": float("nan")}), ClientState("poison")) for r, _ in super().train(work)]

    run(schedule=Rounds(cohort_size=2), trainer=Poisoned(), limits=Limits(versions=8, failures=6))
    assert len(given) >= 6
    assert {local.basis for local in given} == {""}


def test_scores_come_back_as_events_of_their_version() -> None:
    log = run(versions=3)
    assert [event.version for _, event, _ in log.steps if isinstance(event, ScoresReady)] == [0, 1, 2, 3]


def test_a_client_that_always_answers_badly_does_not_stop_the_others() -> None:
    @dataclass(frozen=True)
    class Diverged:
        """c0 returns NaN, in its adapter and in its loss."""

        def train(self, work: Any) -> list[tuple[Result, ClientState]]:
            return [
                (self.spoil(task, result), local)
                for (task, _), (result, local) in zip(work, QUADRATIC.train(work), strict=True)
            ]

        def spoil(self, task: Task, result: Result) -> Result:
            return replace(result, metrics={"loss": float("nan")}) if task.client == "c0" else result

    log = run(schedule=Rounds(cohort_size=3, weigh=uniform), trainer=Diverged())
    assert log.losses[-1] < 0.3
    assert {command.client for command in log.all(Reject)} == {"c0"}
    assert "c0" not in {update.task.client for publish in log.all(Publish) for update in publish.updates}
    assert all(json.loads(text) for text in log.file.getvalue().splitlines())


def test_a_federation_in_which_nothing_can_happen_says_so() -> None:
    with pytest.raises(Refused, match="no idle client"):
        run(profiles={})


def test_a_run_with_a_limit_of_time_ends_at_it() -> None:
    log = Log()
    server = toys.server(limits=Limits(versions=1000, seconds=7.0), start=toys.fresh(4))
    assert simulation(server, log).run() == "7 s are over"
    assert log.steps[-1][0] == 7.0


def test_the_last_published_model_is_the_servers() -> None:
    log = Log()
    server = toys.server(start=toys.fresh(4))
    simulation(server, log, profiles={"c3": Profile("c3", 10)}).run()
    assert fingerprint(log.all(Publish)[-1].model.adapter) == fingerprint(server.state.model.adapter)
