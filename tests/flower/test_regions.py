"""Regions: the run of a hierarchy on real machines, with plans that learn and depth, killed where it hurts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.tiny import tiny_run
from fedloom import (
    Averaged,
    DeltaInt8,
    Earned,
    FedFa,
    Hierarchy,
    Immediate,
    Limits,
    Plan,
    Planned,
    ProductDelta,
    RandomRank,
)
from fedloom.job import prepare
from fedloom.replay import replay
from fedloom.report.read import read
from fedloom.run import Run
from flower_regions import Country, Killed, net_of

EARNED = Hierarchy(plan=Planned(Earned(steps=2, most=2, rank=4, patience=1), batch_tokens=64))


def run_of(encoder: Path, **more: Any) -> Run:
    given: dict[str, Any] = {"name": "regions", "plan": Plan(RandomRank(2, 8), 3), "held_out": 0.0, "threads": 1}
    run: Run = tiny_run(encoder, **(given | more))
    return run


def country(tmp_path: Path, encoder: Path, **more: Any) -> Country:
    """Two regions of three sites."""
    return Country(tmp_path, encoder, run_of(encoder, **more), net_of(tmp_path, prepare(run_of(encoder)), encoder))


@pytest.mark.slow
def test_a_region_is_the_server_of_its_sites_and_a_site_of_the_server_above(encoder: Path, tmp_path: Path) -> None:
    """The server above is killed once. Inner rounds: 2."""
    here = country(tmp_path, encoder, hierarchy=Hierarchy(rounds=2), schedule=FedFa(2), limits=Limits(versions=6))
    send, sent = here.above.send, 0

    def dies(node: int, body: bytes) -> str:
        nonlocal sent
        sent += 1
        if sent == 8:
            raise Killed
        return send(node, body)

    here.above.send = dies  # type: ignore[method-assign]
    with here.open():
        with pytest.raises(Killed):
            here.serve()
        here.above.forget()
        assert here.serve() == "6 versions made"
    assert replay(here.folder / "run").difference == ""
    log = read(here.folder / "run")
    merged = [task for task in log.tasks if task["status"] == "merged"]
    assert {task["client"] for task in merged} == {"region0", "region1"}
    for number in (0, 1):
        events = here.steps(number)
        outer = [line["event"]["task"]["id"] for line in events if line["event"]["type"] == "TaskReceived"]
        reports = [c for line in events for c in line["commands"] if c["type"] == "Report"]
        assert len(outer) == len(set(outer))  # nothing that came twice was begun twice
        assert len(reports) in (len(outer), len(outer) - 1)
        assert all(report["result"]["metrics"]["rounds"] == 2 for report in reports)
        assert all(report["result"]["metrics"]["members"] == 3 for report in reports)


@pytest.mark.slow
def test_a_plan_that_learns_is_told_and_trains_at_depth(encoder: Path, tmp_path: Path) -> None:
    """Two exactly added ranks, eight bits, nobody waits: what is planned changes with what the regions tell."""
    given = {
        "aggregator": Averaged(ProductDelta()),
        "schedule": Immediate(0.4, max_in_flight=2),
        "hierarchy": EARNED,
        "transfer": DeltaInt8(),
        "limits": Limits(versions=10, evaluate_every=5),
    }
    here = country(tmp_path, encoder, **given)
    with here.open():
        assert here.serve() == "10 versions made"
    assert replay(here.folder / "run").difference == ""
    log, checked = read(here.folder / "run"), here.reports()
    assert log.manifest["groups"] == {"region0": ["c00", "c01", "c02"], "region1": ["c03", "c04", "c05"]}
    merged = [line for line in log.edges if line["status"] == "merged"]
    assert len(merged) == 10
    for edge in ("region0", "region1"):
        own = [line for line in merged if line["edge"] == edge]
        assert [line["depth"] for line in own[:2]] == [1, None], "the shallowest first, then the deepest is measured"
        assert own[0]["bytes_up"] < own[1]["bytes_up"], "what was not trained is not reported"
        assert len({line["why"] for line in own}) > 2
        assert "earned" in str(own[2]["why"]), "what the regions told decides"
    assert "measured anew" in (here.folder / "run" / "report.html").read_text()
    for event in checked:
        top = event["told"]["budget"]["depth"] == 1
        assert top == all(".layer.1." in name or "classifier" in name for name in event["told"]["mass"])
        assert {one["client"] for one in event["told"]["spent"]} <= {one["client"] for one in event["members"]}
        assert {one["depth"] for one in event["told"]["spent"]} == {event["told"]["budget"]["depth"]}
