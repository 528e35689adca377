"""Regions: the run of a hierarchy on real machines, with plans that learn and depth, killed where it hurts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    Averaged,
    DeltaInt8,
    FedFa,
    FixedDepth,
    FixedRank,
    GradientScore,
    Hierarchy,
    Immediate,
    JointPlan,
    Limits,
    LossRate,
    Plan,
    ProductDelta,
    RandomRank,
    Rounds,
)
from fedloom.core.types import Result
from fedloom.deploy.region.region import Region, RegionServer
from fedloom.deploy.site.answer_journal import AnswerJournal
from fedloom.deploy.site.worker_socket import ask_worker
from fedloom.report.run_log import read_run_log
from fedloom.runs.checkpoint import read_checkpoint
from fedloom.runs.prepare import prepare
from fedloom.runs.replay import replay
from fedloom.runs.run import Run
from tests.support.deployment_runs import net_of
from tests.support.simulated_regions import Country, Killed, adapter_at
from tests.support.tiny_models import tiny_run

EARNED = Hierarchy(plan=JointPlan(LossRate(steps=2, most=2, rank=4, patience=1), batch_tokens=64))


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

    def dies(node: int, body: bytes, largest: int) -> str:
        nonlocal sent
        sent += 1
        if sent == 8:
            raise Killed
        return send(node, body, largest)

    here.above.send = dies  # type: ignore[method-assign]
    with here.open():
        with pytest.raises(Killed):
            here.serve()
        here.above.forget()
        assert here.serve() == "6 versions made"
    assert replay(here.folder / "run").difference == ""
    log = read_run_log(here.folder / "run")
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
def test_a_run_over_regions_begins_from_an_adapter_and_is_made_longer(encoder: Path, tmp_path: Path) -> None:
    """The adapter is at the server above alone; the regions stay through both parts of the run."""
    prepare(tiny_run(encoder)).execute(tmp_path / "first", report=False)
    more = {"hierarchy": Hierarchy(rounds=2), "schedule": FedFa(2), "limits": Limits(versions=3)}
    here = country(tmp_path, encoder, start=str(tmp_path / "first"), **more)
    with here.open():
        assert here.serve() == "3 versions made"
        published = read_run_log(here.folder / "run").versions
        told = json.loads((here.folder / "deployment.json").read_text())
        (here.folder / "deployment.json").write_text(json.dumps({**told, "until": 5}))
        here.above.forget()
        assert here.serve() == "5 versions made"
    assert replay(here.folder / "run").difference == ""
    log = read_run_log(here.folder / "run")
    kept = ("version", "time", "loss", "updates")
    assert [[line[name] for name in kept] for line in log.versions[:3]] == [
        [p[name] for name in kept] for p in published
    ]
    assert [line["version"] for line in log.versions] == [1, 2, 3, 4, 5]


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
    log, checked = read_run_log(here.folder / "run"), here.reports()
    assert log.manifest["groups"] == {"region0": ["c00", "c01", "c02"], "region1": ["c03", "c04", "c05"]}
    merged = [line for line in log.edges if line["status"] == "merged"]
    assert len(merged) == 10
    for edge in ("region0", "region1"):
        own = [line for line in merged if line["edge"] == edge]
        assert [line["depth"] for line in own[:2]] == [1, None], "the shallowest first, then the deepest is measured"
        assert own[0]["bytes_up"] < own[1]["bytes_up"], "what was not trained is not reported"
        assert len({line["why"] for line in own}) > 2
        assert "earned" in str(own[2]["why"]), "what the regions told decides"
        last = [line for line in log.edges if line["edge"] == edge][-1]
        assert str(last["why"]) in (here.folder / "run" / "report.html").read_text()
    for event in checked:
        top = event["statistics"]["budget"]["depth"] == 1
        assert top == all(".layer.1." in name or "classifier" in name for name in event["statistics"]["mass"])
        assert {one["client"] for one in event["statistics"]["work"]} <= {one["client"] for one in event["members"]}
        assert {one["depth"] for one in event["statistics"]["work"]} == {event["statistics"]["budget"]["depth"]}


@pytest.mark.slow
def test_layers_that_nobody_trained_keep_their_value(encoder: Path, tmp_path: Path) -> None:
    """Regions have the whole model, their members train its top block; what comes up holds nothing else."""
    plan = Plan(FixedRank(4), 2, depth=FixedDepth(1))
    given = {"plan": plan, "hierarchy": Hierarchy(rounds=2), "schedule": Rounds(2), "limits": Limits(versions=2)}
    here = country(tmp_path, encoder, **given)
    with here.open():
        assert here.serve() == "2 versions made"
    assert replay(here.folder / "run").difference == ""
    files = [
        read_checkpoint(path).read({"result": Result})["result"] for path in here.folder.glob("run/updates/[0-9]*")
    ]
    assert len(files) == 4
    assert all(".layer.1." in name for result in files for name in result.adapter.factors)
    made = adapter_at(here.folder / "run")
    ups = {name: bool(tensor.any()) for name, tensor in made.items() if "lora_B" in name}
    assert ups == {name: ".layer.1." in name for name in ups}, "a LoRA begins with an `up` of zeros"


def work_of(steps: list[dict[str, Any]]) -> dict[int, list[int]]:
    """By outer task that was reported, the members' tasks that were accepted for it."""
    done, outer, own = dict[int, list[int]](), 0, list[int]()
    for line in steps:
        event = line["event"]
        if event["type"] == "TaskReceived":
            outer, own = event["task"]["id"], []
        if event["type"] == "UpdateArrived" and not any(one["type"] == "Reject" for one in line["commands"]):
            own.append(event["task"])
        if any(one["type"] == "Report" for one in line["commands"]):
            done[outer] = own
    return done


