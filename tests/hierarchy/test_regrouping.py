"""Groups made again in the course of a run: when, who moves, what moves along, and what a run folder tells of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedloom import BySpeed, FedFa, FixedRank, Given, Hierarchy, Limits, NearIID, Plan, Refused, Rounds, World, by_work
from fedloom.core.events import ClientJoined, Dispatch, InsideEdge, Move, Moved, Publish, Regroup, Report
from fedloom.core.model_shape import Shape
from fedloom.core.server_state import State
from fedloom.core.types import GroupHistory, MemberWork, Profile, Result, Task
from fedloom.hierarchy.edge import EdgeState
from fedloom.hierarchy.grouping import Groups, match_groups, time_drift
from fedloom.hierarchy.joint_plan.joint_plan import member_history
from fedloom.hierarchy.regrouping import Compared, estimated_seconds, possible_moves, target_groups
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import TreeState
from fedloom.simulate.devices import Devices, Seconds
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.simulated_runs import QUADRATIC, Log

SHAPE = Shape(1000, 100, 2, 10, ((12, 10), (10, 14)), 3, depths={"query": 2, "value": 1})

# When -------------------------------------------------------------------------------------------------------------------------


def test_drift_is_the_share_by_which_times_moved_apart() -> None:
    before = dict.fromkeys("abcd", 2.0)
    assert time_drift(before, {"a": 2.5, "b": 2.5, "c": 1.6, "d": 1.6}) == pytest.approx(0.25)
    assert time_drift(before, dict.fromkeys("abcd", 8.0)) == 0.0
    assert time_drift(before, {"e": 1.0}) == math.inf


def test_times_are_those_that_were_foreseen_where_tasks_took_what_was_foreseen() -> None:
    """Whatever the rank and the depth of the tasks that were seen."""
    from fedloom.runs.prepare import (
        comparison_seconds,  # here, since it imports transformers, which no other test needs
    )

    profile, tokens = Profile("c0", 10, flops=1e4, up_bps=1e4, down_bps=2e4), 300
    for rank, depth in ((8, None), (2, None), (4, 1)):
        train = 2 * SHAPE.train_flops(50, rank, depth) / 1e4
        down, up = 8 * SHAPE.payload(rank) / 2e4, 8 * SHAPE.payload(rank, depth) / 1e4
        one = MemberWork("c0", rank, depth, 1, 2, down, train, up)
        two = replace(one, answers=2, steps=4, down=2 * down, train=2 * train, up=2 * up)
        told = Compared((), 8, 6, tokens).seconds((one, two), SHAPE)
        assert told == pytest.approx(comparison_seconds(SHAPE, profile, 8, tokens)), (rank, depth)
    assert Compared((), 8, 6, tokens).seconds((), SHAPE) == 0.0


def test_a_unit_that_all_have_in_common_is_no_drift() -> None:
    """Texts that are shorter than the longest make everybody quicker, also those who were not heard of yet."""
    before = {"a": 1.0, "b": 2.0, "c": 4.0}
    now = estimated_seconds(before, {"a": 0.3, "b": 0.6})
    assert now == pytest.approx({"a": 0.3, "b": 0.6, "c": 1.2})
    assert time_drift(before, now) == pytest.approx(0.0)
    assert estimated_seconds(before, {}) == before


# Who --------------------------------------------------------------------------------------------------------------------------


def test_new_groups_keep_the_numbers_of_those_they_have_most_of() -> None:
    before: Groups = (("a", "b", "c"), ("d", "e"), ("f",))
    assert match_groups(before, (("f",), ("a", "d", "e"), ("b", "c"))) == (("b", "c"), ("a", "d", "e"), ("f",))
    assert match_groups(before, tuple(reversed(before))) == before
    assert match_groups(before, (("a", "b", "c", "d", "e"), ("f",), ("x",))) == (
        ("a", "b", "c", "d", "e"),
        ("x",),
        ("f",),
    )
    with pytest.raises(Refused, match="there are 3 edges"):
        match_groups(before, (("a", "b", "c", "d", "e", "f"),))


def scene(groups: Groups, leaving: dict[str, str], at_work: tuple[str, ...] = (), away: str = "") -> list[str]:
    """Who may move now."""
    model = toys.server().state.model
    edges, logs = {}, {}
    for k, group in enumerate(groups):
        state = EdgeState(State(model, model))
        for client in group:
            if client not in away:
                state.server.idle.put(client, Profile(client, 10))
        if f"e{k}" in at_work:
            state.server.outer = toys.make_task(toys.adapter(2), 2)
        edges[f"e{k}"], logs[f"e{k}"] = state, GroupHistory(Profile(f"e{k}", 10), tuple(Profile(c, 10) for c in group))
    of = {client: f"e{k}" for k, group in enumerate(groups) for client in group}
    return [move.client for move in possible_moves(logs, TreeState(edges, of, leaving=leaving))]


def test_a_member_leaves_when_its_edge_has_no_task_and_is_not_left_alone() -> None:
    swap = {"a": "e1", "c": "e0"}
    assert scene((("a", "b"), ("c", "d")), swap) == ["a", "c"]
    assert scene((("a", "b"), ("c", "d")), swap, at_work=("e1",)) == ["a"]
    assert scene((("a",), ("c",)), swap) == ["a", "c"], "both at once, and no edge is empty"
    assert scene((("a",), ("c",)), swap, at_work=("e1",)) == [], "its edge would have nobody until the other comes"
    assert scene((("a", "b"), ("c", "d")), {"a": "e1", "b": "e1"}) == ["b"]
    assert scene((("a", "b"), ("c", "d")), {"a": "e1"}, away="b") == [], "nobody could be reached there"
    assert scene((("a", "b"), ("c", "d")), {"b": "e1"}, away="b") == ["b"]
    assert scene((("a", "b"), ("c",)), {"b": "e1", "c": "e0"}, away="b") == ["b"]
    assert scene((("a",), ("b", "c"), ("d",)), {"a": "e1", "b": "e2", "d": "e0"}) == ["a", "b", "d"]


def test_groups_are_made_again_from_those_that_were_asked_for() -> None:
    """Half of an exchange is done, and its groups have other sizes for a while; that is no reason to deal anew."""
    model = toys.server().state.model
    edges = {f"e{k}": EdgeState(State(model, model)) for k in range(2)}
    of = {"a": "e1", "b": "e0", "c": "e1", "d": "e1"}
    assert target_groups(TreeState(edges, of, leaving={"c": "e0"})) == (("b", "c"), ("a", "d"))


# A run that drifts --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slowed:
    """The devices of `inner`; these take so many times as long from their `turn`-th task on."""

    inner: Devices
    clients: tuple[str, ...]
    turn: int
    times: float = 8.0

    def profiles(self, examples: Any, seed: int) -> Any:
        """The same devices."""
        return self.inner.profiles(examples, seed)

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Longer training."""
        took = self.inner.seconds(task, result, profile, shape, seed, turn)
        slow = task.client in self.clients and turn >= self.turn
        return replace(took, train=self.times * took.train) if slow else took


