"""Laws 6 and 7 for every schedule in the folder, in storms of events through the real server."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

import fedloom.schedule
from fedloom.core.events import (
    TimerFired,
)
from fedloom.core.lora import Adapter, Factor
from fedloom.core.policies import Schedule
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.server_storm import NAMES, STORM, Storm, run_storm, snapshot
from tests.support.storms import tries

SCHEDULES = toys.schedules()
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=toys.called)


@every_schedule
@given(script=STORM)
@tries(150)
def test_a_storm(schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    run_storm(schedule, script)


@pytest.mark.slow
@every_schedule
@given(script=STORM)
@tries(1500)
def test_a_long_storm(schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    run_storm(schedule, script)


@every_schedule
def test_a_crowd_that_comes_and_goes_together(schedule: Schedule) -> None:
    together = [("join", k, 0.0) for k in range(8)] + [("timer", 0, 0.0)]
    leave = [("lose", k, 1.0) for k in range(8)]
    run_storm(schedule, together + leave + together + [("answer", 0, 1.0)] * 9 + leave)


@every_schedule
def test_a_late_driver_misses_no_deadline(schedule: Schedule) -> None:
    """A rejected reply that is handled just after the wake time must not swallow the timer (law 7)."""
    joined = [("join", k, 0.0) for k in range(6)] + [("timer", 0, 0.0), ("answer", 0, 1.0)]
    run_storm(schedule, [*joined, ("again", 0, 4.0), ("foreign", 0, 4.0), ("spoilt", 1, 4.0)])


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
            weights = [w for w, _ in merge.weighted_updates]
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
