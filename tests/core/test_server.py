"""The server's own rules: limits, evaluation, time. What holds for every schedule is in `laws/`."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.core.errors import Refused
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Evaluate,
    Publish,
    Reject,
    ScoresReady,
    SetAside,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.fingerprint import fingerprint
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, cut_factor, map_tensors
from fedloom.core.server import Server
from fedloom.core.types import Profile, Task
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank, RandomRank
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.toys import make_result


def started(clients: int = 2, **more: Any) -> tuple[Server, list[Command]]:
    """A server whose first cohort has just been sent."""
    server = toys.server(**more)
    for client in sorted(toys.profiles(clients)):
        assert server.handle(0.0, ClientJoined(toys.profiles(clients)[client])) == []
    assert server.wake() == 0.0
    return server, server.handle(0.0, TimerFired())


def tasks(commands: list[Command]) -> list[Task]:
    return [command.task for command in commands if isinstance(command, Dispatch)]


def names(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def answer(server: Server, now: float, task: Task) -> list[Command]:
    return server.handle(now, UpdateArrived(task.client, task.id, make_result(task.start.train)))


def play(server: Server, commands: list[Command]) -> list[Command]:
    """Answer everything, one second a task, until the server stops; returns all commands."""
    every, now = list(commands), 0.0
    while not isinstance(every[-1], Stop):
        now += 1.0
        every += answer(server, now, min(server.state.busy.values(), key=lambda task: task.id))
    return every


def test_clients_who_join_together_are_all_there_when_the_first_cohort_is_drawn() -> None:
    server, commands = started(clients=5)
    assert names(commands) == ["Evaluate"] + ["Dispatch"] * 5
    assert server.wake() is None


def test_a_round_publishes_then_evaluates_then_starts_the_next() -> None:
    server, commands = started()
    first, second = tasks(commands)
    assert answer(server, 1.0, first) == []
    after = answer(server, 2.0, second)
    assert names(after) == ["Publish", "Evaluate", "Dispatch", "Dispatch"]
    assert {task.version for task in tasks(after)} == {1}
    assert {task.sent for task in tasks(after)} == {2.0}


def test_seconds_at_work_count_however_a_task_ended() -> None:
    server, commands = started(clients=4, schedule=Rounds(cohort_size=4))
    answered, failed, lost, outstanding = tasks(commands)
    answer(server, 1.5, answered)
    server.handle(2.0, TaskFailed(failed.client, failed.id, "no memory"))
    server.handle(4.0, ClientLost(lost.client))
    assert server.fleet().work_seconds == {answered.client: 1.5, failed.client: 2.0, lost.client: 4.0}
    assert outstanding.client not in server.fleet().work_seconds
    server, commands = started(clients=1, schedule=Rounds(cohort_size=1))
    (second,) = tasks(answer(server, 1.0, tasks(commands)[0]))
    answer(server, 3.0, second)
    assert server.fleet().work_seconds == {second.client: 3.0}


def test_a_run_stops_after_its_versions_and_cancels_nothing_twice() -> None:
    server, commands = started(limits=Limits(versions=3))
    every = play(server, commands)
    assert [c.version for c in every if isinstance(c, Publish)] == [1, 2, 3]
    assert isinstance(every[-1], Stop)
    assert "3 versions" in every[-1].reason
    assert server.wake() is None
    assert server.handle(99.0, TimerFired()) == []
    assert server.handle(99.0, ClientJoined(Profile("late", 1))) == []


def test_a_run_stops_at_its_seconds_and_cancels_what_is_under_way() -> None:
    server, commands = started(limits=Limits(versions=3, seconds=5.0))
    assert server.wake() == 5.0
    answer(server, 1.0, tasks(commands)[0])
    stop = server.handle(5.0, TimerFired())
    assert stop == [Cancel(2, tasks(commands)[1].client), Stop("5 s are over")]
    assert answer(server, 6.0, tasks(commands)[1]) == []


def test_the_last_version_is_scored_also_when_time_ends_the_run() -> None:
    server, commands = started(limits=Limits(versions=9, seconds=5.0, evaluate_every=9))
    for task in tasks(commands):
        answer(server, 1.0, task)
    assert server.state.version == 1
    stop = server.handle(5.0, TimerFired())
    assert [c.version for c in stop if isinstance(c, Evaluate)] == [1]
    assert isinstance(stop[-1], Stop)


def test_a_run_in_which_every_task_fails_ends_with_the_reason() -> None:
    server, commands = started(limits=Limits(versions=9, failures=3))
    now = 0.0
    while not (commands and isinstance(commands[-1], Stop)):
        now += 1.0
        task = min(server.state.busy.values(), key=lambda task: task.id)
        commands = server.handle(now, TaskFailed(task.client, task.id, "out of memory"))
    assert commands[-1] == Stop("3 tasks failed in a row, the last one: out of memory")
    assert now == 3.0


@pytest.mark.parametrize(("every", "scored"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (5, [0, 5]), (9, [0, 5])])
def test_versions_are_scored_at_their_cadence_and_the_first_and_the_last_always(every: int, scored: list[int]) -> None:
    server, commands = started(limits=Limits(versions=5, evaluate_every=every))
    assert [c.version for c in play(server, commands) if isinstance(c, Evaluate)] == scored


def test_a_score_changes_nothing() -> None:
    server, _ = started()
    assert server.handle(1.0, ScoresReady(0, {"accuracy": 1.0})) == []


def test_time_must_not_run_backwards() -> None:
    server, _ = started()
    server.handle(5.0, TimerFired())
    for earlier in (4.9, -1.0, float("nan")):
        with pytest.raises(ValueError, match="order of time"):
            server.handle(earlier, TimerFired())
    assert server.state.now == 5.0


def test_a_rejected_answer_leaves_the_task_outstanding_for_a_better_one() -> None:
    server, commands = started()
    task = tasks(commands)[0]
    bad = make_result(task.start.train, steps=0)
    assert names(server.handle(1.0, UpdateArrived(task.client, task.id, bad))) == ["Reject"]
    assert answer(server, 2.0, task) == []
    again = answer(server, 3.0, task)
    assert isinstance(again[0], Reject)
    assert "not outstanding" in again[0].reason


def test_a_client_that_joins_again_while_busy_brings_its_new_profile() -> None:
    server, commands = started()
    task = tasks(commands)[0]
    server.handle(1.0, ClientJoined(Profile(task.client, 777)))
    assert task.id in server.state.busy
    answer(server, 2.0, task)
    assert server.state.idle[task.client].examples == 777


def test_a_lost_client_takes_its_task_along_and_may_come_back() -> None:
    server, commands = started()
    first, second = tasks(commands)
    assert server.handle(1.0, ClientLost(first.client)) == []
    assert names(answer(server, 2.0, second)) == ["Publish", "Evaluate", "Dispatch"]
    server.handle(3.0, ClientJoined(toys.profiles(2)[first.client]))
    assert server.state.idle.keys() == {first.client}


def test_the_budget_is_asked_for_each_task_anew() -> None:
    rule = RandomRank(1, 2)
    server, commands = started(clients=8, assign=Plan(rule, 3), limits=Limits(versions=4))
    sent = tasks(play(server, commands))
    assert {task.budget.rank for task in sent} == {1, 2}
    for task in sent:
        assert {f.rank for f in task.start.train.factors.values()} == {task.budget.rank}


def test_the_policies_cannot_write_into_the_server() -> None:
    server, _ = started()
    for table in (
        server.fleet().idle,
        server.fleet().busy,
        server.fleet().reported_examples,
        server.fleet().dispatched,
    ):
        with pytest.raises(TypeError):
            table["x"] = None  # type: ignore[index]


@pytest.mark.parametrize("schedule", toys.schedules(), ids=toys.called)
def test_the_weight_of_a_client_depends_on_no_answer_of_it(schedule: Any) -> None:
    """A liar about its examples changes not a bit, whatever the schedule."""
    made = [versions_with(schedule, lie) for lie in (10, 1, 10**12)]
    assert made[0] == made[1] == made[2]


def versions_with(schedule: Any, lie: int) -> list[str]:
    """The versions of a run in which `c1` answers with so many examples."""
    server, commands = started(4, schedule=schedule, limits=Limits(versions=4, evaluate_every=0))
    done, now = list[str](), 0.0
    while server.state.busy and now < 60:
        now += 1.0
        task = min(server.state.busy.values(), key=lambda one: one.id)
        result = make_result(toys.changed(task.start, task.id), lie if task.client == "c1" else 10)
        commands = server.handle(now, UpdateArrived(task.client, task.id, result))
        done += [fingerprint(command.model.adapter) for command in commands if isinstance(command, Publish)]
    assert done
    return done


def test_one_bad_first_answer_is_set_aside_once_there_are_others() -> None:
    server, commands = started(4, schedule=Rounds(cohort_size=4))
    found = list[Command]()
    for task in tasks(commands):
        by = 100.0 if task.client == "c0" else 0.1
        found += server.handle(
            1.0, UpdateArrived(task.client, task.id, make_result(toys.changed(task.start, task.id, by)))
        )
    aside = [command for command in found if isinstance(command, SetAside)]
    assert [one.client for one in aside] == ["c0"]
    assert "the median of others" in aside[0].reason
    merged = [update.task.client for command in found if isinstance(command, Publish) for update in command.updates]
    assert sorted(merged) == ["c1", "c2", "c3"]
    far = min(server.state.busy.values(), key=lambda one: one.id)
    (reject,) = server.handle(2.0, UpdateArrived(far.client, far.id, make_result(toys.changed(far.start, 1, 100.0))))
    assert isinstance(reject, Reject)
    assert (
        server.handle(2.0, UpdateArrived(far.client, far.id, make_result(toys.changed(far.start, 1, 0.1)))) is not None
    )
    assert far.id not in server.state.busy


def test_a_spoilt_model_can_be_trained_on() -> None:
    """The limit on a tensor's norm is about its change: honest answers to a model of norm 7e8 are taken."""
    start = toys.adapter(2, layers={"only": (4, 3)})
    huge = map_tensors(lambda tensor: tensor * 1e8, start)
    server, commands = started(start=huge)
    (task, *_) = tasks(commands)
    assert not any(isinstance(one, Reject) for one in answer(server, 1.0, task))


