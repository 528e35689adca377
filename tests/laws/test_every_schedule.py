"""Laws 6 and 7 for every schedule in the folder, in storms of events through the real server.

A storm is a list of (what, whom, how much later). Its ledger is kept apart from the server's own tables, and after each
event the two must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedloom.schedule
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Event,
    Publish,
    Reject,
    Scored,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.lora import Adapter, Factor
from fedloom.core.policies import Fleet, Merge, Schedule
from fedloom.core.server import Limits, Server
from fedloom.core.types import Profile, Result, Task
from fedloom.runs.trace import written
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.toys import make_result

SCHEDULES = toys.schedules()
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=toys.called)
KINDS = ("join", "join", "lose", "answer", "answer", "answer", "again", "foreign", "spoilt", "fail", "timer", "scored")
STORM = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.sampled_from((0.0, 0.0, 1.0, 4.0))), max_size=40
)
NAMES = [f"c{k}" for k in range(8)]


def snapshot(server: Server) -> object:
    """The whole state but the clock, tensors by their sha256."""
    state = json.loads(written(server.state))
    return {name: value for name, value in state.items() if name != "now"}


def twin(server: Server) -> Server:
    """A copy to try something on."""
    other = copy.copy(server)
    tables = {f.name: getattr(server.state, f.name) for f in dataclasses.fields(server.state)}
    idle = IndexedTable(tables.pop("idle"))
    other.state = type(server.state)(
        idle=idle, **{n: copy.copy(t) if isinstance(t, dict | list) else t for n, t in tables.items()}
    )
    return other


def good(task: Task) -> Result:
    """The answer of a client that learnt nothing."""
    return make_result(task.start.train, control=task.start.control)


def spoilt(result: Result, how: int) -> Result:
    """The result with one thing wrong."""
    bad = [{"examples": 0}, {"steps": 10**6}, {"metrics": {"loss": float("nan")}}, {"adapter": Adapter({})}]
    name, f = next(iter(result.adapter.factors.items()))
    tensors = [Factor(f.down * float("inf"), f.up), Factor(f.down[:1], f.up[:, :1]), Factor(f.down.double(), f.up)]
    bad += [{"adapter": dataclasses.replace(result.adapter, factors={name: one})} for one in tensors]
    return dataclasses.replace(result, **bad[how % len(bad)])  # type: ignore[arg-type]


@dataclasses.dataclass
class Watched:
    """The schedule, and what it decided to merge."""

    inner: Schedule
    merges: list[Merge] = dataclasses.field(default_factory=list)

    def merge(self, fleet: Fleet) -> Merge | None:
        """Passed on and noted."""
        decided = self.inner.merge(fleet)
        self.merges += [decided] if decided else []
        return decided

    def start(self, fleet: Fleet) -> Sequence[str]:
        """Passed on."""
        return self.inner.start(fleet)

    def wake(self, fleet: Fleet) -> float | None:
        """Passed on."""
        return self.inner.wake(fleet)


class Storm:
    """A driver with a ledger of its own; every disagreement with the server is an AssertionError."""

    def __init__(self, schedule: Schedule, **more: Any) -> None:
        """Nobody is there yet; `more` is about the server."""
        self.watched = Watched(schedule)
        self.server = toys.server(self.watched, limits=Limits(versions=12), **more)
        self.now, self.stopped = 0.0, False
        self.present: set[str] = set()
        self.tasks: dict[int, Task] = {}
        self.outstanding: dict[int, str] = {}
        self.waiting: set[int] = set()
        self.merged: set[int] = set()
        self.dropped: set[int] = set()

    def step(self, kind: str, pick: int, later: float) -> None:
        """One event of this kind; `pick` chooses whom it is about."""
        self.now += later
        open_tasks, closed = sorted(self.outstanding), sorted(self.tasks.keys() - self.outstanding.keys())
        number = open_tasks[pick % len(open_tasks)] if open_tasks else None
        if kind == "join":
            self.join(NAMES[pick])
        elif kind == "lose":
            self.lose(NAMES[pick])
        elif kind == "timer":
            self.tell(TimerFired())
        elif kind == "scored":
            self.tell(Scored(self.server.state.version, {"accuracy": 0.5}))
        elif kind == "again" and closed:
            old = self.tasks[closed[pick % len(closed)]]
            self.refused(UpdateArrived(old.client, old.id, good(old)))
            self.refused(TaskFailed(old.client, old.id, "late"))
        elif number is not None and kind == "foreign":
            thief = NAMES[(NAMES.index(self.outstanding[number]) + 1) % len(NAMES)]
            self.refused(UpdateArrived(thief, number, good(self.tasks[number])))
            self.refused(TaskFailed(thief, number, "sabotage"))
        elif number is not None and kind == "spoilt":
            result = spoilt(good(self.tasks[number]), pick)
            self.refused(UpdateArrived(self.outstanding[number], number, result))
        elif number is not None and kind == "answer":
            self.answer(number)
        elif number is not None and kind == "fail":
            self.fail(number)

    def join(self, client: str) -> None:
        """Written down, decided later."""
        if not self.stopped:
            self.present.add(client)
        self.tell(ClientJoined(Profile(client, 10)))

    def lose(self, client: str) -> None:
        """Its task is dropped."""
        gone = {n for n, c in self.outstanding.items() if c == client}
        self.dropped |= gone
        self.outstanding = {n: c for n, c in self.outstanding.items() if c != client}
        self.present.discard(client)
        self.tell(ClientLost(client))

    def answer(self, number: int) -> None:
        """A good answer, which counts."""
        client = self.outstanding.pop(number)
        self.waiting.add(number)
        self.tell(UpdateArrived(client, number, good(self.tasks[number])))

    def fail(self, number: int) -> None:
        """The client gives up."""
        self.dropped.add(number)
        self.tell(TaskFailed(self.outstanding.pop(number), number, "out of memory"))

    def refused(self, event: UpdateArrived | TaskFailed) -> None:
        """Must be rejected with a reason, and leave the state as it was."""
        before = snapshot(self.server)
        commands = self.server.handle(self.now, event)
        assert snapshot(self.server) == before
        if not self.stopped:
            assert [type(c) for c in commands] == [Reject]
            assert commands[0].reason  # type: ignore[union-attr]
        self.check()

    def tell(self, event: Event) -> None:
        """Handle it, follow the commands, compare the books."""
        self.watched.merges.clear()
        commands = self.server.handle(self.now, event)
        assert not (self.stopped and commands)
        for command in commands:
            self.follow(command)
        assert {update.task.id for update in self.server.state.arrived} == self.waiting
        self.check()

    def follow(self, command: Command) -> None:
        """Write one command into the ledger."""
        match command:
            case Dispatch(task):
                assert task.id not in self.tasks, "a task id was used twice"
                assert task.client in self.present - set(self.outstanding.values()), "not idle"
                assert task.sent == self.now
                self.tasks[task.id] = task
                self.outstanding[task.id] = task.client
            case Cancel(number, client):
                assert self.outstanding.pop(number) == client
                self.dropped.add(number)
            case Publish(_, _, updates):
                self.publish([update.task.id for update in updates], self.watched.merges.pop(0))
            case Stop():
                assert not self.outstanding
                self.stopped = True
            case Reject():
                pytest.fail(f"a good event was rejected: {command.reason}")

    def publish(self, numbers: list[int], merge: Merge) -> None:
        """A reply counts once, unless the schedule keeps it for the next merge; none is thrown away."""
        kept = {update.task.id for update in merge.retain}
        assert len(numbers) == len(set(numbers))
        assert set(numbers) == {update.task.id for _, update in merge.parts}
        assert set(numbers) | kept <= self.waiting, "merged without waiting"
        assert self.waiting - self.merged <= set(numbers) | kept, "thrown away"
        self.merged |= set(numbers)
        self.waiting = kept

    def check(self) -> None:
        """The books agree, and the timer is a level."""
        state = self.server.state
        assert {n: t.client for n, t in state.busy.items()} == self.outstanding
        assert {c: n for c, (_, n) in state.working.items()} == {c: n for n, c in self.outstanding.items()}
        assert not state.idle.keys() & state.working.keys()
        if not self.stopped:
            assert state.idle.keys() | state.working.keys() == self.present
        accounted = set(self.outstanding) | self.waiting | self.merged | self.dropped
        assert accounted == self.tasks.keys(), "a dispatch ended nowhere"
        assert not self.merged & self.dropped
        self.check_wake()

    def check_wake(self) -> None:
        """No wake in the past, none forgotten, and none that does nothing."""
        wake = self.server.wake()
        assert wake is None or (wake >= self.now and not self.stopped)
        early = twin(self.server)
        if early.handle(self.now, TimerFired()):
            assert wake == self.now, "something was due, and nobody would have looked"
        if wake is not None:
            tried = twin(self.server)
            commands = tried.handle(wake, TimerFired())
            assert commands or tried.wake() != wake, "a hot loop: the timer fires and changes nothing"

    def finish(self, survivor: str) -> None:
        """Everyone but one is lost; the run still ends."""
        for client in sorted(self.present - {survivor}):
            self.lose(client)
        if survivor not in self.present:
            self.join(survivor)
        for _ in range(100):
            if self.stopped:
                return
            if self.outstanding:
                self.answer(min(self.outstanding))
            else:
                wake = self.server.wake()
                assert wake is not None, "blocked for ever"
                self.now = wake
                self.tell(TimerFired())
        pytest.fail("no end in sight")


def weather(schedule: Schedule, script: list[tuple[str, int, float]], **more: Any) -> Storm:
    storm = Storm(schedule, **more)
    for event in script:
        storm.step(*event)
    storm.finish(NAMES[len(script) % len(NAMES)])
    return storm


@every_schedule
@given(script=STORM)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_a_storm(schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    weather(schedule, script)


@pytest.mark.slow
@every_schedule
@given(script=STORM)
@settings(max_examples=150 * toys.STORMS, deadline=None)
def test_a_long_storm(schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    weather(schedule, script)


@every_schedule
def test_a_crowd_that_comes_and_goes_together(schedule: Schedule) -> None:
    together = [("join", k, 0.0) for k in range(8)] + [("timer", 0, 0.0)]
    leave = [("lose", k, 1.0) for k in range(8)]
    weather(schedule, together + leave + together + [("answer", 0, 1.0)] * 9 + leave)


@every_schedule
def test_a_late_driver_misses_no_deadline(schedule: Schedule) -> None:
    """A rejected reply that is handled just after the wake time must not swallow the timer (law 7)."""
    joined = [("join", k, 0.0) for k in range(6)] + [("timer", 0, 0.0), ("answer", 0, 1.0)]
    weather(schedule, [*joined, ("again", 0, 4.0), ("foreign", 0, 4.0), ("spoilt", 1, 4.0)])


def test_every_class_that_starts_clients_is_a_whole_schedule_and_constructs_with_no_arguments() -> None:
    found = toys.classes(fedloom.schedule, ("start", "merge"))
    assert found == toys.classes(fedloom.schedule, toys.SCHEDULE)
    assert Rounds in found
    assert all(cls() == cls() for cls in found)


@every_schedule
def test_merges_are_convex(schedule: Schedule) -> None:
    """Weights of the parts are positive or zero and sum to 1, and the step is in (0, 1]."""
    storm = Storm(schedule)
    for client in NAMES:
        storm.join(client)
    storm.tell(TimerFired())
    while storm.outstanding and not storm.merged:
        busy = storm.server.fleet()
        merge = schedule.merge(dataclasses.replace(busy, arrived=tuple(toys.returned(t) for t in storm.tasks.values())))
        if merge is not None:
            weights = [w for w, _ in merge.parts]
            assert min(weights) >= 0
            assert sum(weights) == pytest.approx(1)
            assert 0 < merge.step <= 1
        storm.answer(min(storm.outstanding))
    assert storm.merged


def test_the_storm_sees_tensors() -> None:
    """The snapshot would notice one changed bit of the model."""
    server = toys.server()
    before = snapshot(server)
    adapter = server.state.model.adapter
    changed = {name: Factor(f.down, f.up + torch.tensor(1e-3)) for name, f in adapter.factors.items()}
    server.state.model = dataclasses.replace(server.state.model, adapter=Adapter(changed, adapter.dense))
    assert snapshot(server) != before