def nothing_lost_nor_counted_twice(here: Country) -> None:
    """Six answers of three members in each report; what was accepted was trained once; the same report when asked again."""
    assert replay(here.folder / "run").difference == ""
    reported = dict[str, set[int]]()
    for event in here.reports():
        spent = event["statistics"]["work"]
        assert [(one["answers"], one["steps"]) for one in spent] == [(2, 2)] * 3
        assert event["task"] not in reported.setdefault(event["client"], set())
        reported[event["client"]].add(event["task"])
    for number in (0, 1):
        done = work_of(here.steps(number))
        assert reported[f"region{number}"] <= done.keys()
        assert all(len(own) == 6 for own in done.values())
        every = [task for own in done.values() for task in own]
        assert len(every) == len(set(every))
        trained = sum(site.worker.trained for site in here.below[number].sites.values())  # type: ignore[attr-defined]
        assert trained <= len(every) + 6, "beside what the end of the run found under way"


CHOSEN = Hierarchy(plan=JointPlan(GradientScore(steps=2, most=2, rank=4), rounds=2, batch_tokens=64))


@pytest.mark.slow
def test_a_region_that_is_killed_goes_on_where_it_was(encoder: Path, tmp_path: Path) -> None:
    """In the first inner round of a task, in its second, and in later ones."""
    here = country(tmp_path, encoder, hierarchy=CHOSEN, schedule=Rounds(2), limits=Limits(versions=3))
    here.dies = lambda region, sent: region == 0 and sent in (5, 8, 15, 23)
    with here.open():
        assert here.serve() == "3 versions made"
        asked = [(site, *list(site.said.items())[-1]) for site in here.above.sites.values()]  # type: ignore[attr-defined]
        assert [ask_worker(site.socket, body, 20.0) == said for site, body, said in asked] == [True, True]
    assert here.starts[0] >= 4
    nothing_lost_nor_counted_twice(here)


@pytest.mark.slow
def test_a_report_that_was_written_down_is_the_one_that_is_given(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when it had written its report down, and no checkpoint said so: its edge does the end of the task again."""
    written, journaled = Region.write_report, dict[int, bytes]()

    def dies(region: Region, led: RegionServer) -> None:
        written(region, led)
        if led.ended and led.ended[0].id not in journaled and region.terms:
            known = region.journal.find(region.terms.run_hash, led.ended[0].id)
            if known is not None:
                journaled[led.ended[0].id] = known.answer.numpy().tobytes()
                raise Killed

    monkeypatch.setattr(Region, "write_report", dies)
    here = country(tmp_path, encoder, hierarchy=CHOSEN, schedule=Rounds(2), limits=Limits(versions=2))
    with here.open():
        assert here.serve() == "2 versions made"
    said = [one for site in here.above.sites.values() for one in site.said.values()]  # type: ignore[attr-defined]
    assert len(journaled) == 4
    assert set(journaled.values()) <= set(said)
    nothing_lost_nor_counted_twice(here)
    kept = [AnswerJournal(folder / "run" / "reports") for folder in here.folders]
    (run,) = {path.name for path in (here.folders[0] / "run" / "reports").iterdir() if path.is_dir()}
    found = {n: one.answer.numpy().tobytes() for n in journaled for j in kept if (one := j.find(run, n))}
    assert found == journaled, "also when its edge had come to the end once more"