def test_what_clients_reported_is_remembered_for_the_plan() -> None:
    server, commands = started(schedule=Rounds(cohort_size=2))
    task = tasks(commands)[0]
    server.handle(1.0, UpdateArrived(task.client, task.id, make_result(task.start.train, examples=123)))
    registered = server.state.idle[task.client].examples
    assert server.fleet().reported_examples == {task.client: registered}, "not what the answer says"
    assert server.fleet().dispatched == {"c0": 1, "c1": 1}


def pruning(rank: int, **more: Any) -> tuple[Server, list[Command]]:
    """A server whose clients may prune themselves, with a model of this rank."""
    given: dict[str, Any] = {
        "method": HetLoRA(),
        "assign": Plan(FixedRank(rank), 2),
        "start": toys.adapter(rank),
    } | more
    return started(**given)


def pruned(server: Server, now: float, task: Task, rank: int) -> list[Command]:
    """Answer with no more than `rank` directions."""
    left = Adapter({n: cut_factor(f, rank) for n, f in task.start.train.factors.items()}, task.start.train.dense)
    return server.handle(now, UpdateArrived(task.client, task.id, make_result(left)))


def ranks(commands: list[Command]) -> dict[str, set[int]]:
    """What each client is asked for: the rank of its budget and those of its factors."""
    return {t.client: {t.budget.rank, *(f.rank for f in t.start.train.factors.values())} for t in tasks(commands)}


