"""A storm for a tree: members and edges come, go, answer and fail, and the tree must agree with a ledger after each event.

The ledger is kept from the commands alone, as an auditor of the trace would: every answer that was accepted is in one inner
version, waits for one, or is said to be discarded; every report is in the root's versions, waits, or is said to have ended.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st

import fedloom.schedule
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.events import (
    Cancel,
    ClientJoined,
    ClientLost,
    Command,
    Discarded,
    Dispatch,
    EdgeLost,
    EdgeReturned,
    Event,
    InsideEdge,
    Moved,
    Publish,
    Reject,
    Report,
    ScoresReady,
    Stop,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.limits import Limits
from fedloom.core.policies import Schedule
from fedloom.core.types import Task
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.root_server import RootServer
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import BLOCK, Link, TreeView
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.runs.trace import ENCODER, encode_step
from tests.support import toys
from tests.support.server_storm import copy_server, good_result, spoil

KINDS = (
    "join",
    "join",
    "lose",
    "answer",
    "answer",
    "answer",
    "answer",
    "again",
    "foreign",
    "spoilt",
    "fail",
    "timer",
    "timer",
)
EDGES = ("edge lost", "edge kept", "edge kept", "edge back", "edge back", "scored")
STORM = st.lists(
    st.tuples(st.sampled_from(KINDS + EDGES), st.integers(0, 7), st.sampled_from((0.0, 0.0, 1.0, 4.0))),
    min_size=20,
    max_size=60,
)
GROUPS = (3, 3, 2)
PROFILES = toys.profiles(sum(GROUPS))
NAMES = list(PROFILES)
PLAIN = [schedule for schedule in toys.schedules() if schedule not in toys.FLAGGED[fedloom.schedule]]
START = toys.graded([1.0, 0.5, 0.2])


def storm_tree(above: Schedule, below: Schedule, **more: Any) -> Tree:
    """A tree of three edges on slow links."""
    own: dict[str, Any] = {"rounds": 2, "link": Link(2e4, 1e4)}
    how = {name: more.pop(name) for name in list(more) if name in ("rounds", "link", "aggregator")}
    hierarchy = Hierarchy(schedule=below, **(own | how))
    given: dict[str, Any] = {"method": ProductDelta(), "start": START, "assign": Plan(RandomRank(1, 3), 4)}
    tree: Tree = toys.tree(GROUPS, hierarchy, schedule=above, limits=Limits(versions=6), **(given | more))
    return tree


def snapshot(tree: Tree) -> object:
    """Everything but the clocks, tensors by their sha256."""
    states = [tree.root.state, *(edge.server for edge in tree.below.edges.values())]
    told = [
        {name: value for name, value in json.loads(ENCODER.encode(state)).items() if name != "now"} for state in states
    ]
    edges = [
        (edge.contributions, edge.down, edge.waiting_task and edge.waiting_task.id)
        for edge in tree.below.edges.values()
    ]
    return told, ENCODER.encode(edges), [(time, entry.task_id) for time, _, entry in tree.below.messages]


def copy_tree(tree: Tree) -> Tree:
    """A copy to try something on; what is frozen is shared."""
    other = copy.copy(tree)
    other.root = RootServer(copy_server(tree.root.server), trusted=True, learned=other._regroup_learns)
    other._edges, edges = {}, {}
    for name, edge in tree._edges.items():
        other._edges[name] = copy.copy(edge)
        edge.state = tree.below.edges[name]
        edge.server.state = edge.state.server
        other._edges[name].server = copy_server(edge.server)
        edges[name] = replace(
            edge.state, server=other._edges[name].server.state, contributions=dict(edge.state.contributions)
        )
    mine = tree.below
    copies = {name: type(getattr(mine, name))(getattr(mine, name)) for name in ("edge_of", "leaving", "seconds")}
    other.below = replace(mine, edges=edges, messages=list(mine.messages), **copies)
    other.state = TreeView(other.root.state, other.below)
    return other


class TreeStorm:
    """A driver with books of its own; every disagreement is an AssertionError."""

    def __init__(self, tree: Tree) -> None:
        """Nobody is there yet."""
        self.tree, self.now, self.stopped = tree, 0.0, False
        self.present: set[str] = set()
        self.tasks: dict[int, Task] = {}
        self.outstanding: dict[int, str] = {}
        self.waiting: set[int] = set()
        self.merged: dict[int, int] = {}
        self.dropped: set[int] = set()
        self.outer: dict[int, Task] = {}
        self.reported: set[int] = set()
        self.counted: set[int] = set()
        self.ended: set[int] = set()
        self.down: set[str] = set()
        self.home = dict(tree.edge_of)

    def step(self, kind: str, pick: int, later: float) -> None:
        """One event of this kind; `pick` chooses whom it is about."""
        self.now += later
        numbers, closed = sorted(self.outstanding), sorted(self.tasks.keys() - self.outstanding.keys())
        number = numbers[pick % len(numbers)] if numbers else None
        edge = f"edge{pick % len(GROUPS)}"
        if kind == "join":
            self.join(NAMES[pick])
        elif kind == "lose":
            self.lose(NAMES[pick])
        elif kind == "timer":
            self.now = max(self.now, self.tree.wake() or self.now)
            self.tell(TimerFired())
        elif kind == "scored":
            self.tell(ScoresReady(self.tree.state.version, {"accuracy": 0.5}))
        elif kind in ("edge lost", "edge kept") and edge not in self.down:
            self.down.add(edge)
            self.tell(EdgeLost(edge, resumes=kind == "edge kept"))
        elif kind == "edge back" and edge in self.down:
            self.down.discard(edge)
            self.tell(EdgeReturned(edge))
        elif kind == "again" and closed:
            old = self.tasks[closed[pick % len(closed)]]
            self.refused(UpdateArrived(old.client, old.id, good_result(old)))
        elif number is not None and kind == "foreign":
            thief = NAMES[(NAMES.index(self.outstanding[number]) + 1) % len(NAMES)]
            self.refused(UpdateArrived(thief, number, good_result(self.tasks[number])))
        elif number is not None and kind == "spoilt":
            self.refused(UpdateArrived(self.outstanding[number], number, spoil(good_result(self.tasks[number]), pick)))
        elif number is not None and kind == "answer":
            self.answer(number)
        elif number is not None and kind == "fail":
            self.dropped.add(number)
            self.tell(TaskFailed(self.outstanding.pop(number), number, "out of memory"))

    def join(self, client: str) -> None:
        """Written down, decided later."""
        self.present |= set() if self.stopped else {client}
        self.tell(ClientJoined(PROFILES[client]))

    def lose(self, client: str) -> None:
        """Its task is dropped."""
        gone = {n for n, c in self.outstanding.items() if c == client}
        self.dropped |= gone
        self.outstanding = {n: c for n, c in self.outstanding.items() if n not in gone}
        self.present.discard(client)
        self.tell(ClientLost(client))

    def answer(self, number: int) -> None:
        """A good answer, which counts."""
        client = self.outstanding.pop(number)
        self.waiting.add(number)
        self.tell(UpdateArrived(client, number, good_result(self.tasks[number])))

    def refused(self, event: UpdateArrived) -> None:
        """Rejected with a reason, and the tree stays as it was."""
        before = snapshot(self.tree)
        commands = self.tree.handle(self.now, event)
        assert snapshot(self.tree) == before
        assert self.stopped or [type(command) for command in commands] == [Reject]

    def tell(self, event: Event) -> None:
        """Handle it, follow the commands, compare the books."""
        commands = self.tree.handle(self.now, event)
        assert not (self.stopped and commands)
        encode_step(self.now, event, commands)
        for command in commands:
            self.follow(command)
        self.check()

    def follow(self, command: Command) -> None:
        """Write one command into the books."""
        assert not self.stopped, "a command after the stop"
        match command:
            case Dispatch(task):
                assert task.id not in self.tasks, "a task id was used twice"
                assert task.client in self.present - set(self.outstanding.values())
                assert task.sent == self.now
                assert self.home[task.client] not in self.down
                assert self.home[task.client] == f"edge{(task.id - 1) // BLOCK}"
                self.tasks[task.id] = task
                self.outstanding[task.id] = task.client
            case Cancel(number, client):
                assert self.outstanding.pop(number) == client
                self.dropped.add(number)
            case Publish(_, _, updates):
                reports = [update.task.id for update in updates]
                assert len(set(reports)) == len(reports)
                assert set(reports) <= self.reported - self.ended
                self.counted |= set(reports)
            case InsideEdge(_, number, what):
                self.inside(number, what)
            case Moved(move):
                assert move.client not in self.outstanding.values(), "it is at work"
                assert move.client not in {self.tasks[mine].client for mine in self.waiting}, "its answer counts here"
                assert self.home[move.client] == move.edge != move.to
                self.home[move.client] = move.to
            case Stop():
                self.stopped = True
            case Reject():
                pytest.fail(f"a good event was rejected: {command.reason}")

    def inside(self, number: int, what: Any) -> None:
        """What is said of an outer task."""
        match what:
            case Dispatch(task):
                assert task.id == number
                assert number not in {*self.outer, *self.tasks}
                self.outer[number] = task
                return
            case Publish(_, _, updates):
                for update in updates:
                    mine = update.task.id
                    assert mine in self.waiting or self.merged[mine] == number, "counted for two outer tasks"
                    assert update.task.start.basis.startswith(f"{number}:"), "work of an earlier task"
                    self.waiting.discard(mine)
                    self.merged[mine] = number
            case Discarded(mine):
                assert mine in self.waiting
                self.waiting.discard(mine)
                self.dropped.add(mine)
            case Report(result):
                own = {self.tasks[mine].client for mine, outer in self.merged.items() if outer == number}
                assert result.examples == sum(PROFILES[client].examples for client in own), "as registered"
                assert number not in self.reported
                self.reported.add(number)
            case Cancel() | Stop():
                assert number not in self.counted | self.ended
                self.ended.add(number)
            case Reject():
                pytest.fail(f"the root rejected a report: {what.reason}")
        assert number in self.outer

    def check(self) -> None:
        """The books agree, and the timer is a level."""
        state = self.tree.state
        assert {number: task.client for number, task in state.busy.items()} == self.outstanding
        assert {client: number for client, (_, number) in state.working.items()} == {
            client: number for number, client in self.outstanding.items()
        }
        assert self.stopped or set(state.idle) | set(state.working) == self.present
        books = [set(self.outstanding), self.waiting, set(self.merged), self.dropped]
        assert sum(map(len, books)) == len(set().union(*books)), "an answer in two books"
        assert set().union(*books) == self.tasks.keys()
        arrived = {one.task.id for edge in self.tree.below.edges.values() for one in edge.server.arrived}
        assert self.waiting <= arrived <= self.waiting | self.merged.keys()
        root = self.tree.root.state
        assert set(root.busy) | {one.task.id for one in root.arrived} | self.counted | self.ended == self.outer.keys()
        assert self.home == self.tree.edge_of
        assert {edge: {one.client for one in log.members} for edge, log in root.groups.items()} == {
            edge: {client for client, own in self.home.items() if own == edge} for edge in set(self.home.values())
        }, "an edge lost its last member"
        for edge, profile in [*root.idle.items(), *((edge, own) for edge, (own, _) in root.working.items())]:
            assert profile == root.groups[edge].edge, "the root knows an edge by other members"
        self.check_wake()

    def check_wake(self) -> None:
        """No wake in the past, none forgotten, and none that does nothing."""
        wake = self.tree.wake()
        assert wake is None or (wake >= self.now and not self.stopped)
        early = copy_tree(self.tree)
        if early.handle(self.now, TimerFired()):
            assert wake == self.now, "something was due, and nobody would have looked"
        if wake is not None:
            tried = copy_tree(self.tree)
            assert tried.handle(wake, TimerFired()) or tried.wake() != wake, "a hot loop"

    def finish(self, survivor: str) -> None:
        """Edges are back, everyone but one is lost; the run still ends."""
        for edge in sorted(self.down):
            self.down.discard(edge)
            self.tell(EdgeReturned(edge))
        for client in sorted(self.present - {survivor}):
            self.lose(client)
        if survivor not in self.present:
            self.join(survivor)
        for _ in range(1000):
            if self.stopped:
                return
            wake = self.tree.wake()
            if self.outstanding and (wake is None or wake > self.now):
                self.answer(min(self.outstanding))
            else:
                assert wake is not None, "blocked for ever"
                self.now = wake
                self.tell(TimerFired())
        pytest.fail("no end in sight")


def run_tree_storm(tree: Tree, script: list[tuple[str, int, float]], crowd: bool = True) -> None:
    storm = TreeStorm(tree)
    for event in [("join", k, 0.0) for k in range(8) if crowd] + script:
        storm.step(*event)
    storm.finish(NAMES[len(script) % len(NAMES)])
    if 5 not in tree.root.server.aggregator.exempt:
        assert toys.distance(toys.function(tree.state.model), toys.products(START)) < 1e-4
