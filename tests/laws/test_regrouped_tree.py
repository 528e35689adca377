"""Laws 6, 7 and 8 in storms in which clients' times drift and groups are made anew: nothing is lost or counted twice by a move.

The books are those of `test_every_tree`; beside them stands who is in which group, which only `Moved` may change.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.events import Command, Moved, Regroup, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.policies import Schedule
from fedloom.hierarchy.grouping import BySpeed, Grouping, Groups, Member, NearIID
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.tree import Tree
from fedloom.hierarchy.tree_state import Link
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from tests.support import toys
from tests.support.server_storm import good_result
from tests.support.storms import one_in, tries
from tests.support.tree_storm import GROUPS, NAMES, PLAIN, START, STORM, TreeStorm


@dataclass(frozen=True)
class Uneven:
    """The slowest apart, the quickest apart, everybody else together: groups of other sizes than before."""

    def __call__(self, members: Sequence[Member], seed: int) -> Groups:
        """Sorted by seconds."""
        first, *rest, last = (m.client for m in sorted(members, key=lambda m: (m.seconds, m.client)))
        return ((last,), tuple(rest), (first,))


GROUPINGS: tuple[Grouping, ...] = (BySpeed(3), Uneven(), NearIID(3, waiting=1.0, largest=6))


def drifting_tree(
    above: Schedule, below: Schedule | None, grouping: Grouping, link: Link | None, rounds: int = 2
) -> Tree:
    """A tree of three edges whose groups are made anew at the least drift."""
    hierarchy = Hierarchy(grouping, rounds, below, link=link, regroup=1e-6)
    given: dict[str, Any] = {"start": START, "assign": Plan(RandomRank(1, 3), 4), "limits": Limits(versions=8)}
    tree: Tree = toys.tree(GROUPS, hierarchy, schedule=above, **given)
    return tree


class Drifting(TreeStorm):
    """Each answer took another time."""

    def __init__(self, tree: Tree, seed: int) -> None:
        """Nobody is there yet."""
        super().__init__(tree)
        self.dice, self.asked, self.moves = random.Random(seed), 0, 0

    def answer(self, number: int) -> None:
        """A good_result answer, which counts."""
        client, task = self.outstanding.pop(number), self.tasks[number]
        self.waiting.add(number)
        took = {f"seconds_{part}": self.dice.lognormvariate(0.0, 2.0) for part in ("down", "train", "up")}
        self.tell(UpdateArrived(client, number, replace(good_result(task), metrics=took)))

    def follow(self, command: Command) -> None:
        """Write one command into the books."""
        if isinstance(command, Regroup):
            assert command.drift > command.threshold == 1e-6
            assert {move.client: move.edge for move in command.moves}.items() <= self.home.items()
            self.asked += 1
            return
        self.moves += isinstance(command, Moved)
        super().follow(command)


def run_drifting_storm(tree: Tree, script: list[tuple[str, int, float]], seed: int) -> Drifting:
    storm = Drifting(tree, seed)
    for event in [("join", k, 0.0) for k in range(8)] + script:
        storm.step(*event)
    storm.finish(NAMES[len(script) % len(NAMES)])
    return storm


@pytest.mark.parametrize("grouping", GROUPINGS, ids=toys.called)
@pytest.mark.parametrize("above", PLAIN, ids=lambda one: type(one).__name__)
@given(data=st.data(), script=STORM, seed=st.integers(0, 99))
@tries(10)
def test_a_storm_with_drift(
    above: Schedule, grouping: Grouping, data: st.DataObject, script: list[tuple[str, int, float]], seed: int
) -> None:
    below = data.draw(st.sampled_from((None, *PLAIN)))
    run_drifting_storm(
        drifting_tree(above, below, grouping, data.draw(st.sampled_from((None, Link(2e4, 1e4))))), script, seed
    )


@pytest.mark.parametrize("link", [None, Link(2e4, 1e4)], ids=["near", "far"])
@pytest.mark.parametrize("above", one_in(2, PLAIN), ids=lambda one: type(one).__name__)
def test_a_calm_sea_with_drift_moves_clients(above: Schedule, link: Link | None) -> None:
    """Without it the storms could pass because nothing ever moves."""
    asked = moves = 0
    for grouping in GROUPINGS:
        calm = [step for k in range(60) for step in (("timer", 0, 0.0), ("answer", k % 8, 1.0))]
        storm = run_drifting_storm(drifting_tree(above, None, grouping, link), calm, 3)
        asked, moves = asked + storm.asked, moves + storm.moves
    assert asked >= 3
    assert moves >= 3


@pytest.mark.slow
@pytest.mark.parametrize("above", toys.schedules(), ids=toys.called)
@given(data=st.data(), script=STORM, seed=st.integers(0, 99))
@tries(100)
def test_a_storm_with_drift_of_every_pair(
    above: Schedule, data: st.DataObject, script: list[tuple[str, int, float]], seed: int
) -> None:
    below, grouping = data.draw(st.sampled_from((None, *toys.schedules()))), data.draw(st.sampled_from(GROUPINGS))
    link, rounds = data.draw(st.sampled_from((None, Link(2e4, 1e4)))), data.draw(st.integers(1, 4))
    run_drifting_storm(drifting_tree(above, below, grouping, link, rounds), script, seed)
