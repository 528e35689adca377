"""The driver over regions: each an edge in one piece, behind a net that does not keep its word, and a server that is killed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given
from rich.console import Console

from fedloom import FixedRank, Hierarchy, Immediate, JointPlan, Limits, LossRate, Plan
from fedloom.cli.status import status_view
from fedloom.core.codec import DeltaInt8
from fedloom.core.events import ClientJoined, Dispatch, Report, TaskReceived, TimerFired, UpdateArrived
from fedloom.core.server import Server
from fedloom.core.types import ClientState, Profile, Result, Task
from fedloom.deploy.messages import answer as wire
from fedloom.deploy.messages.answer import RegionReport
from fedloom.deploy.messages.messages import JoinRequest, Welcome, decode_request, encode_reply
from fedloom.deploy.server.driver import Deployment
from fedloom.deploy.server.reply_events import REGION
from fedloom.deploy.server.status import Status
from fedloom.hierarchy.edge import Edge
from fedloom.hierarchy.root_server import RootServer
from fedloom.runs.replay import replay
from tests.support import toys
from tests.support.deployed_processes import QUICK, STORM, TERMS, Life, turns
from tests.support.simulated_link import Net, Site, Trouble
from tests.support.storms import tries

SHAPE = replace(toys.SHAPE, layers=2, depths={"query": 2, "value": 1})
HIERARCHY = Hierarchy(plan=JointPlan(LossRate(2, 2, rank=2, patience=1), batch_tokens=50))
MEMBERS = tuple(Profile(f"c{k}", 10, 1e4 * (1 + k), 1e4, 1e4) for k in range(3))


def flat(**more: Any) -> Server:
    given: dict[str, Any] = {"start": toys.adapter(2), "shape": SHAPE, "assign": Plan(FixedRank(2), 4)}
    return toys.server(Immediate(0.4, max_in_flight=4), transfer=DeltaInt8(), **(given | more))


def over(versions: int = 10) -> RootServer:
    return HIERARCHY.over_regions(flat(limits=Limits(versions=versions, norm_ratio=None)), 3)


@dataclass
class Region(Site):
    """A region in one piece: its members train at once. It has a journal of its last report, and counts what it was asked for."""

    members: tuple[Profile, ...] = MEMBERS
    edge: Edge = field(default_factory=lambda: HIERARCHY.edge(flat(limits=Limits(norm_ratio=None)), 3, 1))
    asked: Counter[int] = field(default_factory=Counter)
    reported: tuple[int, bytes] = (0, b"")
    now: float = 0.0

    def answer(self, body: bytes) -> bytes:
        ask = decode_request(body, 2**30)
        if isinstance(ask, JoinRequest):
            return encode_reply(Welcome(self.profile, ask.incarnation, members=self.members))
        if self.reported[0] != ask.task.id:
            self.asked[ask.task.id] += 1
            self.reported = ask.task.id, self.led(ask.task)
        return self.reported[1]

    def led(self, task: Task) -> bytes:
        if not self.edge.state.server.idle:
            for one in self.members:
                self.edge.handle(self.now, ClientJoined(one))
        todo = list(self.edge.handle(self.now, TaskReceived(task)))
        while True:
            match todo.pop(0):
                case Dispatch(inner):
                    todo += self.edge.handle(self.now, UpdateArrived(inner.client, inner.id, self.made(inner)))
                case Report(result, told):
                    assert told is not None
                    return wire.encode_result(task, result, report=RegionReport(told, self.members))
            if not todo:
                todo += self.edge.handle(self.now, TimerFired())

    def made(self, task: Task) -> Result:
        self.now += 1.0
        ((result, _),) = self.trainer.train([(task, ClientState())])
        times = {"seconds_down": 0.1, "seconds_train": 0.5 * task.budget.steps, "seconds_up": 0.2}
        return replace(result, metrics={**result.metrics, **times, "loss": 1.0 / task.id})


def regions(count: int = 3) -> dict[int, Site]:
    names = ("north", "south", "west")[:count]
    sites = {
        one: tuple(replace(site, client=f"c{10 * number + k}") for k, site in enumerate(MEMBERS))
        for number, one in enumerate(names)
    }
    profiles = {one: Profile(one, 30, 1e4, 1e5, 1e5, tier=REGION) for one in names}
    return {100 + k: Region(profiles[one], 1.0 + k, members=sites[one]) for k, one in enumerate(names)}


@given(storm=STORM)
@tries(10, phases=(Phase.reuse, Phase.generate))
def test_a_report_counts_once_and_what_was_told_is_known_after_every_restart(
    storm: dict[str, Any], tmp_path_factory: Any
) -> None:
    weathered(tmp_path_factory.mktemp("storm"), **storm)


@pytest.mark.slow
@given(storm=STORM)
@tries(120, phases=(Phase.reuse, Phase.generate))
def test_nor_is_it_otherwise_in_more_storms(storm: dict[str, Any], tmp_path_factory: Any) -> None:
    weathered(tmp_path_factory.mktemp("storm"), **storm)


def weathered(folder: Path, trouble: Trouble, deadly: float, seed: int) -> None:
    """The run ends, no report counts twice, each task is done once where it counted, plans follow what was told, to the byte."""
    net = Net(regions(), trouble, seed)
    life = Life(folder, net, over, deadly=deadly, over=True)
    assert life.whole() == "10 versions made"
    (folder / "manifest.json").write_text('{"status": "finished"}')
    steps = life.trace()
    taken = [step["event"] for step in steps if not any(one["type"] == "Reject" for one in step["commands"])]
    reports = [event for event in taken if event["type"] == "EdgeReported"]
    counted = [event["task"] for event in reports]
    assert len(counted) == len(set(counted)) >= 10
    assert all(site.asked[one] <= 1 for site in net.sites.values() for one in counted)  # type: ignore[attr-defined]
    assert all(len(event["statistics"]["work"]) == 3 and len(event["members"]) == 3 for event in reports)
    asked = [one["task"]["budget"] for step in steps for one in step["commands"] if one["type"] == "Dispatch"]
    assert {budget["depth"] for budget in asked} == {1, None}, "the plan goes on with what it was told"
    assert replay(folder, over()).difference == ""


def deployed(net: Net) -> Deployment:
    return Deployment(
        over(50), net, TERMS, {}, timeouts=QUICK, clock=net.clock, over_regions=True, facts_of=net.facts_of
    )


def test_a_region_that_cannot_be_planned_for_is_left_alone_with_the_reason_and_asked_again(tmp_path: Path) -> None:
    net = Net(regions(2))
    poor: Any = net.sites[101]
    able = poor.members
    poor.members = (replace(able[0], memory=10.0), *able[1:])
    running = deployed(net)
    turns(running, net, 4)
    assert running.clients.keys() == running.server.state.groups.keys() == {"north"}
    assert "c10 cannot train one layer" in running.nodes.reachable[101].why
    status = Status(tmp_path, running, Limits(versions=50))
    assert "c10 cannot train one layer" in status.waits()
    poor.members = able
    turns(running, net, 8)
    assert running.clients.keys() == running.server.state.groups.keys() == {"north", "south"}
    told = status.snapshot()
    assert {one["rounds"] for one in told["clients"].values()} <= {1, 2, None}
    console = Console(width=120, file=StringIO())
    console.print(status_view(told, age=0.0))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rounds" in text
    assert "steps a second" in text, "why"


def test_what_a_region_says_that_is_nothing_is_refused_and_its_task_fails() -> None:
    net = Net(regions(1))
    region: Any = net.sites[100]
    whole, spoilt = region.answer, [True]

    def answer(body: bytes) -> bytes:
        said: bytes = whole(body)
        if isinstance(decode_request(body, 2**30), JoinRequest) or not spoilt:
            return said
        spoilt.clear()
        return said.replace(b'\\"spread\\"', b'\\"spreat\\"')

    region.answer = answer
    running = deployed(net)
    failed = list[Any]()
    running.observe = lambda now, event, commands: failed.append(event)
    turns(running, net, 20)
    reasons = [event.reason for event in failed if type(event).__name__ == "TaskFailed"]
    assert len(reasons) == 1
    assert "spreat" in reasons[0]
    assert running.server.state.version > 2


def test_a_site_that_comes_to_a_server_over_regions_is_a_group_of_one() -> None:
    net = Net({**regions(1), 200: Site(Profile("c7", 10, 1e4, 1e4, 1e4, tier="site"))})
    running = deployed(net)
    turns(running, net, 20)
    assert [one.client for one in running.server.state.groups["c7"].members] == ["c7"]
    assert running.accepted.keys() == {"north", "c7"}
