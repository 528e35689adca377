"""What stays at clients: a run is the same whether it is kept for ever, dropped where it is of no use, or put into a store."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import pytest
import torch

from fedloom import (
    Averaged,
    DeltaInt8,
    FedBuff,
    FedEx,
    FedFa,
    FedIT,
    FedSA,
    FLoRA,
    Hierarchy,
    Immediate,
    Limits,
    LoRAA2,
    Plan,
    ProductDelta,
    RandomRank,
    RoLoRA,
    Rounds,
    Scaffold,
    World,
)
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.types import ClientState
from fedloom.simulate.client_states import ClientStates, StoredState
from fedloom.simulate.simulation import Simulation
from tests.support import toys
from tests.support.pairs import goes_together
from tests.support.simulated_runs import JITTER, Log, Remembering
from tests.support.storms import one_in

METHODS: tuple[Aggregator, ...] = (
    ProductDelta(), FedIT(), LoRAA2(), FedEx(), FLoRA(), RoLoRA(), Averaged(FedIT()), FedSA(), Scaffold(clients=6),
)  # fmt: skip
AGAIN: Schedule = FedBuff(buffer_size=6, max_in_flight=3)
"""A client may train twice on one version: its moments live through both tasks, in product space too."""
PAIRS = [pair for pair in product(METHODS, (AGAIN, FedFa(3, max_in_flight=3), Rounds(3))) if goes_together(*pair)]


@dataclass
class Shelf:
    """A store in memory, which hands out copies."""

    states: dict[str, bytes] = field(default_factory=dict)
    given: int = 0

    def put(self, state: ClientState, task: int) -> str:
        self.states[str(task)] = pickle.dumps(state)
        return str(task)

    def get(self, name: str) -> ClientState:
        self.given += 1
        state: ClientState = pickle.loads(self.states[name])
        return state


def trace(states: ClientStates, method: Aggregator, schedule: Schedule, hierarchy: Hierarchy | None = None) -> str:
    """The trace of a run whose answers tell what their clients remember."""
    given: dict[str, Any] = {"schedule": schedule, "method": method, "start": toys.fresh(4)}
    given |= {"assign": Plan(RandomRank(2, 4), 2), "limits": Limits(versions=6), "transfer": DeltaInt8()}
    server, log = toys.tree((3, 3), hierarchy, **given) if hierarchy else toys.server(**given), Log()
    Simulation(
        server, Remembering(), World(jitter=JITTER), toys.profiles(6), log.score, log, client_states=states
    ).run()
    return log.file.getvalue()


@pytest.mark.parametrize(("method", "schedule"), one_in(4, PAIRS), ids=toys.called)
def test_what_is_dropped_or_put_away_would_not_have_been_used(method: Aggregator, schedule: Schedule) -> None:
    shelf = Shelf()
    kept, states = ClientStates(), ClientStates(shelf, rotates=method.space == "product")
    told = trace(kept, method, schedule)
    assert trace(states, method, schedule) == told
    if schedule == AGAIN and not isinstance(method, FLoRA):  # which gives each task a basis of its own
        assert '"count":2.0' in told, "nobody remembered anything"
    assert any(one.moments for one in kept.settled.values() if isinstance(one, ClientState))
    assert bool(shelf.states) == (not isinstance(method, ProductDelta | FLoRA))


@pytest.mark.slow
@pytest.mark.parametrize("method", [ProductDelta(), FedIT(), FedEx()], ids=toys.called)
def test_neither_would_it_in_groups(method: Aggregator) -> None:
    hierarchy, shelf = Hierarchy(rounds=3, schedule=FedFa(2, max_in_flight=2)), Shelf()
    states = ClientStates(shelf, rotates=method.space == "product")
    assert trace(states, method, Rounds(2), hierarchy) == trace(ClientStates(), method, Rounds(2), hierarchy)


@pytest.mark.parametrize("schedule", [AGAIN, Immediate(max_in_flight=3)], ids=toys.called)
def test_moments_of_a_basis_that_is_gone_are_nowhere(schedule: Schedule) -> None:
    """In memory are those of the version that there is, and in the store none."""
    states = ClientStates(Shelf(), rotates=True)
    trace(states, ProductDelta(), schedule)
    newest = int(states.newest[""])
    holding = [one for one in states.settled.values() if isinstance(one, ClientState) and one.moments]
    assert newest == 6
    assert all(one.basis.startswith(f"{newest}/") for one in holding)
    assert {one.basis for one in states.settled.values()} - {one.basis for one in holding}, "somebody answered earlier"


def test_a_state_is_read_only_where_its_client_has_a_use_for_it() -> None:
    shelf, moments = Shelf(), {"w": {"exp_avg": torch.ones(3)}}
    states, task = ClientStates(shelf), toys.make_task(toys.fresh(2), 2, client="c1")
    there = ClientState(task.start.basis, moments)
    states.settle("c1", states.keep(there, 4), 4)
    assert states.settled == {"c1": StoredState("4", there.basis, lasting=False)}
    assert states.before(task).moments["w"]["exp_avg"].tolist() == [1.0, 1.0, 1.0]
    elsewhere = replace(task, start=replace(task.start, basis="7/2"))
    assert (states.before(elsewhere), shelf.given) == (ClientState(), 1)
    states.settle("c1", states.keep(replace(there, private=toys.fresh(2)), 5), 5)
    assert states.before(elsewhere).private is not None
    assert (states.state_of("c2"), states.before(replace(task, client="c2"))) == (ClientState(), ClientState())


def test_nothing_is_put_away_that_holds_nothing() -> None:
    shelf = Shelf()
    for rotates in (False, True):
        states = ClientStates(shelf, rotates)
        assert states.keep(ClientState("3/8"), 1) == ClientState("3/8")
    assert not shelf.states
