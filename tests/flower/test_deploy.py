"""A deployment over real workers in this process: the simulation's adapter, a trace that replays, a folder that goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedloom import DeltaInt8, Engine, FedFa, FedSA, FixedRank, Hierarchy, Limits, Plan, ProductDelta, Rounds, Scaffold
from fedloom.errors import Refused
from fedloom.flower import deploy
from fedloom.flower.link import Reply
from fedloom.flower.message import Exam, Marks, Work, decode_any, encode_reply
from fedloom.flower.order import Order
from fedloom.flower.pipe import ask
from fedloom.job import prepare
from fedloom.replay import replay
from fedloom.report.read import read
from fedloom.types import Profile
from flower_net import VALUES, Net
from flower_runs import folder_of, net_of, run_of
from flower_sites import site_at


@pytest.mark.parametrize(
    ("method", "codec"),
    [
        (ProductDelta(), DeltaInt8()),
        pytest.param(ProductDelta(), None, marks=pytest.mark.slow),
        pytest.param(FedSA(), None, marks=pytest.mark.slow),
        pytest.param(Scaffold(clients=6), None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_the_simulation_s_adapter(encoder: Path, tmp_path: Path, method: Any, codec: Any) -> None:
    """Synchronous rounds, in which no order is left to chance, at mixed ranks: the same numbers, to the bit; and of each client the
    same scores on the same examples held out.

    `together=1`: a simulation trains clients in one pass where it can, and each site alone; dropout then draws other masks.
    """
    run = run_of(encoder, aggregator=method, transfer=codec, engine=Engine(together=1))
    job = prepare(run)
    simulated = job.execute(tmp_path / "simulated", report=False)
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    assert deploy.run(net, folder, net.pause, net.clock) == "3 versions made"
    there = adapter_at(folder / "run")
    here = adapter_at(simulated.folder)
    assert there.keys() == here.keys()
    assert all(there[name].equal(here[name]) for name in here)
    assert replay(folder / "run").difference == ""
    log = read(folder / "run")
    assert log.manifest["status"] == "finished"
    assert set(log.manifest["clients"]) == set(job.profiles)
    assert [line["accuracy"] for line in log.scores] == [score["accuracy"] for score in simulated.scores]
    assert "virtual time" not in (folder / "run" / "report.html").read_text()
    wanted = [{**line, "tier": "site"} for line in read(simulated.folder).clients]
    assert len(wanted) == 6
    for line, want in zip(log.clients, wanted, strict=True):
        assert line["loss"] == pytest.approx(want["loss"], rel=1e-5)  # clients of one rank are predicted together there
        assert {**line, "loss": 0} == {name: value for name, value in {**want, "loss": 0}.items() if name != "f1"}
    assert not log.unscored


def adapter_at(folder: Path) -> dict[str, Any]:
    import safetensors.torch

    found: dict[str, Any] = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    return found


class Killed(BaseException):
    """As by kill -9: nothing of the process gets to say a word."""


@pytest.mark.slow
@pytest.mark.parametrize("after", [5, 23])
def test_a_server_that_was_killed_goes_on_in_its_folder(encoder: Path, tmp_path: Path, after: int) -> None:
    run = run_of(encoder, schedule=FedFa(3), limits=Limits(versions=20, evaluate_every=5))
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    sent, send = 0, net.send

    def dies(node: int, body: bytes) -> str:
        nonlocal sent
        sent += 1
        if sent == 6 + after:
            raise Killed
        return send(node, body)

    net.send = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        deploy.run(net, folder, net.pause, net.clock)
    net.forget()
    net.send = send  # type: ignore[method-assign]
    net.pause(100.0)
    assert deploy.run(net, folder, net.pause, net.clock) == "20 versions made"
    assert replay(folder / "run").difference == ""
    lines = [json.loads(line) for line in (folder / "run" / "trace.jsonl").read_text().splitlines()]
    counted = [line["event"]["task"] for line in lines if line["event"]["type"] == "UpdateArrived"]
    assert len(counted) == len(set(counted)) >= 20
    trained = sum(site.worker.trained for site in net.sites.values())  # type: ignore[attr-defined]
    assert trained <= len(counted) + 6  # nothing that counted was trained twice
    assert deploy.run(net, folder) == "20 versions made"  # a finished one has nothing left to do


@pytest.mark.slow
def test_sites_of_other_limits_train_at_their_own_rank(encoder: Path, tmp_path: Path) -> None:
    run = run_of(encoder, plan=Plan(FixedRank(8), local_steps=3))
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    for number, rank in enumerate([2, 4, 8, 8, 4, 2]):
        worker = net.sites[number].worker  # type: ignore[attr-defined]
        worker.site = worker.site.model_copy(update={"limits": worker.site.limits.model_copy(update={"rank": rank})})
    deploy.run(net, folder, net.pause, net.clock)
    ranks = {str(task["client"]): task["rank"] for task in read(folder / "run").tasks}
    known = [net.sites[number].profile.client for number in range(6)]
    assert {client: ranks[client] for client in ranks} == {
        client: rank for client, rank in zip(known, [2, 4, 8, 8, 4, 2], strict=True) if client in ranks
    }
    assert len(set(ranks.values())) > 1


def test_the_training_file_need_not_be_at_the_server(encoder: Path, tmp_path: Path) -> None:
    from bench.tiny import toy_rows
    from fedloom import Table

    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, toy_rows(20))))
    run = run_of(encoder, data=Table(tmp_path / "nowhere.jsonl", tmp_path / "test.jsonl"))
    job, profiles = deploy.made_for_serving(run, tmp_path / "none")
    assert (len(job.split.train), len(job.split.test), profiles) == (0, 20, {})
    assert job.split.train.names == ("colour", "pet")


@pytest.mark.parametrize("told", ["", "[]", '{"settings": []}', '{"runfile": "x", "patience": {"task": -1}}'])
def test_a_folder_without_an_order_is_refused(tmp_path: Path, told: str) -> None:
    (tmp_path / "deployment.json").write_text(told)
    with pytest.raises(Refused):
        Order.of(tmp_path)


ONE = threading.Lock()
"""Of server and regions, which are processes of their own elsewhere, one at a time does something here."""


@contextmanager
def freed() -> Iterator[None]:
    """Inside, the others may."""
    ONE.release()
    try:
        yield
    finally:
        ONE.acquire()


@dataclass
class Above:
    """A region as a site of the net above: it is asked through its socket."""

    socket: Path
    profile: Profile
    seconds: float = 1.0

    def answer(self, body: bytes) -> bytes:
        until = time.monotonic() + 20
        while True:
            try:
                with freed():
                    return ask(self.socket, body, 60.0)
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < until
                with freed():
                    time.sleep(0.05)


@pytest.mark.slow
def test_a_region_is_the_server_of_its_sites_and_a_site_of_the_server_above(encoder: Path, tmp_path: Path) -> None:
    """Two regions of three sites, each with a net of its own in a thread; the server above, killed once. Inner rounds: 2."""
    run = run_of(encoder, hierarchy=Hierarchy(rounds=2), schedule=FedFa(2), limits=Limits(versions=6))
    job, members = prepare(run_of(encoder)), dict[int, Any]()
    whole_net = net_of(tmp_path, job, encoder)
    stop = threading.Event()

    class Over(BaseException):
        pass

    def regional(number: int) -> None:
        folder = tmp_path / f"region{number}"
        folder.mkdir()
        site_at(folder / "above", encoder)
        text = (folder / "above" / "site.toml").read_text().replace("ward", f"region{number}").partition("[table]")[0]
        text = "region = true\n" + text
        (folder / "above" / "site.toml").write_text(text.replace("/at/the/server/tiny", str(encoder)))
        own = Net({k: whole_net.sites[k] for k in range(3 * number, 3 * number + 3)})

        def pause(seconds: float) -> None:
            own.pause(seconds)
            with freed():
                time.sleep(0.001)
            if stop.is_set():
                raise Over

        VALUES[str(folder)] = run
        (folder / "run.py").write_text(f"from flower_net import VALUES\n\nrun = VALUES[{str(folder)!r}]\n")
        told = {"runfile": str(folder / "run.py"), "clients": 3, "above": str(folder / "above" / "site.toml")}
        (folder / "deployment.json").write_text(json.dumps(told))
        with suppress(Over), ONE:
            deploy.run(own, folder, pause, own.clock)
        members[number] = own

    threads = [threading.Thread(target=regional, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        sockets = [tmp_path / f"region{number}" / "above" / "state" / "worker.sock" for number in (0, 1)]
        above = Net({k: Above(sockets[k], Profile(f"region{k}", 1)) for k in (0, 1)}, named=False)  # type: ignore[misc]
        folder = folder_of(tmp_path, run, clients=2, patience={"pause": 1.0})
        send, sent = above.send, 0

        def dies(node: int, body: bytes) -> str:
            nonlocal sent
            sent += 1
            if sent == 8:
                raise Killed
            return send(node, body)

        above.send = dies  # type: ignore[method-assign]

        def slowly(seconds: float) -> None:
            above.pause(seconds)
            with freed():
                time.sleep(0.01)

        with pytest.raises(Killed), ONE:
            deploy.run(above, folder, slowly, above.clock)
        above.forget()
        with ONE:
            assert deploy.run(above, folder, slowly, above.clock) == "6 versions made"
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert replay(folder / "run").difference == ""
    log = read(folder / "run")
    merged = [task for task in log.tasks if task["status"] == "merged"]
    assert {task["client"] for task in merged} == {"region0", "region1"}
    for number in (0, 1):
        lines = (tmp_path / f"region{number}" / "run" / "trace.jsonl").read_text().splitlines()
        events = [json.loads(line) for line in lines]
        outer = [line["event"]["task"]["id"] for line in events if line["event"]["type"] == "TaskReceived"]
        reports = [c for line in events for c in line["commands"] if c["type"] == "Report"]
        assert len(outer) == len(set(outer))  # nothing that came twice was begun twice
        assert len(reports) in (len(outer), len(outer) - 1)
        assert all(report["result"]["metrics"]["rounds"] == 2 for report in reports)
        assert all(report["result"]["metrics"]["members"] == 3 for report in reports)


def test_who_declines_or_says_nothing_is_left_out_of_the_scores_and_told_of(encoder: Path, tmp_path: Path) -> None:
    """Of six sites: one declines, one sends garbage, one is silent, one gets it at the second try, one goes away, one went before."""
    run = run_of(encoder, limits=Limits(versions=1), schedule=Rounds(6))
    folder = folder_of(tmp_path, run, patience={"task": 100.0, "away": 20.0})
    net = net_of(tmp_path, prepare(run), encoder)
    no = net.sites[0].worker.site.limits.model_copy(update={"scores": False})  # type: ignore[attr-defined]
    net.sites[0].worker.site = net.sites[0].worker.site.model_copy(update={"limits": no})  # type: ignore[attr-defined]
    send, exams = net.send, list[int]()

    def troubled(node: int, body: bytes) -> str:
        exam = decode_any(body, 2**30)
        if node == 5 and isinstance(exam, Work):
            net.back[5] = 1e9
            return "nobody is there"
        if not isinstance(exam, Exam):
            return send(node, body)
        exams.append(node)
        name = f"exam{len(exams)}"
        if node == 1:
            marks = Marks(exam.client, 10, 10, 11, 1.0, 0)
            net._put(net.time + 1, Reply(name, node, encode_reply(marks)))
        elif node == 3 and exams.count(3) == 1:
            net._put(net.time + 1, Reply(name, node, None, "the line was cut"))
        elif node == 4:
            net.back[4] = 1e9
        elif node != 2:
            return send(node, body)
        return name

    net.send = troubled  # type: ignore[method-assign]
    deploy.run(net, folder, net.pause, net.clock)
    log = read(folder / "run")
    assert [line["client"] for line in log.clients] == ["c03"]
    why = {line["client"]: line["reason"] for line in log.unscored}
    assert list(why) == ["c00", "c01", "c02", "c04", "c05"]
    assert "limits.scores" in why["c00"]
    assert "right is 11, expected 0 to 10" in why["c01"]
    assert why["c02"] == "no answer within 100 s"
    assert why["c04"] == "it went away"
    assert why["c05"] == "it was gone before the end"
    assert sorted(exams) == [0, 1, 2, 3, 3, 4]
    assert {task["status"] for task in log.tasks} == {"lost", "merged"}
    assert "5 of 6 clients" in (folder / "run" / "report.html").read_text()


def test_nobody_is_asked_where_nothing_is_held_out(encoder: Path, tmp_path: Path) -> None:
    run = run_of(encoder, limits=Limits(versions=1), held_out=0.0)
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    deploy.run(net, folder, net.pause, net.clock)
    log = read(folder / "run")
    assert (log.clients, log.unscored) == ((), ())
    assert log.manifest["clients"]["c00"]["examples"] == 32
