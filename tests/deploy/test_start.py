"""A deployment over real workers in this process: the simulation's adapter, a trace that replays, a folder that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom import (
    ACE,
    FFA,
    DeltaInt8,
    Engine,
    FedFa,
    FedSA,
    FixedRank,
    FLoRA,
    GradientScore,
    Half,
    Hierarchy,
    JointPlan,
    Limits,
    Plan,
    ProductDelta,
    Scaffold,
    Training,
)
from fedloom.core.errors import Refused
from fedloom.deploy import start
from fedloom.deploy.server.config import DeploymentConfig
from fedloom.report.run_log import read_run_log
from fedloom.runs.prepare import prepare
from fedloom.runs.replay import replay
from tests.support.deployment_runs import as_deployed, folder_of, net_of, run_of
from tests.support.simulated_regions import Killed, adapter_at


class Own(Half):
    """A codec that no site knows."""

    __slots__ = ()


def mine(done: float) -> float:
    """A learning rate that no site knows."""
    return 1.0


@pytest.mark.parametrize(
    ("method", "codec"),
    [(ProductDelta(), DeltaInt8()), (ProductDelta(), None), (FedSA(), None), (Scaffold(clients=6), None)],
    ids=str,
)
@pytest.mark.slow
def test_it_is_the_simulation_s_adapter(encoder: Path, tmp_path: Path, method: Any, codec: Any) -> None:
    """Synchronous rounds, in which no order is left to chance, at mixed ranks: the same numbers, to the bit; and of each client the
    same scores on the same examples held out.

    `together=1`: a simulation trains clients in one pass where it can, and each site alone; dropout then draws other masks.
    """
    run = run_of(encoder, aggregator=method, transfer=codec, engine=Engine("torch", together=1))
    job = as_deployed(prepare(run))
    simulated = job.execute(tmp_path / "simulated", report=False)
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    assert start.run_deployment(net, folder, net.pause, net.clock) == "3 versions made"
    there = adapter_at(folder / "run")
    here = adapter_at(simulated.folder)
    assert there.keys() == here.keys()
    assert all(there[name].equal(here[name]) for name in here)
    assert replay(folder / "run").difference == ""
    log = read_run_log(folder / "run")
    assert log.manifest["status"] == "finished"
    assert set(log.manifest["clients"]) == set(job.profiles)
    assert [line["accuracy"] for line in log.scores] == [score["accuracy"] for score in simulated.scores]
    assert "virtual time" not in (folder / "run" / "report.html").read_text()
    wanted = [{**line, "tier": "site"} for line in read_run_log(simulated.folder).clients]
    assert len(wanted) == 6
    for line, want in zip(log.clients, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-5)  # clients of one rank are predicted together there
        assert {**line, "loss": 0} == {name: value for name, value in {**want, "loss": 0}.items() if name != "f1"}
    assert not log.unscored


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard
@pytest.mark.parametrize("after", [5, 23])
def test_a_server_that_was_killed_goes_on_in_its_folder(encoder: Path, tmp_path: Path, after: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_of(encoder, schedule=FedFa(3), limits=Limits(versions=20, evaluate_every=5))
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    order = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps({**order, "trackers": ["tensorboard"]}))
    sent, send = 0, net.send

    def dies(node: int, body: bytes, largest: int) -> str:
        nonlocal sent
        sent += 1
        if sent == 6 + after:
            raise Killed
        return send(node, body, largest)

    net.send = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        start.run_deployment(net, folder, net.pause, net.clock)
    net.forget()
    net.send = send  # type: ignore[method-assign]
    net.pause(100.0)
    assert start.run_deployment(net, folder, net.pause, net.clock) == "20 versions made"
    assert replay(folder / "run").difference == ""
    lines = [json.loads(line) for line in (folder / "run" / "trace.jsonl").read_text().splitlines()]
    counted = [line["event"]["task"] for line in lines if line["event"]["type"] == "UpdateArrived"]
    assert len(counted) == len(set(counted)) >= 20
    curve = EventAccumulator(str(folder / "run" / "tensorboard")).Reload().Scalars("train/loss")
    assert [point.step for point in curve] == [*range(1, 21)]
    trained = sum(site.worker.trained for site in net.sites.values())  # type: ignore[attr-defined]
    assert trained <= len(counted) + 6  # nothing that counted was trained twice
    assert start.run_deployment(net, folder) == "20 versions made"  # a finished one has nothing left to do


@pytest.mark.slow
def test_sites_of_other_limits_train_at_their_own_rank(encoder: Path, tmp_path: Path) -> None:
    run = run_of(encoder, plan=Plan(FixedRank(8), local_steps=3))
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    for number, rank in enumerate([2, 4, 8, 8, 4, 2]):
        worker = net.sites[number].worker  # type: ignore[attr-defined]
        worker.site = worker.site.model_copy(update={"limits": worker.site.limits.model_copy(update={"rank": rank})})
    start.run_deployment(net, folder, net.pause, net.clock)
    ranks = {str(task["client"]): task["rank"] for task in read_run_log(folder / "run").tasks}
    known = [net.sites[number].profile.client for number in range(6)]
    assert {client: ranks[client] for client in ranks} == {
        client: rank for client, rank in zip(known, [2, 4, 8, 8, 4, 2], strict=True) if client in ranks
    }
    assert len(set(ranks.values())) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "codec", "gone"),
    [
        (ProductDelta(), DeltaInt8(), None),
        (FedSA(), None, None),
        (Scaffold(clients=6), None, None),
        (ProductDelta(), None, 2),
    ],
    ids=str,
)
def test_a_finished_deployment_is_made_longer(
    encoder: Path, tmp_path: Path, method: Any, codec: Any, gone: int | None
) -> None:
    """It ends as the simulation of that length. What clients keep is still there, and what was trained is not trained again.

    What was published stays, though a site whose answer is in the last version does not come back.
    """

    def run(versions: int) -> Any:
        more = {"limits": Limits(versions=versions), "engine": Engine("torch", together=1)}
        return run_of(encoder, aggregator=method, transfer=codec, **more)

    folder, net = folder_of(tmp_path, run(2)), net_of(tmp_path, prepare(run(2)), encoder)
    start.run_deployment(net, folder, net.pause, net.clock)
    before, first = (folder / "run" / "trace.jsonl").read_bytes().splitlines(), adapter_at(folder / "run")
    trained = sum(site.worker.trained for site in net.sites.values())  # type: ignore[attr-defined]
    told = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps({**told, "until": 4, "patience": {"away": 20.0}}))
    net.forget()
    net.pause(1e6)
    if gone is not None:
        net.sites.pop(gone)
    assert start.run_deployment(net, folder, net.pause, net.clock) == "4 versions made"
    after = (folder / "run" / "trace.jsonl").read_bytes().splitlines()
    same = next(number for number, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
    assert json.loads(before[same])["event"] == json.loads(after[same])["event"], "all but what the last event led to"
    assert replay(folder / "run").difference == ""
    log = read_run_log(folder / "run")
    assert [line["version"] for line in log.versions] == [1, 2, 3, 4]
    assert any(note.startswith("Extended after version 2:") for note in log.manifest["notes"])
    if gone is None:
        longer = adapter_at(as_deployed(prepare(run(4)), run(2)).execute(tmp_path / "simulated", report=False).folder)
        assert all(longer[name].equal(tensor) for name, tensor in adapter_at(folder / "run").items())
        assert sum(site.worker.trained for site in net.sites.values()) == 2 * trained  # type: ignore[attr-defined]
    assert any(not first[name].equal(tensor) for name, tensor in adapter_at(folder / "run").items())
    assert start.run_deployment(net, folder) == "4 versions made"  # as often as it is served


@pytest.mark.slow
def test_an_old_deployment_without_its_checkpoint_is_not_made_longer(encoder: Path, tmp_path: Path) -> None:
    run = run_of(encoder, limits=Limits(versions=1))
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    start.run_deployment(net, folder, net.pause, net.clock)
    (folder / "run" / "checkpoint.safetensors").unlink()
    told = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps({**told, "until": 2}))
    with pytest.raises(Refused, match="start a new run with --set start="):
        start.run_deployment(net, folder, net.pause, net.clock)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [FLoRA(), *(pytest.param(one, marks=pytest.mark.storms) for one in (FFA(), FedSA()))], ids=str
)
def test_a_deployment_begins_from_an_adapter(encoder: Path, tmp_path: Path, method: Any) -> None:
    """As its simulation does, to the bit; no site draws the first adapter, which is not that of the seed."""
    prepare(run_of(encoder)).execute(tmp_path / "first", report=False)
    given = {"aggregator": method, "transfer": None, "engine": Engine("torch", together=1)}
    run = run_of(encoder, start=str(tmp_path / "first"), **given)
    here = adapter_at(as_deployed(prepare(run)).execute(tmp_path / "simulated", report=False).folder)
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    start.run_deployment(net, folder, net.pause, net.clock)
    there = adapter_at(folder / "run")
    assert all(there[name].equal(tensor) for name, tensor in here.items())
    about = read_run_log(folder / "run").manifest
    assert about["start"]["adapter"].endswith("first")


def test_the_training_file_need_not_be_at_the_server(encoder: Path, tmp_path: Path) -> None:
    from fedloom import Table
    from tests.support.tiny_models import toy_rows

    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, toy_rows(20))))
    run = run_of(encoder, data=Table(tmp_path / "nowhere.jsonl", tmp_path / "test.jsonl"))
    job, profiles = start.prepare_server(run, tmp_path / "none")
    assert (len(job.split.train), len(job.split.test), profiles) == (0, 20, {})
    assert job.split.train.names == ("colour", "pet")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"hierarchy": Hierarchy(plan=JointPlan(GradientScore(rank=16)))}, "the server's rank is 8"),
        ({"hierarchy": Hierarchy(plan=JointPlan(GradientScore(rank=8), depth=3))}, "the model has 2 blocks"),
        ({"hierarchy": Hierarchy(plan=JointPlan()), "aggregator": FedSA()}, "keep a side of each layer"),
        ({"hierarchy": Hierarchy(), "aggregator": Scaffold(clients=2)}, "no control variate"),
        ({"hierarchy": Hierarchy(), "aggregator": ACE(clients=6)}, "give clients=2"),
        ({"transfer": Own()}, "no code travels to a site"),
        ({"training": Training(decay=mine)}, "no code travels to a site"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_cannot_be_deployed_is_refused_when_it_is_served(
    encoder: Path, tmp_path: Path, more: dict[str, Any], why: str
) -> None:
    """In one sentence, before anybody is waited for or anything is written."""
    with pytest.raises(Refused, match=why):
        start.run_terms(start.prepare_server(run_of(encoder, **more), tmp_path / "none", 2)[0])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("told", ["", "[]", '{"settings": []}', '{"runfile": "x", "patience": {"task": -1}}'])
def test_a_folder_without_an_order_is_refused(tmp_path: Path, told: str) -> None:
    (tmp_path / "deployment.json").write_text(told)
    with pytest.raises(Refused):
        DeploymentConfig.from_folder(tmp_path)
