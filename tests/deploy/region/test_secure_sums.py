"""Regions whose sites are only summed: real workers mask what they trained, and the region learns the sum and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedloom import FFA, FixedRank, Hierarchy, Limits, Plan, Rounds, Secure
from fedloom.core.events import SumOpened
from fedloom.core.lora import Adapter, named_tensors
from fedloom.deploy.messages.messages import TaskRequest, decode_request
from fedloom.deploy.server.sum_exchange import SumExchange
from fedloom.deploy.site.request_record import RecordChain
from fedloom.deploy.site.sum_member import SumMember
from fedloom.runs.prepare import prepare
from fedloom.runs.replay import replay
from tests.deploy.region.test_region import run_of
from tests.support.deployment_runs import Real, net_of
from tests.support.simulated_regions import Country


class Summed:
    """Two regions of three sites with keys; what sites held for each task, and what regions opened."""

    def __init__(self, tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        given: dict[str, Any] = {
            "aggregator": FFA(),
            "plan": Plan(FixedRank(4), 3),
            "hierarchy": Hierarchy(rounds=2, secure=Secure(least=3, bound=0.05)),
            "schedule": Rounds(2),
            "limits": Limits(versions=2),
        }
        run = run_of(encoder, **(given | more))
        net = net_of(tmp_path, prepare(run_of(encoder)), encoder)
        self.workers = {one.worker.site.name: one.worker for one in net.sites.values()}  # type: ignore[attr-defined]
        peers, keys = tmp_path / "peers", {name: ec.generate_private_key(ec.SECP384R1()) for name in self.workers}
        peers.mkdir()
        for name, key in keys.items():
            (peers / f"{name}.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
            self.workers[name].sums = SumMember(name, key, peers)
        self.parts: dict[tuple[str, int], Adapter] = {}
        self.opened: list[tuple[SumOpened, SumExchange]] = []
        self.requests: list[tuple[str, bytes, bytes]] = []
        monkeypatch.setattr(Real, "answer", lambda real, body: self._answer(real, body))
        ended = SumExchange._opened
        monkeypatch.setattr(SumExchange, "_opened", lambda one: self._note(ended(one), one))
        self.here = Country(tmp_path, encoder, run, net)

    def _answer(self, real: Real, body: bytes) -> bytes:
        request, sums = decode_request(body, 2**30), real.worker.sums
        reply = real.worker.answer(body)
        self.requests.append((sums.name, body, reply))
        if isinstance(request, TaskRequest) and sums.part is not None:
            self.parts[sums.name, request.task.id] = sums.part
        return reply

    def _note(self, opened: SumOpened, exchange: SumExchange) -> SumOpened:
        self.opened.append((opened, exchange))
        return opened


def same_integers(summed: Summed) -> None:
    """Each opened sum is that of what its members held, in every block, to the bit."""
    assert summed.opened
    for opened, exchange in summed.opened:
        for block in opened.blocks:
            members = [summed.parts[exchange.tasks[number].client, number] for number in block.tasks]
            for name, total in named_tensors(opened.sums).items():
                own = [directions(name, named_tensors(one)[name], block.first, block.last) for one in members]
                found = directions(name, total, block.first, block.last)
                if not (name.startswith("dense:") and block.first):
                    assert (found == sum(own)).all(), (name, block)
        assert any(bool(tensor.any()) for tensor in named_tensors(opened.sums).values())


def directions(name: str, tensor: Any, first: int, last: int) -> Any:
    if name.startswith("dense:"):
        return tensor
    return tensor[:, first:last] if name.endswith(".up") else tensor[first:last]


@pytest.mark.slow
def test_a_region_opens_the_sum_of_what_its_sites_hold(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed = Summed(tmp_path, encoder, monkeypatch)
    with summed.here.open():
        assert summed.here.serve() == "2 versions made"
    assert replay(summed.here.folder / "run").difference == ""
    same_integers(summed)
    assert len(summed.opened) >= 8  # two regions, two versions, two rounds each
    assert all(len(opened.blocks[0].tasks) == 3 for opened, _ in summed.opened)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [pytest.param(8, marks=pytest.mark.storms), 14])
def test_a_region_that_is_killed_while_a_sum_is_opened_drops_it(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: int
) -> None:
    """Message 8 is in the first step, 14 asks for masked values: no site sends values of a task for a second sum."""
    summed = Summed(tmp_path, encoder, monkeypatch)
    summed.here.dies = lambda region, number: region == 0 and number == sent
    with summed.here.open():
        assert summed.here.serve() == "2 versions made"
    assert summed.here.starts[0] == 2
    events = [line["event"] for line in summed.here.steps(0)]
    assert [event["reason"] for event in events if event["type"] == "SumFailed"] == [
        "the server was started anew while the sum was opened"
    ]
    same_integers(summed)
    for worker in summed.workers.values():
        lines = [*RecordChain().lines(worker.site.folder / "record.jsonl")]
        asked = [line["task"] for line in lines if line["kind"] == "sum asked"]
        assert len(asked) == len(set(asked)) > 2
