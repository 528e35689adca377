"""Waiting, work, staleness and uploads, as metrics tell them: counted again from the trace alone, another way."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.events import (
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Event,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.policies import Schedule
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.runs.metrics import Metrics
from fedloom.runs.observation import RunObservation
from fedloom.runs.slot_usage import SlotUsage
from fedloom.runs.trace import Trace
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.storms import tries

WAITS = (
    FedBuff(buffer_size=2, max_in_flight=4, waiting=True),
    Rounds(cohort_size=3, over_selection=1.4),
    Rounds(cohort_size=4, deadline=0.6),
)
NEVER = (
    FedFa(window=3, max_in_flight=3),
    FedFa(window=4, max_in_flight=2, uploader_goes_on=True, max_staleness=2),
    FedFa(window=3, max_in_flight=9, fill="wait"),
    FedFa(window=3, max_in_flight=3, delta_rate=0.5, dedup=True),
    FedAsync(max_in_flight=4),
    FedBuff(buffer_size=3, max_in_flight=4),
    Immediate(max_in_flight=3, max_staleness=1),
)
SCHEDULES = [*toys.schedules(), *WAITS, *NEVER]
NAMES = [f"c{k}" for k in range(6)]


@dataclass(frozen=True)
class Unreliable:
    """Every n-th answer is refused."""

    every: int

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        """What was sent, with a number of examples that no client can have."""
        return [
            (toys.make_result(task.start.train, examples=0 if task.id % self.every == 0 else 10), local)
            for task, local in work
        ]


@dataclass
class Book:
    """A run's metrics and trace, as lines."""

    schedule: Schedule
    metrics: io.StringIO = field(default_factory=io.StringIO)
    trace: io.StringIO = field(default_factory=io.StringIO)

    def run(self, seed: int, jitter: float, every: int, storm: Sequence[tuple[float, str, bool]] = ()) -> None:
        """Six clients of three speeds, or of one where `jitter` is 0; who is lost when, and joins again, is `storm`."""
        server = toys.server(self.schedule, limits=Limits(versions=15, seconds=5.0, evaluate_every=4))
        observers = Metrics(self.metrics, SlotUsage(self.schedule.max_in_flight)), Trace(self.trace)
        who = {c: Profile(c, 10, 1e6 * (1 + k % 3 * (jitter > 0)), 1e6, 1e6) for k, c in enumerate(NAMES)}

        def observe(now: float, event: Event, commands: list[Command]) -> None:
            for observer in observers:
                observer(now, event, commands)

        heap: list[tuple[float, int, Event]] = [
            (time, -1000 + k, ClientJoined(who[client]) if joins else ClientLost(client))
            for k, (time, client, joins) in enumerate(sorted(storm))
        ]
        heap.append((9.0, -1, TaskFailed("nobody", 10**6, "an answer to what nobody asked")))
        world = World(jitter=jitter)
        Simulation(server, Unreliable(every), world, who, lambda _: {"loss": 0.5}, observe, seed=seed, heap=heap).run()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Metrics of this kind."""
        return [line for line in map(json.loads, self.metrics.getvalue().splitlines()) if line["kind"] == kind]


@dataclass
class Life:
    """A task, as the trace tells it."""

    client: str
    sent: float
    version: int
    answered: float | None = None
    ended: float = float("inf")
    merged: tuple[int, float] | None = None


def told(trace: str) -> tuple[dict[int, Life], dict[int, tuple[list[int], int]], list[tuple[float, str, bool]]]:
    """Every task's life, the tasks in every version, with the answers so far, and who joined or was lost when."""
    lives, versions, moves = dict[int, Life](), dict[int, tuple[list[int], int]](), list[tuple[float, str, bool]]()
    for line in map(json.loads, trace.splitlines()):
        now, event, commands = line["time"], line["event"], line["commands"]
        refused = any(command["type"] == "Reject" for command in commands)
        if event["type"] == "ClientJoined":
            moves.append((now, event["profile"]["client"], True))
        if event["type"] == "ClientLost":
            moves.append((now, event["client"], False))
            for life in lives.values():
                if life.client == event["client"] and life.ended > now:
                    life.ended = now
        if event["type"] in ("UpdateArrived", "TaskFailed") and not refused:
            lives[event["task"]].ended = now
            lives[event["task"]].answered = now if event["type"] == "UpdateArrived" else None
        for command in commands:
            if command["type"] == "Dispatch":
                task = command["task"]
                lives[task["id"]] = Life(task["client"], task["sent"], task["version"])
            if command["type"] == "Cancel":
                lives[command["task"]].ended = now
            if command["type"] == "Publish":
                numbers = list(command["updates"])
                versions[command["version"]] = numbers, sum(life.answered is not None for life in lives.values())
                for number in numbers:
                    lives[number].merged = lives[number].merged or (command["version"], now)
    return lives, versions, moves


