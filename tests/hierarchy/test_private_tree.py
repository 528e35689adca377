"""Privacy below edges: they see single clients, so they add the noise, and the root adds none."""

from __future__ import annotations

from typing import Any

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.events import Command, Event, InsideEdge, Publish, Release, Stop
from fedloom.core.limits import Limits
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.tree import Tree
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.privacy.private import Private
from fedloom.privacy.private_merge import PrivateMerge, private_limits
from fedloom.privacy.secret_noise import SecretNoise
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import uniform
from fedloom.simulate.devices import World
from fedloom.simulate.simulation import Simulation
from tests.support import toys


def simulated(method: Any, most_answers: int) -> tuple[Tree, list[Command]]:
    """Groups of 3, 3 and 2, two inner versions a task, four versions of the root."""
    private = Private(clip=0.5, multiplier=1.0, most_answers=most_answers)
    more = {
        "mechanism": PrivateMerge(private, SecretNoise(b"s" * 32, ("tree",))),
        "participation": private.participation,
        "limits": private_limits(Limits(versions=4, evaluate_every=0)),
    }
    plan, start = Plan(RandomRank(1, 3), 2), toys.graded([1.0, 0.5, 0.2])
    schedule = Rounds(weigh=uniform)
    tree = toys.tree((3, 3, 2), Hierarchy(rounds=2), method=method, start=start, schedule=schedule, assign=plan, **more)
    seen = list[Command]()

    def observe(now: float, event: Event, commands: list[Command]) -> None:
        seen.extend(commands)

    Simulation(tree, toys.Null(), World(), toys.profiles(8), lambda model: {}, observe).run()
    return tree, seen


@pytest.mark.parametrize("method", [FedIT(), pytest.param(ProductDelta(), marks=pytest.mark.slow)], ids=toys.called)
def test_each_inner_version_is_a_release_to_the_members_and_the_roots_are_none(method: Any) -> None:
    _, seen = simulated(method, most_answers=8)
    inside = [one for one in seen if isinstance(one, InsideEdge) and isinstance(one.command, Release | Publish)]
    for release, publish in zip(inside[::2], inside[1::2], strict=True):
        assert isinstance(release.command, Release)
        assert isinstance(publish.command, Publish)
        assert release.edge == publish.edge
        assert release.command.task == release.task, "two tasks of one edge have versions of one number"
        assert release.command.shares.keys() == {one.task.client for one in publish.command.updates}
        assert set(release.command.shares.values()) == {1.0}, "members weigh alike"
    assert len({one.command.value for one in inside if isinstance(one.command, Release)}) == len(inside) // 2
    assert not any(isinstance(one, Release) for one in seen)
    assert len([one for one in seen if isinstance(one, Publish)]) == 4


def test_a_run_ends_when_the_members_of_all_edges_have_given_their_answers() -> None:
    """Also where some of them go into a task that is not finished."""
    tree, seen = simulated(FedIT(), most_answers=3)
    merged = {client: count for edge in tree.below.edges.values() for client, count in edge.server.merged.items()}
    assert merged == {f"c{k}": 3 for k in range(8)}
    (stop,) = [one for one in seen if isinstance(one, Stop)]
    assert stop.reason == "every client has given the 3 answers that the run's privacy allows it"
