"""Look-ahead changes nothing: a run whose answers come true in any order, early or late, is what it is with all known at once."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom import FedFa, Limits, Plan, RandomRank, Rounds, World
from fedloom.core.events import Dispatch, UpdateArrived
from fedloom.core.policies import PendingResult, Schedule, Trainer
from fedloom.core.types import ClientState, Result, Task
from fedloom.simulate.availability import Availability, Traced
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.delays import DelayClasses, Delays, ExponentialDelays
from fedloom.simulate.devices import Capabilities, Devices, Seconds
from fedloom.simulate.faults import Faults
from tests.support import toys
from tests.support.simulated_runs import Log, Remembering, simulation
from tests.support.storms import tries

WORLDS: tuple[Devices, ...] = (
    World(jitter=0.3), Capabilities(), Delays(), Delays(sigma=0.0), ExponentialDelays(), DelayClasses(concentration=None),
)  # fmt: skip
"""What is foreseen is all but the upload, then all of it; with sigma 0 everything happens at the same moments."""

FAULTS = (
    None,
    Faults(dropout=0.15, fail=0.1, back_after=3.0, notice=1.0, late=0.5),
    Faults(dropout=0.1, dropout_per_second=0.02, fail=0.2, back_after=None, notice=4.0, late=1.0),
)


@dataclass(eq=False)
class Piece:
    """A task in training."""

    task: Task
    local: ClientState
    answer: tuple[Result, ClientState] | None = None


@dataclass
class Early:
    """Trains one task at a time: those that were begun in any order, now and then, or when it is asked."""

    draw: random.Random
    eager: float = 0.5
    inner: Trainer = field(default_factory=Remembering)
    open: list[Piece] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    most: int = 0

    def train(self, work: Sequence[tuple[Task, ClientState]]) -> list[tuple[Result, ClientState]]:
        raise AssertionError("a simulation begins with tasks and asks for answers")

    def unchanged_result(self, task: Task) -> Result:
        """All but what is trained."""
        return toys.make_result(task.start.train, steps=task.budget.steps, control=task.start.control)

    def begin(self, work: Sequence[tuple[Task, ClientState]], due: Sequence[float]) -> Sequence[PendingResult]:
        """Some of what is open is trained."""
        assert len(work) == len(due)
        pieces = [Piece(*one) for one in work]
        self.open += pieces
        self.most = max(self.most, len(self.open))
        self._some()
        return [partial(self._answer, piece) for piece in pieces]

    def _some(self) -> None:
        for piece in [piece for piece in self.open if self.draw.random() < self.eager]:
            self._train(piece)

    def _answer(self, piece: Piece) -> tuple[Result, ClientState]:
        self._some()
        if piece.answer is None:
            self._train(piece)
        assert piece.answer is not None
        return piece.answer

    def _train(self, piece: Piece) -> None:
        self.open.remove(piece)
        self.trained.append(piece.task.id)
        (piece.answer,) = self.inner.train([(piece.task, piece.local)])


def trace(trainer: Trainer, schedule: Schedule, world: Devices, seed: int, **more: Any) -> Log:
    """What happened in six versions; `drains`: also wait for all answers between two events, now and then."""
    log, faults, drains = Log(), more.get("faults"), more.get("drains", 0)
    limits = Limits(versions=6, seconds=60.0, failures=30, evaluate_every=3)
    server = toys.server(schedule, start=toys.fresh(4), assign=Plan(RandomRank(2, 4), 1), limits=limits, seed=seed)
    stays = more.get("stays") or (Availability(online=12.0, offline=4.0).of((), seed) if more.get("leaving") else None)
    one = simulation(server, log, trainer, devices=world, seed=seed, presence=Presence(stays, faults, seed))
    one.profiles = {p.client: p for p in world.profiles(dict.fromkeys(one.profiles, 10), seed)}
    count = iter(range(10**9))
    one.after_step = lambda: one.drain() if drains and next(count) % drains == 0 else None
    one.run()
    return log


@pytest.mark.parametrize("schedule", toys.schedules(), ids=toys.called)
@given(
    world=st.sampled_from(WORLDS),
    faults=st.sampled_from(FAULTS),
    leaving=st.booleans(),
    eager=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 99),
    drains=st.sampled_from([0, 1, 3]),
)
@tries(10)
def test_the_trace_is_that_of_training_at_dispatch(
    schedule: Schedule, world: Devices, faults: Faults | None, leaving: bool, eager: float, seed: int, drains: int
) -> None:
    at_once = trace(Remembering(), schedule, world, seed, faults=faults, leaving=leaving)
    early = Early(random.Random(seed), eager)
    ahead = trace(early, schedule, world, seed, faults=faults, leaving=leaving, drains=drains)
    assert ahead.traced() == at_once.traced()
    assert len(set(early.trained)) == len(early.trained)


@pytest.mark.slow
def test_ties_are_broken_by_the_moment_of_dispatch() -> None:
    """All tasks take 1 s; clients come and go at quarters, so windows change, made later, at the moment of an answer."""
    stays = Traced({f"c{k}": (0.25 * (k + 1), 0.25, 0.5, 0.25 * k + 0.25) for k in range(6)})
    for schedule in toys.schedules():
        traces = [
            trace(one, schedule, Delays(sigma=0.0), 0, stays=stays).traced()
            for one in (Remembering(), Early(random.Random(0), 0.0))
        ]
        assert traces[0] == traces[1], schedule


def test_many_tasks_are_in_training_at_once_although_each_event_starts_one() -> None:
    for world in (Delays(), World()):
        early = Early(random.Random(0), 0.0)
        trace(early, FedFa(window=3, max_in_flight=5), world, 0)
        assert early.most == 5, world


def test_what_nobody_waits_for_is_not_trained() -> None:
    early = Early(random.Random(0), 0.0)
    log = trace(early, Rounds(2, over_selection=2.0), Delays(), 0)
    assert len(log.all(Dispatch)) == 24
    assert len(early.trained) == sum(isinstance(event, UpdateArrived) for _, event, _ in log.steps) < 15


@dataclass(frozen=True)
class Hasty(Delays):
    """Says that a task takes longer if nothing is sent."""

    def seconds(self, task: Task, result: Result, *rest: Any) -> Seconds:  # type: ignore[override]
        """Twice as long, for the answer that changed nothing."""
        took = super().seconds(task, result, *rest)
        return replace(took, train=took.train * (1 + (result.adapter is task.start.train)))


def test_a_bound_that_is_too_large_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"Hasty says that task \d+ takes .* time would run backwards"):
        simulation(toys.server(FedFa(3, 4), start=toys.fresh(4)), Log(), Early(random.Random(0)), devices=Hasty()).run()
