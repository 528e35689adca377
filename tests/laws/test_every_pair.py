"""Laws 6, 7 and 8 for pairs of an aggregator and a schedule: storms in which nobody learns anything, so nothing may change."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given

from fedloom.aggregate.fedex import FedEx
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.folded_delta import FoldedDelta
from fedloom.aggregate.lora_a2 import LoRAA2
from fedloom.aggregate.robust import Robust
from fedloom.aggregate.rolora import RoLoRA
from fedloom.aggregate.shared.robust_rules import Trust
from fedloom.core.policies import Aggregator, Schedule
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RandomRank
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from tests.support import toys
from tests.support.pairs import goes_together
from tests.support.server_storm import STORM, run_storm
from tests.support.storms import tries

FEW: list[Any] = [FedEx(), FLoRA(), FoldedDelta(), LoRAA2(), RoLoRA()]
PLAIN = [schedule for schedule in toys.schedules() if hasattr(schedule, "max_staleness")][:4]
pairs = pytest.mark.parametrize(("method", "schedule"), list(itertools.product(FEW, PLAIN)), ids=toys.called)
JUDGED: list[Schedule] = [FedBuff(buffer_size=5, max_in_flight=6), FedFa(window=5, max_in_flight=6)]
ALL = [pair for pair in itertools.product(toys.aggregators(), toys.schedules()) if goes_together(*pair)]
ALL += [
    *((Robust(), schedule) for schedule in JUDGED),
    *((Robust(rule=Trust("c0")), schedule) for schedule in toys.schedules()),
]
all_pairs = pytest.mark.parametrize(("method", "schedule"), ALL, ids=toys.called)
START = toys.graded([1.0, 0.5, 0.2])


def check_storm(method: Aggregator, schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    """Answers are the models that were sent, of several ranks and ages; where that is a fixed point, the model stays."""
    storm = run_storm(schedule, script, method=method, start=START, assign=Plan(RandomRank(1, 3), 2))
    assert storm.stopped
    if 5 not in method.exempt:
        assert toys.distance(toys.function(storm.server.state.model), toys.products(START)) < 1e-4


@pairs
@given(script=STORM)
@tries(20)
def test_a_storm(method: Aggregator, schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    check_storm(method, schedule, script)


@pytest.mark.slow
@all_pairs
@given(script=STORM)
@tries(20)
def test_a_storm_of_every_pair(method: Aggregator, schedule: Schedule, script: list[tuple[str, int, float]]) -> None:
    check_storm(method, schedule, script)
