"""What a site protects and spends: the stricter of two wishes, a budget that holds over runs, and a ledger before each answer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedloom.aggregate.fedit import FedIT
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from fedloom.core.types import Budget, ClientState, Result, Task, TaskStart
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    Refusal,
    RunTerms,
    TaskRequest,
    decode_reply,
    encode_request,
)
from fedloom.deploy.site.settings import read_site, site_shard, why_refused
from fedloom.deploy.site.site_privacy import SPENT, SitePrivacy, TaskSpending, noise_in_training, stored_run
from fedloom.deploy.site.worker import SiteWorker
from fedloom.privacy.accounting import Gaussian, SampledGaussian, epsilon_of
from fedloom.privacy.ledger import read_ledger
from fedloom.privacy.private import Private
from tests.support.sites import HASH, simulated_worker, site_at, task_of, terms_of, trainer_of
from tests.support.tiny_runs import same

RECORDS = Private(clip=1.0, multiplier=1.0, most_answers=3, unit="record")
LAYER = Adapter({"a": Factor(torch.ones(2, 3), torch.ones(4, 2))})
OWNER = SitePrivacy(unit="record", clip=2.0, multiplier=0.5)


def request(number: int = 1, **terms: Any) -> TaskRequest:
    task = Task(number, "ward", 0, TaskStart(Adapter({}), "0"), Budget(4, 25), 0.0)
    return TaskRequest(terms_of(**terms), 1, task, 0)


def spending(folder: Path, privacy: SitePrivacy | None, number: int = 1, rows: int = 8, **terms: Any) -> TaskSpending:
    """Of a site whose rows, unless they are many, are all in each batch: its epsilon has a closed form, which is quick."""
    return TaskSpending(folder, privacy, request(number, **terms), f"{number}{terms.get('run_hash', HASH)}", rows)


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


@pytest.mark.parametrize(
    ("lines", "asked", "told"),
    [
        ("", None, True),
        ("clip = 1.0", None, True),
        ("clip = 1.0\nmultiplier = 0.1", None, False),
        ("", RECORDS, False),
        ('unit = "record"\nclip = 1.0\nmultiplier = 0.1', None, False),
    ],
)
def test_no_exact_score_leaves_beside_noise(tmp_path: Path, lines: str, asked: Private | None, told: bool) -> None:
    site = site_at(tmp_path, tmp_path / "tiny", more=f"[privacy]\n{lines}\n" if lines else "")
    terms = terms_of(records=asked, held_out=0.5)
    reason = why_refused(site, EvaluateRequest(terms, 1, "ward", TaskStart(LAYER, "0"), 0), 12.0)
    assert reason is None if told else "tells no scores" in str(reason)
    assert bool(site_shard(site, site.examples(terms.labels), terms, b"s" * 32).held_out) == told


def test_answers_under_another_clip_or_noise_are_stored_apart() -> None:
    whole = SitePrivacy(clip=1.0)
    louder = whole.model_copy(update={"multiplier": 1.0})
    cases = [(None, RECORDS), (OWNER, None), (OWNER, replace(RECORDS, clip=3.0)), (whole, None), (louder, None)]
    names = [stored_run("a" * 12, *case) for case in [*cases, (louder, RECORDS)]]
    assert stored_run("a" * 12, None, None) == "a" * 12
    assert len({"a" * 12, *names}) == 1 + len(names)
    limited = louder.model_copy(update={"epsilon": 3.0, "delta": 1e-5})
    assert stored_run("a" * 12, limited, None) == names[4], "a budget changes no answer"


def test_a_ledger_that_was_lost_or_is_older_than_the_record_is_noticed(tmp_path: Path) -> None:
    older = b""
    for number in (1, 2):
        spending(tmp_path, None, number, records=RECORDS).note("one")
        older = older or (tmp_path / SPENT).read_bytes()
    recorded = {"1" + HASH, "2" + HASH}
    third = replace(spending(tmp_path, None, 3, records=RECORDS), recorded=recorded)
    second = replace(spending(tmp_path, None, 2, records=RECORDS), recorded=recorded)
    assert third.why_refused() is None
    (tmp_path / SPENT).write_bytes(older)
    assert "lacks 1 answers" in str(third.why_refused())
    assert "lacks 1 answers" in str(second.why_refused()), "the same again: it would seem to be the first"
    (tmp_path / SPENT).unlink()
    assert "lacks 2 answers" in str(third.why_refused())


def test_coins_are_new_where_the_record_does_not_know_the_task_but_the_ledger_does(tmp_path: Path) -> None:
    def first(number: int, digest: str, **terms: Any) -> bool:
        return replace(spending(tmp_path, None, number, records=RECORDS, **terms), digest=digest).is_first()

    assert first(2, "x")
    replace(spending(tmp_path, None, 2, records=RECORDS), digest="x").note("one")
    assert first(2, "x"), "the same task: to the byte what it was"
    assert not first(2, "y")
    assert not first(1, "y"), "a number lower than one that was used, as the record has it"
    assert first(3, "y")
    assert first(2, "y", run_hash="b" * 12), "another run has other coins anyway"


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
def test_a_moved_record_or_a_lost_ledger_opens_nothing(encoder: Path, tmp_path: Path) -> None:
    terms: RunTerms = terms_of(records=RECORDS)
    first = task_of(FedIT(), trainer_of(encoder, terms), None, 1)
    site = site_at(tmp_path, encoder)
    record, ledger = site.folder / "record.jsonl", site.folder / SPENT
    asked, other = TaskRequest(terms, 1, first, 0), TaskRequest(terms, 1, replace(first, version=7), 0)
    worker = simulated_worker(site)
    assert not isinstance(reply(worker, asked), Refusal)
    used = worker.prepared
    kept = ledger.read_bytes()
    ledger.unlink()
    missing = reply(worker, replace(asked, task=replace(first, id=2)))
    assert isinstance(missing, Refusal)
    assert "lacks 1 answers" in missing.reason
    ledger.write_bytes(kept)
    record.rename(tmp_path / "record.old")
    worker = simulated_worker(site)
    sent = reply(worker, other)
    assert not isinstance(sent, Refusal)
    assert used is not None
    ((alike, _),) = used.trainer.train([(other.task, ClientState())])
    assert not same(sent[2].adapter, alike.adapter), (
        "the coins of the first answer would tell the two apart, row by row"
    )
    assert len([*read_ledger(ledger)]) == 2


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