def counted(trace: str, places: int, until: float) -> tuple[float, float, float]:
    """Seconds of work, waiting and being held: the state in the middle of every stretch without events, times its length."""
    lives, _, moves = told(trace)
    times = sorted({time for line in map(json.loads, trace.splitlines()) if (time := line["time"]) <= until})
    work = wait = held = 0.0
    for begin, end in pairwise(times):
        now = (begin + end) / 2
        here = {client: joins for time, client, joins in moves if time < now}
        busy = {life.client for life in lives.values() if life.sent < now < life.ended}
        idle = {client for client, joins in here.items() if joins} - busy
        answers = [life for life in lives.values() if life.answered is not None and life.answered < now]
        latest = {life.client: life for life in answers}
        lost = {client: max((t for t, who, joins in moves if who == client and not joins and t < now), default=-1.0)
                for client in here}  # fmt: skip
        waits = {
            client
            for client, life in latest.items()
            if client in idle
            and not any(life.sent < other.sent < now for other in lives.values() if other.client == client)
            and lost[client] < (life.answered or 0.0)
            and (life.merged is None or life.merged[1] > now)
        }
        work += (end - begin) * len(busy)
        wait += (end - begin) * min(places - len(busy), len(idle))
        held += (end - begin) * min(places - len(busy), len(waits))
    return work, wait, held


STORM = st.lists(st.tuples(st.floats(0.01, 3.0), st.sampled_from(NAMES[1:]), st.booleans()), max_size=8)
RUN = {"seed": st.integers(0, 99), "jitter": st.sampled_from((0.0, 0.4)), "every": st.sampled_from((3, 5, 10**6))}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=toys.called)
@given(storm=STORM, **RUN)
@tries(10)
def test_every_figure_follows_from_the_trace(
    schedule: Schedule, seed: int, jitter: float, every: int, storm: list[tuple[float, str, bool]]
) -> None:
    book = Book(schedule)
    book.run(seed, jitter, every, storm)
    lives, versions, _ = told(book.trace.getvalue())
    lines = book.lines("version")
    assert [line["version"] for line in lines] == sorted(versions)
    for line in lines:
        numbers, answers = versions[line["version"]]
        assert (line["updates"], line["uploads"]) == (len(numbers), answers)
        stale = [line["version"] - 1 - lives[number].version for number in numbers]
        assert line["staleness"] == pytest.approx(sum(stale) / len(stale))
        assert line["staleness_max"] == max(stale)
    for line in lines[:1] + lines[-1:]:
        figures = line["working_seconds"], line["waiting_seconds"], line["held_seconds"]
        assert figures == pytest.approx(counted(book.trace.getvalue(), schedule.max_in_flight, line["time"]), abs=1e-9)
    tasks = {line["id"]: line for line in book.lines("task")}
    assert len(tasks) == len(book.lines("task")), "a task has two lines"
    assert tasks.keys() == lives.keys()
    for number, life in lives.items():
        assert tasks[number]["arrived"] == life.ended
        assert (tasks[number]["status"] == "merged") == (life.merged is not None)
        if life.merged:
            assert tasks[number]["staleness"] == life.merged[0] - 1 - life.version


@pytest.mark.parametrize("schedule", NEVER, ids=toys.called)
@given(storm=STORM, **RUN)
@tries(10)
def test_a_schedule_that_never_waits_waits_for_exactly_nothing(
    schedule: Schedule, seed: int, jitter: float, every: int, storm: list[tuple[float, str, bool]]
) -> None:
    book = Book(schedule)
    book.run(seed, jitter, every, storm)
    assert all(line["waiting_seconds"] == 0.0 == line["held_seconds"] for line in book.lines("version"))
    assert any(line["working_seconds"] > 0 for line in book.lines("version"))


@pytest.mark.parametrize("schedule", WAITS, ids=toys.called)
def test_a_schedule_that_waits_says_so(schedule: Schedule) -> None:
    book = Book(schedule)
    book.run(seed=1, jitter=0.4, every=10**6)
    last = book.lines("version")[-1]
    assert last["waiting_seconds"] >= last["held_seconds"] > 0


def test_a_place_whose_client_answered_waits_until_the_round_ends_and_a_failed_one_holds_nobody() -> None:
    """Three places, answers after 1, 2 and 4 s: 3 + 2 s of waiting; the second failed, so that 3 s are held."""
    server, use, observation = toys.server(Rounds(3)), SlotUsage(3), RunObservation()

    def follow(now: float, event: Event) -> list[Command]:
        use.advance(now)
        commands = server.handle(now, event)
        for fact in observation.read(now, event, commands):
            use.follow(fact)
        return commands

    steps: list[tuple[float, Event]] = [(0.0, ClientJoined(profile)) for profile in toys.profiles(3).values()]
    for now, event in steps:
        assert follow(now, event) == []
    commands = follow(0.0, TimerFired())
    tasks = [command.task for command in commands if isinstance(command, Dispatch)]
    first, second, third = (UpdateArrived(t.client, t.id, toys.make_result(t.start.train)) for t in tasks)
    for now, step in ((1.0, first), (2.0, TaskFailed(second.client, second.task, "no power")), (4.0, third)):
        follow(now, step)
    assert (use.working_seconds, use.waiting_seconds, use.held_seconds) == (1 + 2 + 4, 3 + 2, 3)
    assert len(use.working) == 3
