"""What a site protects and spends: the stricter of two wishes, a budget that holds over runs, and a ledger before each answer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    Refusal,
    RunTerms,
    TaskRequest,
    decode_reply,
    encode_request,
)
from fedloom.deploy.site.settings import read_site, site_shard
from fedloom.deploy.site.site_privacy import SPENT, SitePrivacy, TaskSpending, noise_in_training
from fedloom.deploy.site.worker import SiteWorker
from fedloom.privacy.accounting import Gaussian, SampledGaussian, epsilon_of
from fedloom.privacy.ledger import read_ledger
from fedloom.privacy.private import Private
from tests.support.sites import simulated_worker, site_at, task_of, terms_of, trainer_of
from tests.support.tiny_runs import same

RECORDS = Private(clip=1.0, multiplier=1.0, most_answers=3, unit="record")
OWNER = SitePrivacy(unit="record", clip=2.0, multiplier=0.5)


def request(number: int = 1, **terms: Any) -> TaskRequest:
    task = Task(number, "ward", 0, TaskStart(Adapter({}), "0"), Budget(4, 25), 0.0)
    return TaskRequest(terms_of(**terms), 1, task, 0)


def spending(folder: Path, privacy: SitePrivacy | None, number: int = 1, rows: int = 8, **terms: Any) -> TaskSpending:
    """Of a site whose rows, unless they are many, are all in each batch: its epsilon has a closed form, which is quick."""
    return TaskSpending(folder, privacy, request(number, **terms), f"{number}{terms.get('run_hash', '')}", rows)


@pytest.mark.parametrize(
    ("owner", "asked", "expected"),
    [
        (None, None, None),
        (None, RECORDS, RECORDS),
        (SitePrivacy(clip=1.0), RECORDS, RECORDS),
        (SitePrivacy(clip=1.0), None, None),
        (OWNER, RECORDS, RECORDS),
        (OWNER.model_copy(update={"multiplier": 3.0}), RECORDS, replace(RECORDS, multiplier=3.0)),
        (SitePrivacy(unit="record"), RECORDS, RECORDS),
        (OWNER, None, Private(2.0, 0.5, 1, unit="record")),
    ],
)
def test_the_larger_noise_counts(owner: SitePrivacy | None, asked: Private | None, expected: Private | None) -> None:
    assert noise_in_training(owner, asked) == expected


@pytest.mark.parametrize("owner", [SitePrivacy(unit="record"), SitePrivacy(unit="record", clip=1.0)])
def test_a_site_that_trains_only_with_noise_has_to_know_which(owner: SitePrivacy) -> None:
    with pytest.raises(Refused, match="clip and multiplier"):
        noise_in_training(owner, None)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("multiplier = 1.0", "give clip"),
        ("clip = 1.0\nmultiplier = 1.0\nepsilon = 8.0", "both epsilon and delta"),
        ("clip = 1.0\nepsilon = 8.0\ndelta = 1e-5", "clipping alone has no epsilon"),
        ('clip = 1.0\nunit = "site"', "privacy"),
        ("clip = 1.0\nmultiplier = 1.0\nepsilon = 8.0\ndelta = 1.0", "privacy.delta"),
    ],
)
def test_settings_that_say_nothing_are_refused(tmp_path: Path, lines: str, wrong: str) -> None:
    file = tmp_path / "site.toml"
    text = 'name = "a"\nserver = "s:1"\n[model]\npath = "m"\n[table]\npath = "t"\n[privacy]\n'
    file.write_text(text + lines, encoding="utf-8")
    with pytest.raises(Refused, match=wrong):
        read_site(file)


def test_what_an_answer_costs(tmp_path: Path) -> None:
    steps = SampledGaussian(0.1, 1.0, 25)  # batches of 8 among 80 rows
    assert spending(tmp_path, None).costs() == {}
    assert spending(tmp_path, None, rows=80, records=RECORDS).costs() == {"records": steps}
    whole = SitePrivacy(clip=1.0, multiplier=0.25)
    assert spending(tmp_path, whole, rows=80, records=RECORDS).costs() == {"records": steps, "answers": Gaussian(4.0)}
    assert spending(tmp_path, SitePrivacy(clip=1.0)).costs() == {}, "clipping alone bounds nothing"


def test_a_site_refuses_what_goes_beyond_its_budget_over_all_runs(tmp_path: Path) -> None:
    two = epsilon_of([Gaussian(math.sqrt(50))], 1e-5)
    owner = SitePrivacy(unit="record", epsilon=two + 0.01, delta=1e-5)
    for number, run in ((1, "a" * 12), (2, "b" * 12)):
        task = spending(tmp_path, owner, number, records=RECORDS, run_hash=run)
        assert task.why_refused() is None
        task.note(f"answer {number}")
        assert task.why_refused() is None, "the same again costs nothing"
    refused = spending(tmp_path, owner, 3, records=RECORDS, run_hash="c" * 12).why_refused()
    assert refused is not None
    assert f"this site has spent epsilon {two:.3g} at delta 1e-05" in refused
    assert "[privacy] epsilon" in refused


def test_a_run_is_held_to_its_own_words(tmp_path: Path) -> None:
    one = epsilon_of([Gaussian(5.0)], 1e-5)
    promised = replace(RECORDS, budget=(one + 0.01, 1e-5))
    spending(tmp_path, None, 1, records=promised).note("one")
    refused = spending(tmp_path, None, 2, records=promised).why_refused()
    assert refused is not None
    assert "the run promises at most" in refused
    assert spending(tmp_path, None, 2, records=promised, run_hash="f" * 12).why_refused() is None, "another run"
    few = replace(RECORDS, most_answers=1)
    assert "which promises at most 1" in str(spending(tmp_path, None, 2, records=few).why_refused())


def test_another_answer_to_the_same_request_never_leaves(tmp_path: Path) -> None:
    task = spending(tmp_path, None, records=RECORDS)
    task.note("one")
    task.note("one")
    with pytest.raises(Refused, match="answered before"):
        task.note("another")
    (entry,) = read_ledger(tmp_path / SPENT)
    assert entry.about["released"] == "one"


# The worker -----------------------------------------------------------------------------------------------------------


def reply(worker: SiteWorker, asked: TaskRequest | EvaluateRequest) -> Any:
    known = {asked.task.id: asked.task} if isinstance(asked, TaskRequest) else {}
    return decode_reply(worker.answer(encode_request(asked)), 10**8, known)


@pytest.mark.slow
def test_a_deployment_s_noisy_answer_is_the_simulation_s_to_the_bit(encoder: Path, tmp_path: Path) -> None:
    terms: RunTerms = terms_of(records=RECORDS)
    trainer = replace(trainer_of(encoder, terms), records=RECORDS)
    task = task_of(FedIT(), trainer, None, 1)
    ((simulated, _),) = trainer.train([(task, ClientState())])
    site = site_at(tmp_path, encoder)
    answer = reply(simulated_worker(site), TaskRequest(terms, 1, task, 0))
    assert not isinstance(answer, Refusal)
    result: Result = answer[2]
    assert same(result.adapter, simulated.adapter)
    assert (result.tokens, {*result.metrics}) == (simulated.tokens, {"seconds_train"})
    (entry,) = read_ledger(site.folder / SPENT)
    assert entry.events == {"records": SampledGaussian(0.2, 1.0, 3)}
    (noted,) = [
        line
        for line in map(json.loads, (site.folder / "record.jsonl").read_text().splitlines())
        if line["kind"] == "noise spent"
    ]
    assert (noted["unit"], noted["clip"], noted["multiplier"]) == ("record", 1.0, 1.0)


@pytest.mark.slow
def test_a_site_that_has_spent_says_so_and_never_tells_scores(encoder: Path, tmp_path: Path) -> None:
    terms = terms_of(held_out=0.2)
    lines = '[privacy]\nunit = "record"\nclip = 1.0\nmultiplier = 1.0\nepsilon = 3.5\ndelta = 1e-5\n'
    site = site_at(tmp_path, encoder, more=lines)
    assert site_shard(site, site.examples(terms.labels), terms, b"s" * 32).held_out == ()
    task = task_of(FedIT(), trainer_of(encoder, terms), None, 1)
    worker = simulated_worker(site)
    reasons = [reply(worker, TaskRequest(terms, 1, replace(task, id=number), 0)) for number in (1, 2)]
    refused = [one.reason for one in reasons if isinstance(one, Refusal)]
    assert refused
    assert not isinstance(reasons[0], Refusal)
    assert all("this site has spent epsilon" in reason for reason in refused)
    spent = [event for entry in read_ledger(site.folder / SPENT) for event in entry.events.values()]
    assert len(spent) == 2 - len(refused)
    assert 3.0 < epsilon_of(spent, 1e-5) <= 3.5
    scored = reply(worker, EvaluateRequest(terms, 1, "ward", task.start, 0))
    assert isinstance(scored, Refusal)
    assert "tells no scores" in scored.reason
