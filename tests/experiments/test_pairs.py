"""WHEN and HOW together: a pair that would count an answer again, where it may count once, is refused with the reason."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from fedloom.aggregate.ace import ACE
from fedloom.aggregate.averaged import Averaged
from fedloom.aggregate.ca2fl import CA2FL
from fedloom.aggregate.clip import Clip
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.momentum import Momentum
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.errors import Refused
from fedloom.core.events import ClientJoined, Command, Publish, Reject, TimerFired, UpdateArrived
from fedloom.core.limits import Limits
from fedloom.core.policies import Aggregator, Schedule
from fedloom.core.server import Server
from fedloom.core.types import Profile
from fedloom.schedule.fedasync import FedAsync
from fedloom.schedule.fedbuff import FedBuff
from fedloom.schedule.fedfa import FedFa
from fedloom.schedule.immediate import Immediate
from tests.support import toys

SCHEDULES = [
    *toys.schedules(),
    FedFa(window=1, max_in_flight=3), FedFa(window=4, max_in_flight=3, fill="wait"), FedFa(window=4, max_in_flight=3),
    FedFa(window=4, max_in_flight=3, delta_rate=0.25), FedAsync(max_in_flight=3), FedBuff(2, 4), FedBuff(3, 3, waiting=True),
    Immediate(max_in_flight=3),
]  # fmt: skip
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=toys.called)
ONCE: list[Any] = [
    Scaffold(), Momentum(Scaffold()), CA2FL(), Averaged(CA2FL(FFA())), ACE(), Clip(ACE()),
]  # fmt: skip


def played(schedule: Schedule, method: Aggregator, versions: int = 6) -> tuple[Server, list[Command]]:
    """A federation of 5 in which whoever was asked first answers first, with what it was sent."""
    server = toys.server(schedule, method, limits=Limits(versions=versions, evaluate_every=0))
    for k in range(5):
        server.handle(0.0, ClientJoined(Profile(f"c{k}", 10)))
    every = list(server.handle(0.0, TimerFired()))
    while not server.state.stopped:
        task = server.state.busy[min(server.state.busy)]
        commands = server.handle(
            server.state.now + 1.0,
            UpdateArrived(task.client, task.id, toys.make_result(task.start.train)),
        )
        assert not any(isinstance(one, Reject) for one in commands)
        every += commands
    return server, every


@every_schedule
def test_a_schedule_that_merges_an_answer_again_says_so(schedule: Schedule) -> None:
    _, commands = played(schedule, FedIT())
    times = Counter(update.task.id for one in commands if isinstance(one, Publish) for update in one.updates)
    assert (max(times.values()) > 1) == getattr(schedule, "reuses_answers", False)


@every_schedule
@pytest.mark.parametrize("method", ONCE, ids=toys.called)
def test_where_an_answer_must_count_once_such_a_schedule_is_refused(schedule: Schedule, method: Aggregator) -> None:
    if getattr(schedule, "reuses_answers", False):
        with pytest.raises(Refused, match="every answer more than once") as caught:
            toys.server(schedule, method)
        assert (caught.value.field, caught.value.value) == ("schedule", "FedFa")
        assert "use FedBuff" in caught.value.remedy
    else:
        toys.server(schedule, method)