ALIKE = {f"c{k}": Profile(f"c{k}", 10, 1e6, 1e7, 1e7) for k in range(9)}


def drifting(hierarchy: Hierarchy, versions: int = 8, schedule: Any = None) -> tuple[Tree, Log]:
    """Nine equal clients in three groups; c0, c3 and c6, one of each, become slow at their fourth task."""
    given: dict[str, Any] = {"start": toys.fresh(4), "assign": Plan(FixedRank(4), 12)}
    flat = toys.server(schedule or Rounds(3, weigh=by_work), limits=Limits(versions=versions), **given)
    members = {f"edge{k}": tuple(ALIKE[f"c{3 * k + j}"] for j in range(3)) for k in range(3)}
    tree, log = hierarchy.over(flat, members, toys.compared(9)), Log()
    world = Slowed(World(jitter=0.0), ("c0", "c3", "c6"), 4)
    Simulation(tree, QUADRATIC, world, ALIKE, log.score, log).run()
    return tree, log


@pytest.mark.parametrize("grouping", [NearIID(3, waiting=1.0), BySpeed(3)], ids=toys.called)
@pytest.mark.parametrize("schedule", [Rounds(3, weigh=by_work), FedFa(2, 3, weigh=by_work)], ids=toys.called)
def test_who_became_slow_is_put_together(grouping: Any, schedule: Any) -> None:
    tree, log = drifting(Hierarchy(grouping, regroup=0.1), 24 if isinstance(schedule, FedFa) else 8, schedule)
    (home,) = {tree.edge_of[client] for client in ("c0", "c3", "c6")}
    assert {one.client for one in tree.root.state.groups[home].members} == {"c0", "c3", "c6"}
    assert [len(log.members) for log in tree.root.state.groups.values()] == [3, 3, 3]
    asked = log.all(Regroup)
    assert all(one.drift > one.threshold == 0.1 for one in asked)
    moves = len(log.all(Moved))
    if isinstance(schedule, Rounds):
        assert moves == 4, "two go to the third, and two others take their places"
    assert moves >= 4
    assert not tree.below.leaving


