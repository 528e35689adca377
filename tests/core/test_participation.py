"""How often a client may take part: the server counts merged answers, lets a client rest in time, and ends where nobody is left."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Dispatch,
    Publish,
    Reject,
    ReleasesCounted,
    SetAside,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.lora import map_tensors
from fedloom.core.participation import Participation
from fedloom.core.server import Server
from fedloom.core.types import Profile
from fedloom.privacy.private import Private
from fedloom.privacy.private_merge import PrivateMerge
from fedloom.privacy.secret_noise import SecretNoise
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.toys import make_result


def server_of(rule: Participation, schedule: Any, clients: int = 3) -> tuple[Server, list[Any]]:
    """A server that clients have joined, and its first commands."""
    server = toys.server(schedule, limits=Limits(versions=50, evaluate_every=0, norm_ratio=None), participation=rule)
    for k in range(clients):
        server.handle(0.0, ClientJoined(Profile(f"c{k}", 10)))
    return server, server.handle(0.0, TimerFired())


def answer(server: Server, client: str) -> list[Any]:
    number = server.state.working[client][1]
    return server.handle(0.0, UpdateArrived(client, number, make_result(server.state.busy[number].start.train)))


def play(server: Server, commands: list[Any]) -> list[Any]:
    """Whoever was asked first answers first, until the run ends."""
    commands = list(commands)
    while not server.state.stopped:
        commands += answer(server, min(server.state.busy.items())[1].client)
    return commands


def test_an_answer_that_waits_counts_before_it_is_merged() -> None:
    """Else a fast client could have one too many in a buffer."""
    server, _ = server_of(Participation(1), FedBuff(buffer_size=3, max_in_flight=3))
    assert not any(isinstance(command, Dispatch) for command in answer(server, "c0"))
    assert [*server.state.resting] == ["c0"]
    assert server.state.merged == {}


def test_answers_that_are_set_aside_leave_no_gap_in_what_was_retained() -> None:
    server, _ = server_of(Participation(1), FedBuff(buffer_size=3, max_in_flight=3))
    for client in ("c0", "c1"):
        answer(server, client)
    server.state.retained = 2
    server.handle(0.0, ReleasesCounted({"c0": 1}, {"c0": 1}))
    assert [update.task.client for update in server.state.arrived] == ["c1"]
    assert server.state.retained == 1


def test_a_run_ends_when_every_client_has_given_its_answers() -> None:
    server, commands = server_of(Participation(2), Rounds(cohort_size=3))
    commands = play(server, commands)
    assert server.state.merged == {"c0": 2, "c1": 2, "c2": 2}
    assert [c.reason for c in commands if isinstance(c, Stop)] == [
        "every client has given the 2 answers that the run's privacy allows it"
    ]


def test_a_task_that_failed_and_an_answer_that_came_too_late_cost_nothing() -> None:
    server, _ = server_of(Participation(1), Rounds(cohort_size=1, over_selection=2.0), clients=2)
    first, second = sorted(task.client for task in server.state.busy.values())
    number = server.state.working[first][1]
    server.handle(0.0, TaskFailed(first, number, "no memory"))
    assert first in server.state.idle
    answer(server, second)
    assert server.state.merged == {second: 1}
    assert second in server.state.resting


def test_a_client_that_left_and_comes_back_has_not_more_answers() -> None:
    server, _ = server_of(Participation(1), Immediate(max_in_flight=3))
    answer(server, "c1")
    server.handle(0.0, ClientLost("c1"))
    assert "c1" not in server.state.resting
    server.handle(0.0, ClientJoined(Profile("c1", 10)))
    assert "c1" in server.state.resting
    assert "c1" not in server.state.idle


def test_a_run_waits_for_a_client_that_is_away_and_may_still_answer() -> None:
    server, _ = server_of(Participation(1), Immediate(max_in_flight=3), clients=2)
    server.handle(0.0, ClientLost("c1"))
    assert not any(isinstance(command, Stop) for command in answer(server, "c0"))
    server.handle(0.0, ClientJoined(Profile("c1", 10)))
    server.handle(0.0, TimerFired())
    assert any(isinstance(command, Stop) for command in answer(server, "c1"))


@pytest.mark.parametrize(
    "schedule", [Immediate(max_in_flight=5), FedBuff(2, 5), FedBuff(1, 5, waiting=True)], ids=toys.called
)
def test_merges_of_one_client_are_apart(schedule: Any) -> None:
    """Also where its answer waits for a version, or arrives late."""
    server, commands = server_of(Participation(9, apart=2), schedule, clients=5)
    last, versions = dict[str, int](), 0
    for command in play(server, commands):
        if isinstance(command, Publish):
            versions += 1
            merged = [update.task.client for update in command.updates]
            assert len(merged) == len(set(merged))
            assert all(command.version - last.get(client, -9) >= 2 for client in merged)
            last |= dict.fromkeys(merged, command.version)
    assert versions > 10


def test_a_federation_too_small_for_its_distance_stops_and_says_so() -> None:
    server, commands = server_of(Participation(9, apart=3), Rounds(cohort_size=3))
    (stop,) = [command for command in play(server, commands) if isinstance(command, Stop)]
    assert stop.reason.startswith("no client may be merged before 3 versions have passed")


def test_where_answers_are_releases_tasks_are_counted() -> None:
    """A site that adds noise has released an answer when it has sent it, merged or not."""
    server, _ = server_of(Participation(1, tasks=True), Immediate(max_in_flight=3))
    number = server.state.working["c0"][1]
    server.handle(0.0, TaskFailed("c0", number, "no memory"))
    assert "c0" in server.state.resting


def test_releases_that_the_state_does_not_know_count_and_nothing_is_one_too_many() -> None:
    """After a crash: a waiting answer and a task are taken back where they could be one more than the client may give."""
    server, _ = server_of(Participation(2), FedBuff(buffer_size=3, max_in_flight=3), clients=4)
    answer(server, "c0")
    told = server.handle(0.0, ReleasesCounted({"c0": 2, "c1": 2}, {"c0": 1, "c1": 2}))
    assert [command.client for command in told if isinstance(command, SetAside)] == ["c0"]
    assert [command.client for command in told if isinstance(command, Cancel)] == ["c1"]
    assert {"c0", "c1"} <= server.state.resting.keys()
    play(server, told)
    assert (server.state.merged["c0"], server.state.merged["c1"]) == (2, 2)
    assert max(server.state.merged.values()) <= 2


def test_a_server_that_clips_takes_answers_however_far_they_moved() -> None:
    """A refusal would tell of the answer, and its reason would tell its length."""
    private = PrivateMerge(Private(clip=0.5, multiplier=1.0, most_answers=2), SecretNoise(b"s" * 32, ("test",)))
    for mechanism, taken in ((None, False), (private, True)):
        limits = Limits(versions=50, evaluate_every=0, norm_ratio=None, step_ratio=None)
        server = toys.server(Immediate(), limits=limits, mechanism=mechanism)
        server.handle(0.0, ClientJoined(Profile("c0", 10)))
        server.handle(0.0, TimerFired())
        start = next(iter(server.state.busy.values())).start.train
        far = map_tensors(lambda tensor: tensor + 1e6, start)
        commands = server.handle(0.0, UpdateArrived("c0", 1, make_result(far)))
        assert any(isinstance(command, Publish) for command in commands) == taken
        assert any(isinstance(command, Reject) for command in commands) != taken
