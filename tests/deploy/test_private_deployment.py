"""A private deployment over real workers in this process: killed where it hurts, it counts at least what it released."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from fedloom import FFA, Constant, FedBuff, FedIT, Limits, Private
from fedloom.core.errors import Refused
from fedloom.core.events import UpdateArrived
from fedloom.deploy import start
from fedloom.deploy.server import driver
from fedloom.deploy.server.config import server_secret
from fedloom.privacy.accounting import Gaussian, merged_events
from fedloom.privacy.ledger import LEDGER, Ledger, read_ledger, spent_by_unit
from fedloom.runs.checkpoint import read_checkpoint
from fedloom.runs.prepare import prepare
from fedloom.runs.private_run import client_event
from fedloom.runs.release_recorder import releases_of
from fedloom.runs.replay import replay
from fedloom.runs.resume import CHECKPOINT
from fedloom.runs.trace import Trace
from fedloom.schedule.shared.weights import uniform
from tests.support.deployment_runs import folder_of, net_of, run_of
from tests.support.simulated_regions import Killed

ANSWERS = 4
BANDED: dict[str, Any] = {
    "schedule": FedBuff(buffer_size=1, max_in_flight=4, discount=Constant()),
    "aggregator": FFA(),
    "privacy": Private(clip=0.5, multiplier=1.0, most_answers=ANSWERS, noise="banded", apart=2),
}


def private_run(encoder: Path, **more: Any) -> Any:
    given: dict[str, Any] = {
        "schedule": FedBuff(buffer_size=2, max_in_flight=4, weigh=uniform),
        "aggregator": FedIT(),
        "limits": Limits(versions=8, evaluate_every=0),
        "privacy": Private(clip=0.5, multiplier=1.0, most_answers=ANSWERS),
    }
    return run_of(encoder, **(given | more))


class Leaks:
    """What anybody outside the server's memory could have seen of releases: each that reached the trace, the second observer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.releases: dict[str, Any] = {}
        written = Trace.__call__

        def seen(trace: Trace, now: float, event: Any, commands: Any) -> None:
            self.releases |= {release.value: release for _, release in releases_of(commands)}
            written(trace, now, event, commands)

        monkeypatch.setattr(Trace, "__call__", seen)

    def spent(self) -> dict[str, float]:
        """By client, what these releases tell of it (mu)."""
        clients = {client for release in self.releases.values() for client in release.spent}
        events = {
            client: [Gaussian(one.spent[client]) for one in self.releases.values() if client in one.spent]
            for client in clients
        }
        return {client: merged[0].mu for client, found in events.items() if (merged := merged_events(found))}  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, BANDED], ids=["independent", "banded"])
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.storms)])
def test_killed_anywhere_it_counts_what_it_released(
    encoder: Path, tmp_path: Path, kills: int, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before a line is written, after it, and before anything is sent; answers come in another order after each restart."""
    leaks, run, done = Leaks(monkeypatch), private_run(encoder, **more), 0
    for number in range(kills):
        (tmp_path / str(number)).mkdir()
        folder, net = (
            folder_of(tmp_path, run, f"deployment-{number}"),
            net_of(tmp_path / str(number), prepare(run), encoder),
        )
        leaks.releases.clear()
        while done < kills:
            with monkeypatch.context() as patch:
                set_trap(patch, net, done)
                try:
                    start.run_deployment(net, folder, net.pause, net.clock)
                    break
                except Killed:
                    done += 1
            net.forget()
            for site in net.sites.values():  # others are the fast ones now
                site.seconds = 1.0 + (7 * site.seconds + done) % 5
            net.pause(100.0)
        start.run_deployment(net, folder, net.pause, net.clock)
        check(folder, leaks, run)
        assert replay(folder / "run", secret=server_secret(run, folder)).difference == ""
        if done == kills:
            return
    pytest.fail("it was not killed often enough")


def set_trap(patch: pytest.MonkeyPatch, net: Any, kill: int) -> None:
    """Let the server die at one of its next messages or releases."""
    send, written, at, visits = net.send, Ledger.write, 1 + kill // 3 % 3, 0

    def dies(last: int) -> None:
        nonlocal visits
        visits += 1
        if visits == last:
            raise Killed

    def before(ledger: Ledger, entry: Any) -> bool:
        dies(at)
        return written(ledger, entry)

    def after(ledger: Ledger, entry: Any) -> bool:
        found = written(ledger, entry)
        dies(at)
        return found

    def sent(*message: Any) -> Any:
        dies(7 + 2 * at)
        return send(*message)

    owner, name, trap = ((net, "send", sent), (Ledger, "write", before), (Ledger, "write", after))[kill % 3]
    patch.setattr(owner, name, trap)


def check(folder: Path, leaks: Leaks, run: Any) -> None:
    """The ledger has a line of each release that was seen, no client has less than that, and none more than was promised."""
    entries, promised = list(read_ledger(folder / "run" / LEDGER)), client_event(run.privacy, run.limits.versions).mu
    assert leaks.releases.keys() <= {entry.about["value"] for entry in entries}
    spent = spent_by_unit(entries)
    for client, mu in leaks.spent().items():
        (event,) = spent[client]
        assert isinstance(event, Gaussian)
        assert mu <= event.mu * (1 + 1e-12)
        assert event.mu <= promised * (1 + 1e-9)


@pytest.mark.slow
def test_its_secret_is_its_own_and_its_answers_are_sealed(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = private_run(encoder, held_out=0.2)
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    sent, parsed = list[Any](), driver.parse_reply

    def seen(*given: Any) -> Any:
        sent.append(parsed(*given))
        return sent[-1]

    monkeypatch.setattr(driver, "parse_reply", seen)
    start.run_deployment(net, folder, net.pause, net.clock)
    answers = [reply.result for reply in sent if isinstance(reply, UpdateArrived)]
    assert len(answers) >= 16
    assert {(answer.tokens, "loss" in answer.metrics) for answer in answers} == {(0, False)}
    key = folder / "secret" / "noise.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    secret = server_secret(run, folder)
    for path in (one for one in (folder / "run").rglob("*") if one.is_file()):
        data = path.read_bytes()
        assert secret not in data
        assert secret.hex().encode() not in data
    about = json.loads((folder / "run" / "manifest.json").read_text())
    assert about["privacy"]["noise"] == "by a secret of the server, which is not in this folder"
    metrics = (folder / "run" / "metrics.jsonl").read_text()
    assert '"kind":"client"' not in metrics
    assert '"loss":null' in metrics
    with pytest.raises(ValueError, match="sealed"):
        read_checkpoint(folder / "run" / CHECKPOINT)
    found = replay(folder / "run")
    assert found.difference == ""
    assert "not verified" in found.unverified
    key.unlink()
    with pytest.raises(Refused, match="lost"):
        start.prepare_server(run, folder / "run")


@pytest.mark.slow
def test_one_that_is_made_longer_releases_nothing_twice(encoder: Path, tmp_path: Path) -> None:
    """Its last steps are made again from sealed answers, to the same versions: each has one line, and no client is counted twice."""
    run = private_run(encoder, limits=Limits(versions=3, evaluate_every=0))
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    start.run_deployment(net, folder, net.pause, net.clock)
    before = (folder / "run" / LEDGER).read_bytes()
    told = json.loads((folder / "deployment.json").read_text())
    (folder / "deployment.json").write_text(json.dumps({**told, "until": 5}))
    net.forget()
    net.pause(1e6)
    assert start.run_deployment(net, folder, net.pause, net.clock) == "5 versions made"
    after = (folder / "run" / LEDGER).read_bytes()
    assert after.startswith(before)
    assert [entry.about["version"] for entry in read_ledger(folder / "run" / LEDGER)] == [1, 2, 3, 4, 5]
    found = replay(folder / "run", secret=server_secret(run, folder))
    assert (found.difference, found.unverified) == ("", "")
