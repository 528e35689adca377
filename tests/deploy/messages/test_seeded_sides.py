"""What follows from the run's seed is not sent: deployed bytes are the simulation's, and the numbers stay the same to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedloom import FFA, Clip, DeltaInt8, FedSA, FLoRA, Half, LoRAA2, Scaffold
from fedloom.core import message_size
from fedloom.core.errors import Refused
from fedloom.core.fingerprint import fingerprint
from fedloom.core.lora import Adapter, from_tensors, named_tensors, take_sides
from fedloom.core.schema import Malformed
from fedloom.core.transfer import encode_start
from fedloom.core.types import Budget, Task
from fedloom.deploy import start as deploy
from fedloom.deploy.messages.messages import (
    JoinRequest,
    Refusal,
    TaskRequest,
    Welcome,
    decode_reply,
    decode_request,
    encode_request,
)
from fedloom.deploy.messages.seeded_sides import with_seeded_sides, without_seeded_sides
from fedloom.report.run_log import read_run_log
from fedloom.runs.prepare import prepare
from fedloom.train.base_model import initial_adapter
from tests.support import toys
from tests.support.deployment_runs import as_deployed, folder_of, net_of, run_of
from tests.support.sites import simulated_worker, site_at, terms_of, trainer_of
from tests.support.tiny_runs import lively

LIMIT = 10**8
METHODS = [FFA(), FedSA(), LoRAA2(freeze_head=True), Clip(FFA(), 1.0)]
"""Whose seeded sides stay those of the beginning."""


def work_of(method: Any, first: Adapter, codec: Any, rank: int = 4, **terms: Any) -> TaskRequest:
    """A task of a model in which all has changed that this method changes."""
    begun = method.init(first)
    kept = method.start(begun, Budget(4, 3), 7).seeded
    model = replace(begun, adapter=take_sides(kept, first, lively(first, 3)))
    start = encode_start(method.start(model, Budget(rank, 3), 7), codec)
    told = terms_of(**({"first_adapter": fingerprint(first)} | terms))
    return TaskRequest(told, 1, Task(1, "ward", 1, start, Budget(rank, 3), 1.5), 0)


def numbers(work: TaskRequest) -> int:
    """Bytes of a message, its text apart."""
    return sum(tensor.nbytes for tensor in safetensors.torch.load(encode_request(work)).values())


@pytest.mark.parametrize("codec", [None, Half(), DeltaInt8()], ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("rank", [2, 8])
def test_the_bytes_are_those_that_a_simulation_counts(method: Any, codec: Any, rank: int) -> None:
    first = toys.adapter(8)
    work = work_of(method, first, codec, rank)
    sent = without_seeded_sides(work, first)
    assert sent.left_out == work.task.start.seeded
    assert numbers(sent) == message_size.download_size(work.task.start).total < numbers(work)
    back = decode_request(encode_request(sent), LIMIT)
    assert isinstance(back, TaskRequest)
    assert encode_request(with_seeded_sides(back, first)) == encode_request(work)


@pytest.mark.parametrize("codec", [None, Half(), DeltaInt8()], ids=str)
@pytest.mark.parametrize("method", toys.aggregators(), ids=toys.called)
def test_of_every_method_but_one_the_bytes_are_those_that_a_simulation_counts(method: Any, codec: Any) -> None:
    first = toys.adapter(8)
    work = work_of(method, first, codec)
    sent, counted = numbers(without_seeded_sides(work, first)), message_size.download_size(work.task.start).total
    if isinstance(method, FLoRA):  # what was drawn for the task is sent: `fedloom.flower.seeded` says why
        assert sent > counted
    elif isinstance(method, Scaffold) and codec is None:  # a control variate of zeros fits float16
        assert sent <= counted
    else:
        assert sent == counted


def test_what_is_not_that_of_the_beginning_is_sent() -> None:
    first = toys.adapter(8)
    work = work_of(FFA(), first, None)
    assert without_seeded_sides(work, toys.adapter(8, 5)) is work, "the run began with another adapter"
    train = work.task.start.train
    flat = named_tensors(train)
    name = next(name for name in flat if name.endswith(".down"))
    other = from_tensors(train, flat | {name: flat[name] + torch.eye(*flat[name].shape) * 1e-7})
    changed = replace(work, task=replace(work.task, start=replace(work.task.start, train=other)))
    assert without_seeded_sides(changed, first) is changed
    drawn = work_of(FLoRA(), first, None)
    assert "down" not in without_seeded_sides(drawn, first).left_out


def test_a_side_without_numbers_is_refused_where_none_may_be(encoder: Path) -> None:
    first = toys.adapter(8)
    sent = without_seeded_sides(work_of(FFA(), first, None), first)
    void = sent.task.start.train
    start, wrong = sent.task.start, []
    wrong.append(replace(sent, left_out=()))
    wrong.append(replace(sent, left_out=("down", "down")))
    wrong.append(replace(sent, left_out=("down", "up")))
    for more in ({"fold": void}, {"control": void}, {"seeded": ()}):
        wrong.append(replace(sent, task=replace(sent.task, start=replace(start, **more))))  # type: ignore[arg-type]
    for work in wrong:
        with pytest.raises(Malformed):
            decode_request(encode_request(work), LIMIT)
    vast = {
        name: torch.zeros(()).expand(2**30, 2**30) for name, _ in named_tensors(void).items() if name.endswith(".down")
    }
    huge = from_tensors(void, named_tensors(void) | vast)
    with pytest.raises(Malformed):  # and no memory is taken for it
        decode_request(encode_request(replace(sent, task=replace(sent.task, start=replace(start, train=huge)))), LIMIT)


@pytest.mark.parametrize("method", METHODS[:3], ids=str)
def test_a_site_that_drew_the_same_trains_the_same(encoder: Path, tmp_path: Path, method: Any) -> None:
    first = initial_adapter(trainer_of(encoder, terms_of()).base, 4)
    work = work_of(method, first, Half())
    found = []
    for number, asked in enumerate((work, without_seeded_sides(work, first))):
        worker = simulated_worker(site_at(tmp_path / str(number), encoder))
        told = decode_reply(worker.answer(encode_request(JoinRequest(asked.terms, 1))), LIMIT, {})
        assert isinstance(told, Welcome)
        assert told.seeded
        reply = decode_reply(worker.answer(encode_request(asked)), LIMIT, {1: work.task})
        assert isinstance(reply, tuple)
        found.append(reply[2])
    assert fingerprint(found[0].adapter) == fingerprint(found[1].adapter)
    assert found[0].metrics["loss"] == found[1].metrics["loss"]


def test_a_site_that_drew_other_numbers_says_so(encoder: Path, tmp_path: Path) -> None:
    first = initial_adapter(trainer_of(encoder, terms_of()).base, 4)
    work, worker = work_of(FFA(), first, None), simulated_worker(site_at(tmp_path, encoder))
    other = replace(work.terms, seed=4)  # as another torch would draw
    told = decode_reply(worker.answer(encode_request(JoinRequest(other, 1))), LIMIT, {})
    assert isinstance(told, Welcome)
    assert not told.seeded
    refused = decode_reply(
        worker.answer(encode_request(replace(without_seeded_sides(work, first), terms=other))), LIMIT, {}
    )
    assert isinstance(refused, Refusal)
    assert "drawn here from the run's seed is another one" in refused.reason
    assert isinstance(
        decode_reply(worker.answer(encode_request(replace(work, terms=other))), LIMIT, {1: work.task}), tuple
    )
    with pytest.raises(Refused, match="64 hex digits"):
        replace(work.terms, first_adapter="x")


@pytest.mark.slow
def test_a_deployment_sends_what_its_simulation_counts(encoder: Path, tmp_path: Path) -> None:
    run = run_of(encoder, aggregator=FFA(), held_out=0.0)
    simulated = as_deployed(prepare(run)).execute(tmp_path / "simulated", report=False)
    folder, net = folder_of(tmp_path, run), net_of(tmp_path, prepare(run), encoder)
    sent, send = list[int](), net.send

    def counted(node: int, body: bytes, largest: int) -> str:
        if isinstance(ask := decode_request(body, LIMIT), TaskRequest):
            assert ask.left_out == ("down",)
            sent.append(numbers(ask))
        return send(node, body, largest)

    net.send = counted  # type: ignore[method-assign]
    deploy.run_deployment(net, folder, net.pause, net.clock)
    there, here = (read_run_log(place).versions[-1] for place in (folder / "run", simulated.folder))
    assert there["bytes_down"] == here["bytes_down"]
    assert sum(sent) == here["bytes_down"]