def test_a_client_that_pruned_itself_is_never_asked_for_more_again() -> None:
    server, commands = pruning(4, limits=Limits(versions=9))
    asked: list[dict[str, set[int]]] = []
    for turn, rank in enumerate((3, 4, 2, 4)):  # 4: as many as it is asked for, no pruning
        first, second = sorted(tasks(commands), key=lambda task: task.client)
        assert pruned(server, 2.0 * turn + 1, first, rank) == []
        commands = answer(server, 2.0 * turn + 2, second)
        asked.append(ranks(commands))
    assert [one["c0"] for one in asked] == [{3}, {3}, {2}, {2}]
    assert [one["c1"] for one in asked] == [{4}] * 4
    assert {f.rank for f in server.state.model.adapter.factors.values()} == {4}


def test_a_smaller_budget_still_counts_for_a_pruned_client() -> None:
    server, commands = pruning(4)
    first, second = tasks(commands)
    pruned(server, 1.0, first, 3)
    server.budget_rule = Plan(FixedRank(1), 2)
    assert ranks(answer(server, 2.0, second)) == {"c0": {1}, "c1": {1}}


def test_a_client_that_left_is_remembered_as_it_pruned_itself() -> None:
    server, commands = pruning(4)
    first, second = tasks(commands)
    pruned(server, 1.0, first, 2)
    server.handle(2.0, ClientLost(first.client))
    server.handle(3.0, ClientJoined(toys.profiles(2)[first.client]))
    assert ranks(answer(server, 4.0, second))[first.client] == {2}


@pytest.mark.parametrize("method", [FedIT(), HetLoRA(prune=False), HetLoRA(least=4)], ids=toys.called)
def test_a_lower_rank_that_was_not_allowed_is_refused_and_not_remembered(method: Any) -> None:
    server, commands = pruning(4, method=method)
    first, second = tasks(commands)
    assert names(pruned(server, 1.0, first, 3)) == ["Reject"]
    answer(server, 2.0, second)
    assert ranks(answer(server, 3.0, first)) == {"c0": {4}, "c1": {4}}


@pytest.mark.parametrize(
    "bad", [{"versions": 0}, {"seconds": 0.0}, {"seconds": -1.0}, {"seconds": float("nan")}, {"evaluate_every": -1}]
)
def test_bad_limits_are_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(bad))):
        Limits(**bad)
