"""A storm: random events through a real server, and a ledger of its own with which the server must agree after each of them.

A storm is a list of (what, whom, how much later).
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import strategies as st

from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Event,
    Publish,
    Reject,
    ScoresReady,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.indexed_dict import IndexedTable
from fedloom.core.limits import Limits
from fedloom.core.lora import Adapter, Factor
from fedloom.core.policies import Fleet, Merge, Schedule
from fedloom.core.server import Server
from fedloom.core.types import Profile, Result, Task
from fedloom.runs.trace import ENCODER
from tests.support import toys
from tests.support.toys import make_result

KINDS = ("join", "join", "lose", "answer", "answer", "answer", "again", "foreign", "spoilt", "fail", "timer", "scored")
STORM = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.sampled_from((0.0, 0.0, 1.0, 4.0))), max_size=40
)
NAMES = [f"c{k}" for k in range(8)]


def snapshot(server: Server) -> object:
    """The whole state but the clock, tensors by their sha256."""
    state = json.loads(ENCODER.encode(server.state))
    return {name: value for name, value in state.items() if name != "now"}


def copy_server(server: Server) -> Server:
    """A copy to try something on."""
    other = copy.copy(server)
    tables = {f.name: getattr(server.state, f.name) for f in dataclasses.fields(server.state)}
    idle = IndexedTable(tables.pop("idle"))
    other.state = type(server.state)(
        idle=idle, **{n: copy.copy(t) if isinstance(t, dict | list) else t for n, t in tables.items()}
    )
    return other


def good_result(task: Task) -> Result:
    """The answer of a client that learnt nothing."""
    return make_result(task.start.train, control=task.start.control)


def spoil(result: Result, how: int) -> Result:
    """The result with one thing wrong."""
    bad = [{"examples": 0}, {"steps": 10**6}, {"metrics": {"loss": float("nan")}}, {"adapter": Adapter({})}]
    name, f = next(iter(result.adapter.factors.items()))
    tensors = [Factor(f.down * float("inf"), f.up), Factor(f.down[:1], f.up[:, :1]), Factor(f.down.double(), f.up)]
    bad += [{"adapter": dataclasses.replace(result.adapter, factors={name: one})} for one in tensors]
    return dataclasses.replace(result, **bad[how % len(bad)])  # type: ignore[arg-type]


@dataclasses.dataclass
class RecordingSchedule:
    """The schedule, and what it decided to merge."""

    inner: Schedule
    merges: list[Merge] = dataclasses.field(default_factory=list)

    @property
    def max_in_flight(self) -> int:
        """Passed on."""
        return self.inner.max_in_flight

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
        self.recorded = RecordingSchedule(schedule)
        self.server = toys.server(self.recorded, limits=Limits(versions=12), **more)
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
            self.tell(ScoresReady(self.server.state.version, {"accuracy": 0.5}))
        elif kind == "again" and closed:
            old = self.tasks[closed[pick % len(closed)]]
            self.refused(UpdateArrived(old.client, old.id, good_result(old)))
            self.refused(TaskFailed(old.client, old.id, "late"))
        elif number is not None and kind == "foreign":
            thief = NAMES[(NAMES.index(self.outstanding[number]) + 1) % len(NAMES)]
            self.refused(UpdateArrived(thief, number, good_result(self.tasks[number])))
            self.refused(TaskFailed(thief, number, "sabotage"))
        elif number is not None and kind == "spoilt":
            result = spoil(good_result(self.tasks[number]), pick)
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
        self.tell(UpdateArrived(client, number, good_result(self.tasks[number])))

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
        self.recorded.merges.clear()
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
                self.publish([update.task.id for update in updates], self.recorded.merges.pop(0))
            case Stop():
                assert not self.outstanding
                self.stopped = True
            case Reject():
                pytest.fail(f"a good event was rejected: {command.reason}")

    def publish(self, numbers: list[int], merge: Merge) -> None:
        """A reply counts once, unless the schedule keeps it for the next merge; none is thrown away."""
        kept = {update.task.id for update in merge.retain}
        assert len(numbers) == len(set(numbers))
        assert set(numbers) == {update.task.id for _, update in merge.weighted_updates}
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
            assert state.idle.keys() | state.working.keys() | state.resting.keys() == self.present
        accounted = set(self.outstanding) | self.waiting | self.merged | self.dropped
        assert accounted == self.tasks.keys(), "a dispatch ended nowhere"
        assert not self.merged & self.dropped
        self.check_wake()

    def check_wake(self) -> None:
        """No wake in the past, none forgotten, and none that does nothing."""
        wake = self.server.wake()
        assert wake is None or (wake >= self.now and not self.stopped)
        early = copy_server(self.server)
        if early.handle(self.now, TimerFired()):
            assert wake == self.now, "something was due, and nobody would have looked"
        if wake is not None:
            tried = copy_server(self.server)
            commands = tried.handle(wake, TimerFired())
            assert commands or tried.wake() != wake, "a hot loop: the timer fires and changes nothing"

    def finish_alone(self, survivor: str) -> None:
        """Everyone but one is lost; the run still ends."""
        for client in sorted(self.present - {survivor}):
            self.lose(client)
        if survivor not in self.present:
            self.join(survivor)
        self.finish()

    def finish(self) -> None:
        """Whoever is there answers until the run ends."""
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


def run_storm(schedule: Schedule, script: list[tuple[str, int, float]], **more: Any) -> Storm:
    storm = Storm(schedule, **more)
    for event in script:
        storm.step(*event)
    storm.finish_alone(NAMES[len(script) % len(NAMES)])
    return storm
