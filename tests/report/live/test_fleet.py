"""Who is at work, who waits and who was refused, from the lines of a trace that a real server wrote."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedloom.report.live.fleet import LAST_EVENTS, LAST_REFUSALS, LiveFleet
from fedloom.runs.observation import RunObservation
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.rounds import Rounds
from fedloom.simulate.client_presence import Presence
from fedloom.simulate.faults import Faults
from tests.support import simulated_runs


@pytest.mark.parametrize(
    "schedule",
    [Rounds(3), FedFa(window=2, max_in_flight=3), FedBuff(buffer_size=2)],
    ids=lambda one: type(one).__name__,
)
def test_the_clients_at_work_are_those_of_the_run_itself(schedule: Any) -> None:
    """At each step as many train as the one reading of a run (`RunObservation`) says, and they are the same."""
    faults = Presence((), Faults(dropout=0.2), 0)
    log = simulated_runs.run(schedule=schedule, trainer=simulated_runs.Remembering(), presence=faults, clients=8)
    fleet, seen = LiveFleet(), RunObservation()
    for (now, event, commands), line in zip(log.steps, log.traced(), strict=True):
        list(seen.read(now, event, commands))
        fleet.take_step(json.loads(line))
        assert {name for name, one in fleet.clients.items() if one.activity == "training"} == set(seen.outstanding)
    assert fleet.ended
    assert len(fleet.refusals) >= min(seen.rejected, LAST_REFUSALS) > 0


def step(*commands: dict[str, Any], time: float = 1.0, **event: Any) -> dict[str, Any]:
    return {"time": time, "event": event or {"type": "TimerFired"}, "commands": list(commands)}


def dispatch(client: str, task: int, why: str = "") -> dict[str, Any]:
    budget = {"rank": 4, "steps": 8, "depth": 2, "rounds": 1, "why": why}
    return {"type": "Dispatch", "task": {"id": task, "client": client, "version": 0, "budget": budget}}


def test_a_cohort_is_one_event_and_old_events_are_forgotten() -> None:
    fleet = LiveFleet()
    fleet.take_step(step(*(dispatch(f"c{k}", k) for k in range(900))))
    assert [event.text for event in fleet.events] == ["900 tasks sent to c0, c1, c2 and 897 more"]
    for k in range(3 * LAST_EVENTS):
        fleet.take_step(step(type="TaskFailed", client="c1", task=k, reason=f"reason {k}"))
    assert len(fleet.events) == LAST_EVENTS
    assert len(fleet.refusals) == LAST_REFUSALS
    assert fleet.counted == 3 * LAST_EVENTS + 1


def test_a_refusal_is_listed_once_with_its_reason() -> None:
    """The server rejects an answer, and the driver then gives the task up for the same reason."""
    fleet = LiveFleet()
    fleet.take_step(step(dispatch("c1", 7)))
    reject = {"type": "Reject", "client": "c1", "task": 7, "reason": "too far"}
    fleet.take_step(step(reject, type="UpdateArrived", client="c1", task=7))
    assert [(one.client, one.what, one.reason) for one in fleet.refusals] == [("c1", "answer refused", "too far")]
    assert fleet.clients["c1"].activity == "training"  # its task is outstanding
    fleet.take_step(step(type="TaskFailed", client="c1", task=7, reason="too far"))
    assert len(fleet.refusals) == 1
    assert fleet.clients["c1"].activity == "idle"


def test_reasons_of_a_plan_are_those_of_the_last_budget_of_each() -> None:
    fleet = LiveFleet()
    outer = {"type": "InsideEdge", "edge": "edge0", "task": 5, "command": dispatch("edge0", 5, "slow links")}
    fleet.take_step(step(dispatch("c1", 1, "small memory"), dispatch("c2", 2), outer))
    fleet.take_step(step(dispatch("c1", 3, "more memory")))
    assert {name: budget["why"] for name, budget in fleet.reasons.items()} == {
        "edge0": "slow links",
        "c1": "more memory",
    }


def test_memory_does_not_grow_with_answers_that_come_to_nothing() -> None:
    fleet = LiveFleet()
    for k in range(2000):
        fleet.take_step(step(dispatch("c1", k)))
        fleet.take_step(step(type="UpdateArrived", client="c1", task=k))
    assert len(fleet._answered) <= 3
