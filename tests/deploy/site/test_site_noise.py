"""Clipping and noise at the site: their size, that they repeat and are never shared, and that nothing exact leaves beside them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.core.answer_change import euclidean_norm
from fedloom.core.codec import DeltaInt8
from fedloom.core.lora import Adapter, Factor, map_tensors, named_tensors
from fedloom.core.types import Budget, Pruning, Result, Rules, Side, Task, TaskStart
from fedloom.core.validate_answer import why_invalid
from fedloom.deploy.messages.messages import Refusal, TaskRequest, decode_reply, encode_request
from fedloom.deploy.site.site_noise import NoiseSource, protect_answer, why_unprotected
from fedloom.deploy.site.site_privacy import SitePrivacy, stored_run
from fedloom.deploy.site.worker import SiteWorker
from fedloom.privacy.accounting import Gaussian
from fedloom.privacy.ledger import read_ledger
from tests.support.sites import simulated_worker, site_at, task_of, terms_of, trainer_of
from tests.support.tiny_runs import same

SOURCE = NoiseSource(b"s" * 32, "0123456789ab", "d" * 64)
PRIVACY = SitePrivacy(clip=1.0, multiplier=0.8)


def adapter(seed: int, rank: int = 4, size: float = 1.0) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    factors = {
        name: Factor(size * torch.randn(rank, 30, generator=draw), size * torch.randn(50, rank, generator=draw))
        for name in "ab"
    }
    return Adapter(factors, {"head": size * torch.randn(3, 7, generator=draw)})


def task(start: Adapter, rules: Rules | None = None, number: int = 1) -> Task:
    return Task(number, "ward", 0, TaskStart(start, "b", rules=rules or Rules()), Budget(4, 3), 0.0)


def result(trained: Adapter) -> Result:
    return Result(trained, 100, 1000, 3, {"loss": 0.7, "first_loss": 0.9, "words": 3.0})


def change(one: Adapter, other: Adapter) -> Adapter:
    return map_tensors(lambda a, b: a.double() - b.double(), one, other)


START = adapter(1)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0, 1e4])
def test_a_change_is_cut_to_the_norm_and_a_shorter_one_is_as_it_was(size: float) -> None:
    trained = map_tensors(torch.add, START, adapter(2, size=size))
    clipped = protect_answer(SitePrivacy(clip=1.0), SOURCE, task(START), result(trained)).adapter
    before, after = change(trained, START), change(clipped, START)
    length = euclidean_norm(before)
    assert euclidean_norm(after) == pytest.approx(min(length, 1.0), rel=1e-5)
    share = min(1.0, 1.0 / length)
    for name, tensor in named_tensors(after).items():
        assert torch.allclose(tensor, share * named_tensors(before)[name], atol=1e-6)


def test_noise_has_the_size_that_is_stated_on_every_number() -> None:
    noise = change(protect_answer(PRIVACY, SOURCE, task(START), result(START)).adapter, START)
    drawn = torch.cat([tensor.flatten() for tensor in named_tensors(noise).values()]) / 0.8
    assert drawn.std() == pytest.approx(1.0, abs=4 / math.sqrt(2 * len(drawn)))
    assert drawn.mean() == pytest.approx(0.0, abs=4 / math.sqrt(len(drawn)))
    assert len({*drawn.tolist()}) > 0.99 * len(drawn)
    assert drawn.count_nonzero() == len(drawn), "no number leaves as it was"
    steps = drawn * 0.8 * 2.0**20
    assert (steps - steps.round()).abs().max() < 1.0, "on the grid but for float32"


def test_the_same_task_gets_the_same_noise_and_anything_else_another() -> None:
    trained = map_tensors(torch.add, START, adapter(2, size=1e-4))
    once = protect_answer(PRIVACY, SOURCE, task(START), result(trained)).adapter
    assert same(once, protect_answer(PRIVACY, SOURCE, task(START), result(trained)).adapter)
    noise = named_tensors(change(once, trained))["a.down"]
    other_value = map_tensors(torch.add, trained, adapter(3, size=1e-9))
    others = [
        (replace(SOURCE, secret=b"t" * 32), task(START), trained),
        (replace(SOURCE, run_hash="f" * 12), task(START), trained),
        (replace(SOURCE, request="e" * 64), task(START), trained),
        (SOURCE, task(START, number=2), trained),
        (SOURCE, task(START), other_value),
    ]
    for source, asked, exact in others:
        other = named_tensors(change(protect_answer(PRIVACY, source, asked, result(exact)).adapter, exact))["a.down"]
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.4, "to subtract one answer from another leaves the noise of both"


@pytest.mark.parametrize(
    "changed", [SitePrivacy(clip=1.0, multiplier=1.6), SitePrivacy(clip=0.5, multiplier=0.8)], ids=repr
)
def test_another_multiplier_or_clip_gets_other_noise(changed: SitePrivacy) -> None:
    """From the same draws at two scales the exact answer could be computed: both are known, and it is what is left."""
    noises = []
    for privacy in (PRIVACY, changed):
        sent = protect_answer(privacy, SOURCE, task(START), result(START)).adapter
        noises.append(named_tensors(change(sent, START))["a.down"].flatten())
    assert abs(torch.corrcoef(torch.stack(noises))[0, 1]) < 0.4


def test_noise_does_not_follow_from_few_bits_of_a_seed() -> None:
    """torch takes 32 bits of a seed, which can be tried one after the other."""
    assert torch.equal(*(torch.randn(3, generator=torch.Generator().manual_seed(5 + more)) for more in (0, 2**32)))
    secrets = [b"\0" * 31 + bytes([last]) for last in range(64)] + [
        bytes([first]) + b"\0" * 31 for first in range(1, 64)
    ]
    drawn = {float(next(iter(replace(SOURCE, secret=secret).normals(1, START, 1.0, 0.8)))[0, 0]) for secret in secrets}
    assert len(drawn) == len(secrets)


@pytest.mark.parametrize("side", ["down", "up", "dense"])
def test_sides_that_may_not_change_are_those_that_were_sent(side: Side) -> None:
    trained = map_tensors(torch.add, START, adapter(2))
    asked = task(START, Rules(frozen=(side,)))
    sent = protect_answer(PRIVACY, SOURCE, asked, result(trained))
    assert why_invalid(asked, sent) is None, "also where the trainer had changed it"
    moved = {
        name.partition(".")[2] or "dense"
        for name, tensor in named_tensors(change(sent.adapter, START)).items()
        if tensor.any()
    }
    assert moved == {"down", "up", "dense"} - {side}


def test_a_pruned_answer_is_clipped_at_its_own_rank() -> None:
    trained = adapter(2, rank=3)
    asked = task(START, Rules(pruning=Pruning()))
    sent = protect_answer(SitePrivacy(clip=0.5), SOURCE, asked, result(trained))
    assert why_invalid(asked, sent) is None
    assert sent.adapter.factors["a"].rank == 3


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_change_that_is_not_finite_counts_as_none(wrong: float) -> None:
    trained = map_tensors(lambda tensor: tensor.clone().fill_(wrong), START)
    assert same(protect_answer(SitePrivacy(clip=1.0), SOURCE, task(START), result(trained)).adapter, START)
    assert why_invalid(task(START), protect_answer(PRIVACY, SOURCE, task(START), result(trained))) is None


def test_no_loss_and_no_length_of_texts_leaves_beside_it() -> None:
    sent = protect_answer(PRIVACY, SOURCE, task(START), result(START))
    assert (sent.metrics, sent.tokens) == ({}, 0)


def test_what_would_leave_beside_the_noise_is_refused() -> None:
    plain = TaskStart(START, "b")
    cases = {
        "control variate": replace(plain, control=START),
        "rank after pruning": replace(plain, rules=Rules(pruning=Pruning())),
        "choice of directions": replace(plain, rules=Rules(select=3)),
    }
    for words, start in cases.items():
        assert words in (why_unprotected(PRIVACY, start) or "")
        assert why_unprotected(None, start) is None
    assert why_unprotected(PRIVACY, plain) is None
    clip = SitePrivacy(clip=1.0)
    assert [bool(why_unprotected(clip, start)) for start in cases.values()] == [True, False, False]


# The worker -----------------------------------------------------------------------------------------------------------


def answers(worker: SiteWorker, work: list[TaskRequest]) -> list[Result]:
    replies = [decode_reply(worker.answer(encode_request(one)), 10**8, {one.task.id: one.task}) for one in work]
    refused = [reply.reason for reply in replies if isinstance(reply, Refusal)]
    assert not refused, refused
    return [reply[2] for reply in replies if isinstance(reply, tuple)]


def test_a_worker_sends_nothing_exact_now_or_in_a_later_answer(encoder: Path, tmp_path: Path) -> None:
    """Neither what was trained before the owner asked for it, nor what is left of that: error feedback, optimiser moments."""
    terms = terms_of()
    trainer = trainer_of(encoder, terms)
    tasks = [replace(task_of(FedIT(), trainer, DeltaInt8(), 1), id=number) for number in (1, 2)]
    work = [TaskRequest(terms, 1, one, settled) for settled, one in enumerate(tasks)]
    folder, clip = tmp_path / "site", "[privacy]\nclip = 1e-3\n"
    before = answers(simulated_worker(site_at(folder, encoder)), work[:1])
    worker = simulated_worker(site_at(folder, encoder, more=clip))
    (again, after), first = answers(worker, work), worker.journal.find(terms.run_hash, 1)
    assert first is not None
    assert first.client_state.residual is not None, "what the first answer lost lies there"
    for one, longest in ((before[0], math.inf), (again, 1.02e-3), (after, 1.02e-3)):  # int8 rounds each row
        assert 0 < euclidean_norm(change(one.adapter, tasks[0].start.train)) < longest
    assert worker.repeated == 0
    completed = worker.journal.find(stored_run(terms.run_hash, worker.site.privacy, None), 2)
    assert completed is not None
    assert completed.client_state.residual is None
    assert {*after.metrics} == {"rounding", "rounding_change", "seconds_train"}


@pytest.mark.slow
def test_what_is_spent_is_written_before_the_answer_and_once_for_the_same_one(encoder: Path, tmp_path: Path) -> None:
    terms = terms_of()
    asked = task_of(FedIT(), trainer_of(encoder, terms), None, 1)
    site = site_at(tmp_path, encoder, more="[privacy]\nclip = 1.0\nmultiplier = 0.5\n")
    worker = simulated_worker(site)
    (first,) = answers(worker, [TaskRequest(terms, 1, asked, 0)])
    assert why_invalid(asked, first) is None
    for file in (site.folder / "journal").rglob("*.safetensors"):
        file.unlink()  # as if the power had failed in between
    (second,) = answers(simulated_worker(site), [TaskRequest(terms, 1, asked, 0)])
    assert same(first.adapter, second.adapter), "not a second draw of noise"
    (entry,) = read_ledger(site.folder / "spent.jsonl")
    assert (entry.about["task"], entry.events) == (1, {"answers": Gaussian(2.0)})
    kinds = [json.loads(line)["kind"] for line in (site.folder / "record.jsonl").read_text().splitlines()]
    assert kinds[:6] == ["started", "accepted", "task asked", "noise spent", "task answered", "started"]
