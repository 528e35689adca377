"""A region that was killed goes on from its checkpoint with each codec, also one of a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedloom.core.codec import Codec, DeltaInt8, Half
from fedloom.core.events import ClientJoined, TaskReceived
from fedloom.core.fingerprint import fingerprint
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, Task
from fedloom.deploy.region.region import RegionServer, restore_region
from fedloom.deploy.server.driver import Deployment
from fedloom.hierarchy.edge import Edge, MemberBudget
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.runs.resume import LOGS, CheckpointWriter
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.deployed_processes import TERMS
from tests.support.simulated_link import Net


@dataclass(frozen=True)
class Rough(Half):
    """A codec of a user's own."""

    digits: int = 3


def region(codec: Codec | None) -> tuple[RegionServer, Deployment]:
    """An edge with this codec, and its driver, before anything happened."""
    assign = MemberBudget(Plan(FixedRank(2), 4))
    edge = Edge(toys.server(Rounds(cohort_size=3), start=toys.adapter(2), assign=assign, transfer=codec))
    led = RegionServer(edge, edge.state)
    return led, Deployment(led, Net({}), TERMS, {}, opened=True)


@pytest.mark.parametrize("codec", [None, Half(), DeltaInt8(), Rough(4)], ids=str)
def test_a_killed_region_goes_on_with_its_codec(tmp_path: Path, codec: Codec | None) -> None:
    led, running = region(codec)
    for profile in toys.profiles(3).values():
        running.handle(ClientJoined(profile))
    policies = led.edge.server
    start = encode_start(policies.aggregator.start(policies.state.model, Budget(2, 4), 0), codec)
    running.handle(TaskReceived(Task(7, "north", 0, start, Budget(2, 4, rounds=2), 0.0)))
    with (tmp_path / LOGS[0]).open("w", encoding="utf-8") as log:
        CheckpointWriter(tmp_path, 0.0, (led, running), [log]).write()

    back, again = region(codec)
    restore_region(tmp_path, cast(Any, SimpleNamespace(transfer=codec, compress_trace=False)), back, again).close()
    assert len(again.tasks) == 3
    for number, task in running.tasks.items():
        assert again.tasks[number].start.codec == task.start.codec == codec
        assert fingerprint(again.tasks[number].start.train) == fingerprint(task.start.train)