def test_without_drift_and_without_the_field_nobody_moves() -> None:
    assert not drifting(Hierarchy(NearIID(3)))[1].all(Regroup)
    assert not drifting(Hierarchy(NearIID(3), regroup=3.0))[1].all(Regroup)
    tree, log = drifting(
        Hierarchy(Given(tuple((f"c{3 * k}", f"c{3 * k + 1}", f"c{3 * k + 2}") for k in range(3))), regroup=0.1)
    )
    assert log.all(Regroup)
    assert {one.moves for one in log.all(Regroup)} == {()}, "groups that are given stay"
    assert tree.edge_of["c3"] == "edge1"


def test_in_rounds_of_the_whole_tree_all_move_before_the_next_begins() -> None:
    """And so from then on nobody waits for a slow one but the other slow ones."""
    _, log = drifting(Hierarchy(NearIID(3, waiting=1.0), regroup=0.1))
    for _, _, commands in log.steps:
        asked = [one for one in commands if isinstance(one, Regroup)]
        if asked:
            assert [one.move for one in commands if isinstance(one, Moved)] == list(asked[0].moves)
            after = commands[commands.index(asked[0]) :]
            members = {one.task.client for one in after if isinstance(one, Dispatch)}
            assert members == set(ALIKE), "the next round begins at once, with everybody"
            assert any(isinstance(one, Publish) for one in commands)
    assert max(one.version for one in log.all(Regroup)) < 8, "after the last version nobody asks"


def test_what_is_known_of_a_client_moves_along() -> None:
    """Its tasks so far, which name its draws; and what it did, from which the root plans."""
    tree, log = drifting(Hierarchy(NearIID(3, waiting=1.0), regroup=0.1))
    moved = {one.move.client for one in log.all(Moved)}
    assert tree.state.dispatched == dict.fromkeys(ALIKE, 16)
    assert tree.state.reported_examples.keys() == tree.state.work_seconds.keys() == ALIKE.keys()
    logs = tree.root.state.groups
    for client in moved:
        known = member_history(logs[tree.edge_of[client]], client)
        assert sum(one.answers for one in known) == 16
        assert {one.client for one in known} == {client}
    for edge, known in logs.items():
        members = {one.client for one in known.members}
        assert {one.client for told in known.statistics for one in told.work} <= {*members, ""}, (
            "it is not told whose it was"
        )
        assert known.past.keys() == moved & members
        assert known.edge == tree.topology.profile(edge, known.members)
        assert all(told.seconds > 0 and len(told.work) == 3 for told in known.statistics)


def test_an_edge_tells_times_alone_where_no_plan_learns() -> None:
    _, log = drifting(Hierarchy(NearIID(3), regroup=0.1), versions=2)
    (told, *_) = [one.command.statistics for one in log.all(InsideEdge) if isinstance(one.command, Report)]
    assert told.work
    assert (told.mass, told.spread) == ({}, 0.0)
    assert all(
        one.command.statistics is None
        for one in drifting(Hierarchy())[1].all(InsideEdge)
        if isinstance(one.command, Report)
    )


def test_a_client_that_is_away_is_taken_in_where_it_moved_to() -> None:
    tree = toys.tree((2, 2), Hierarchy(BySpeed(2), regroup=0.1))
    one, two, *_ = toys.profiles(4).values()
    tree.handle(0.0, ClientJoined(one))
    tree.below.leaving = {"c1": "edge1"}
    assert tree.handle(0.0, ClientJoined(one)) == [Moved(Move("c1", "edge0", "edge1"), max_in_flight=4)]
    tree.handle(0.0, ClientJoined(two))
    assert list(tree.below.edges["edge1"].server.idle) == ["c1"]
    assert (
        tree.root.state.idle["edge1"].examples == sum(own.examples for own in toys.profiles(4).values()) - one.examples
    )


# What is refused ----------------------------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    for wrong in (-0.1, math.inf, math.nan):
        with pytest.raises(Refused, match=r"hierarchy\.regroup"):
            Hierarchy(regroup=wrong)
    with pytest.raises(ValueError, match="compared"):
        Hierarchy(regroup=0.1).over(toys.server(), {"edge0": tuple(ALIKE.values())})
    with pytest.raises(Refused, match="is in no group"):
        drifting(Hierarchy(lambda members, seed: (("c0",), ("c1",), ("c2",)), regroup=0.1))
