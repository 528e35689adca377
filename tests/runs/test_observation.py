"""What an observation reads from the steps of a server: each task ends once, counts, and staleness."""

from __future__ import annotations

from fedloom.core.events import (
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    EdgeJoined,
    Event,
    ScoresReady,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.policies import Schedule
from fedloom.core.server import Server
from fedloom.runs.observation import Fact, RunObservation, TaskAnswered, TaskEnded, TaskSent, VersionMade
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.rounds import Rounds
from tests.support import toys


def endings(facts: list[Fact]) -> list[tuple[int, str, int]]:
    return [(fact.open.task.id, fact.status, fact.staleness) for fact in facts if isinstance(fact, TaskEnded)]


def begin(schedule: Schedule, clients: int, versions: int = 2) -> tuple[Server, RunObservation, list[Command]]:
    """A server whose clients have joined, and the commands with which it starts them."""
    server, seen = toys.server(schedule, limits=Limits(versions=versions, evaluate_every=1)), RunObservation()
    for profile in toys.profiles(clients).values():
        step = ClientJoined(profile)
        assert list(seen.read(0.0, step, server.handle(0.0, step))) == [step]
    commands = server.handle(0.0, TimerFired())
    return server, seen, commands


def answer(commands: list[Command], at: int) -> UpdateArrived:
    task = [command.task for command in commands if isinstance(command, Dispatch)][at]
    return UpdateArrived(task.client, task.id, toys.make_result(task.start.train))


def test_a_round_from_dispatch_to_version() -> None:
    server, seen, start = begin(Rounds(cohort_size=3), 3)
    facts = list(seen.read(0.0, TimerFired(), start))
    sent = [fact.task.id for fact in facts if isinstance(fact, TaskSent)]
    assert list(seen.sent) == sent
    for now, at in ((1.0, 1), (2.0, 0)):
        event = answer(start, at)
        (fact,) = seen.read(now, event, server.handle(now, event))
        assert isinstance(fact, TaskAnswered)
        assert (fact.client, fact.number, fact.refused) == (event.client, event.task, False)
        assert fact.task is not None
        assert fact.task.id == event.task
    assert (list(seen.sent), list(seen.answered)) == ([sent[2]], [sent[1], sent[0]])
    assert seen.outstanding == {seen.sent[sent[2]].task.client: sent[2]}
    event = answer(start, 2)
    facts = list(seen.read(3.0, event, server.handle(3.0, event)))
    assert sorted(endings(facts)) == [(number, "merged", 0) for number in sent]
    (made,) = (fact for fact in facts if isinstance(fact, VersionMade))
    assert (made.version, made.staleness, made.evaluated) == (1, (0, 0, 0), True)
    assert (seen.version, seen.accepted, seen.merged_updates, seen.mean_staleness) == (1, 3, 3, 0.0)


def test_failed_lost_and_refused() -> None:
    server, seen, start = begin(Rounds(cohort_size=3), 3)
    list(seen.read(0.0, TimerFired(), start))
    first, second, third = (answer(start, at) for at in range(3))
    event: Event = UpdateArrived(first.client, first.task, toys.make_result(first.result.adapter, examples=0))
    (fact,) = seen.read(1.0, event, server.handle(1.0, event))
    assert isinstance(fact, TaskAnswered)
    assert fact.refused
    assert (seen.rejected, seen.accepted, len(seen.sent)) == (1, 0, 3)
    event = TaskFailed(second.client, second.task, "no power")
    assert endings(list(seen.read(2.0, event, server.handle(2.0, event)))) == [(second.task, "failed", 0)]
    event = ClientLost(third.client)
    assert endings(list(seen.read(3.0, event, server.handle(3.0, event)))) == [(third.task, "lost", 0)]
    assert (seen.failed, list(seen.sent), seen.outstanding) == (1, [first.task], {first.client: first.task})


def test_staleness_counts_versions_made_meanwhile_and_the_end_cancels() -> None:
    server, seen, start = begin(FedAsync(max_in_flight=3), 3)
    list(seen.read(0.0, TimerFired(), start))
    event = answer(start, 0)
    assert endings(list(seen.read(1.0, event, server.handle(1.0, event)))) == [(event.task, "merged", 0)]
    event = answer(start, 1)
    facts = list(seen.read(2.0, event, server.handle(2.0, event)))  # the second and last version
    assert endings(facts)[0] == (event.task, "merged", 1)
    cancelled = [fact for fact in facts if isinstance(fact, TaskEnded) and fact.status == "cancelled"]
    assert {fact.reason for fact in cancelled} == {"the run ended before it was answered"}
    assert (seen.total_staleness, seen.mean_staleness) == (1, 0.5)
    assert (seen.sent, seen.answered, seen.cancelled) == ({}, {}, len(cancelled))


def test_it_may_begin_in_the_middle() -> None:
    """As the status of a deployment does whose server was started again: unknown tasks are counted and end nothing."""
    server, seen, start = begin(FedAsync(max_in_flight=2), 2)
    event = answer(start, 0)
    facts = list(seen.read(1.0, event, server.handle(1.0, event)))
    assert isinstance(facts[0], TaskAnswered)
    assert facts[0].task is None
    assert endings(facts) == []
    assert (seen.accepted, seen.merged_updates) == (1, 1)
    scores = ScoresReady(1, {"loss": 0.5})
    assert list(seen.read(1.0, scores, [])) == [scores]
    assert seen.scores == {"loss": 0.5}


def test_a_task_of_an_edge_elsewhere_ends_as_a_clients_and_as_an_edges() -> None:
    seen, edge = RunObservation(), toys.profiles(1)["c0"]
    list(seen.read(0.0, EdgeJoined(edge), []))
    _, _, commands = begin(FedAsync(max_in_flight=1), 1)
    (task,) = (command.task for command in commands if isinstance(command, Dispatch))
    list(seen.read(0.0, TimerFired(), [Dispatch(task)]))
    facts = [fact for fact in seen.read(2.0, ClientLost(edge.client), []) if isinstance(fact, TaskEnded)]
    assert [(fact.status, fact.by_edge) for fact in facts] == [("lost", False), ("failed", True)]
    assert (seen.sent, seen.edge_tasks) == ({}, {})
