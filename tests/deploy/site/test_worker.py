"""A site's worker: to the bit what a simulation's client gives, each task trained once, and every refusal with its reason."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedsa import FedSA
from fedloom.aggregate.scaffold import Scaffold
from fedloom.core.codec import Codec, DeltaInt8, Half
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from fedloom.core.policies import Aggregator
from fedloom.core.seeds import derive
from fedloom.core.transfer import encode_answer
from fedloom.core.types import Budget, ClientState, Result
from fedloom.core.validate_answer import why_invalid
from fedloom.deploy.messages.messages import (
    JoinRequest,
    Refusal,
    RunEnded,
    TaskRequest,
    Welcome,
    decode_reply,
    encode_request,
)
from fedloom.deploy.site.answer_journal import RUNS
from fedloom.deploy.site.worker import RUN_ENDED, SiteWorker, prepare_site
from fedloom.train.base_model import load_base
from fedloom.train.settings import LoRA, Training
from fedloom.train.tokenised import encode_texts as tokenise
from tests.support import toys
from tests.support.sites import (
    LABELS,
    SECRET,
    simulated_trainer,
    simulated_worker,
    site_at,
    task_of,
    terms_of,
    trainer_of,
)
from tests.support.storms import one_in
from tests.support.tiny_models import tiny_encoder, toy_rows
from tests.support.tiny_runs import same

LIMIT = 10**8


def asked(worker: SiteWorker, work: TaskRequest | JoinRequest) -> Any:
    tasks = {work.task.id: work.task} if isinstance(work, TaskRequest) else {}
    return decode_reply(worker.answer(encode_request(work)), LIMIT, tasks)


def result_of(worker: SiteWorker, work: TaskRequest) -> Result:
    told = asked(worker, work)
    assert not isinstance(told, Refusal), told.reason
    client, number, result = told
    assert (client, number) == ("ward", work.task.id)
    assert isinstance(result, Result)
    return result


def alike(one: Result, other: Result) -> bool:
    """To the bit, the seconds apart."""
    left, right = ({n: v for n, v in r.metrics.items() if n != "seconds_train"} for r in (one, other))
    assert (one.examples, one.tokens, one.steps, left) == (other.examples, other.tokens, other.steps, right)
    control = one.control is other.control or same(one.control, other.control)  # type: ignore[arg-type]
    return control and same(one.adapter, other.adapter)


@pytest.mark.parametrize("codec", [None, Half(), DeltaInt8()], ids=str)
@pytest.mark.parametrize("method", one_in(3, [FedIT(), FedSA(), Scaffold()]), ids=toys.called)
def test_a_worker_answers_to_the_bit_as_a_simulation_s_client(
    encoder: Path, tmp_path: Path, method: Aggregator, codec: Codec | None
) -> None:
    """Over encode and decode; two tasks and a third, so that moments, control variates, private sides and residuals matter."""
    terms = terms_of(controls=isinstance(method, Scaffold))
    trainer, worker = trainer_of(encoder, terms), simulated_worker(site_at(tmp_path, encoder))
    local, cold, given = ClientState(), None, None
    for number in (1, 2, 5):
        task = task_of(method, trainer, codec, number)
        ((trained, after),) = trainer.train([(task, local)])
        wanted, after = encode_answer(task, local, trained, after)
        given = result_of(worker, TaskRequest(terms, 1, task, {1: 0, 2: 1, 5: 2}[number]))
        assert why_invalid(task, given) is None
        assert alike(given, wanted)
        assert given.metrics["seconds_train"] > 0
        local = after
    ((trained, _),) = trainer.train([(task, ClientState())])
    cold, _ = encode_answer(task, ClientState(), trained, ClientState())
    assert given is not None
    assert not same(given.adapter, cold.adapter), "what stayed at the client mattered"


def test_a_worker_that_writes_text_answers_alike(generator: Path, tmp_path: Path) -> None:
    site = site_at(tmp_path, generator, section="instructions")
    terms, worker = terms_of(labels=None), simulated_worker(site)
    base = load_base(str(generator), None, terms.lora, terms.rank, derive(terms.seed, "model"), engine=terms.engine)
    texts = tokenise(site.examples(None), base.tokenizer, terms.training.token_limit)
    trainer = simulated_trainer(base, texts, tuple(range(40)), terms)
    task = task_of(FedIT(), trainer, Half(), 1)
    ((trained, after),) = trainer.train([(task, ClientState())])
    assert alike(
        result_of(worker, TaskRequest(terms, 1, task, 0)), encode_answer(task, ClientState(), trained, after)[0]
    )


def test_a_site_tells_its_own_log_what_is_cut(encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    terms = terms_of(training=Training(max_length=8))
    with caplog.at_level(logging.WARNING):
        ready = prepare_site(site_at(tmp_path, encoder), terms, SECRET)
    cut = sum(2 + len(row["text"].split()) > 8 for row in toy_rows(40))
    assert 0 < cut < 40
    assert max(map(len, ready.trainer.texts.ids)) == 8
    told = [record.getMessage() for record in caplog.records if "cut off" in record.getMessage()]
    assert [line.partition(":")[0] for line in told] == [f"{cut} of 40 local examples"]


def test_a_site_writes_prompts_with_the_date_of_the_terms(generator: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in generator.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{{ ['cat', 'dog'][strftime_now('%d') | int - 1] }}{% for m in messages %} {{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    site = site_at(tmp_path / "site", model, section="instructions")
    one, other = (
        prepare_site(site, terms_of(labels=None, date=f"2026-05-0{day}"), SECRET).trainer.texts for day in (1, 2)
    )
    cat, dog = tokenizer.convert_tokens_to_ids(["cat", "dog"])
    assert {ids[0] for ids in one.ids} == {cat}
    assert {ids[0] for ids in other.ids} == {dog}


def test_a_length_that_the_server_left_open_is_refused(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"training\.max_length"):
        prepare_site(site_at(tmp_path, encoder), terms_of(training=Training()), SECRET)


# Once, however often it is sent --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def works(encoder: Path) -> list[TaskRequest]:
    """Three tasks of one client, each answer accepted."""
    trainer = trainer_of(encoder, terms_of())
    tasks = [task_of(FedIT(), trainer, Half(), number) for number in (1, 2, 3)]
    return [TaskRequest(terms_of(), 1, task, settled) for settled, task in enumerate(tasks)]


def test_a_task_that_is_sent_again_gets_the_same_bytes_and_is_not_trained(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    first, second = (worker.answer(encode_request(work)) for work in works[:2])
    assert worker.answer(encode_request(replace(works[1], incarnation=4))) == second
    assert worker.answer(encode_request(works[0])) == first
    assert (worker.trained, worker.repeated) == (2, 2)
    reborn = simulated_worker(worker.site)  # as after kill -9
    assert reborn.answer(encode_request(works[1])) == second
    assert (reborn.trained, reborn.prepared) == (0, None), "not even the model is needed"


def test_what_stays_at_the_client_outlives_the_worker(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    lives = simulated_worker(site_at(tmp_path / "one", encoder))
    wanted = [result_of(lives, work) for work in works]
    site = site_at(tmp_path / "other", encoder)
    for work, result in zip(works, wanted, strict=True):
        assert alike(result_of(simulated_worker(site), work), result)


def test_what_a_task_left_behind_counts_only_if_its_answer_was_accepted(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    calm, first = simulated_worker(site_at(tmp_path / "calm", encoder)), works[0]
    result_of(calm, first)
    third = replace(works[2], last_accepted=1)
    wanted = result_of(calm, third)
    site = site_at(tmp_path / "stormy", encoder)
    result_of(simulated_worker(site), first)
    result_of(simulated_worker(site), works[1])  # rejected by the server, or lost on the way
    assert alike(result_of(simulated_worker(site), third), wanted)


def test_a_message_that_comes_late_changes_nothing(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    calm = simulated_worker(site_at(tmp_path / "calm", encoder))
    wanted = [result_of(calm, work) for work in works][-1]
    late = simulated_worker(site_at(tmp_path / "late", encoder))
    for work in (works[0], works[1], works[0], replace(works[0], last_accepted=9), works[2]):
        given = result_of(late, work)
    assert alike(given, wanted)


def test_another_task_of_the_same_number_is_another_task(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    worker, other = simulated_worker(site_at(tmp_path, encoder)), replace(works[0], task=replace(works[1].task, id=1))
    first = result_of(worker, works[0])
    assert not same(result_of(worker, other).adapter, first.adapter)
    assert alike(result_of(worker, works[0]), first)
    assert worker.trained == 3


def test_no_two_requests_are_trained_with_the_same_draws(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    """The second differs in nothing that training sees. Nor do draws repeat when a number comes back after others."""
    worker, first = simulated_worker(site_at(tmp_path, encoder)), works[0]
    probe = replace(first, task=replace(first.task, sent=first.task.sent + 1.0))
    plain, second = result_of(worker, first), result_of(worker, probe)
    assert not same(second.adapter, plain.adapter)
    assert alike(result_of(worker, probe), second)
    shutil.rmtree(tmp_path / "state" / "journal")
    reborn = simulated_worker(worker.site)
    assert alike(result_of(reborn, first), plain), "the same request draws the same"
    for number in (9, 10):
        result_of(reborn, replace(first, task=replace(first.task, id=number)))
    later = replace(first, task=replace(first.task, sent=first.task.sent + 2.0))
    assert not same(result_of(reborn, later).adapter, plain.adapter)


def test_a_damaged_journal_is_trained_again(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    first = result_of(worker, works[0])
    (file,) = (tmp_path / "state" / "journal").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert alike(result_of(worker, works[0]), first)


@pytest.mark.slow
def test_the_journal_does_not_grow(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    result_of(worker, works[0])
    for number in range(2, 12):
        refused = replace(works[1], task=replace(works[1].task, id=number, budget=Budget(4, 1)), last_accepted=1)
        result_of(worker, refused)
    kept = {int(path.stem) for path in (tmp_path / "state" / "journal").rglob("*.safetensors")}
    assert kept == {1, 8, 9, 10, 11}
    for number in range(10):
        result_of(worker, replace(works[0], terms=terms_of(run_hash=f"{number:012x}")))
    assert sum(path.is_dir() for path in (tmp_path / "state" / "journal").iterdir()) == RUNS


def test_several_runs_one_after_the_other_and_each_goes_on_where_it_was(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    alone = simulated_worker(site_at(tmp_path / "alone", encoder))
    wanted = [result_of(alone, work) for work in works[:2]]
    worker, other = simulated_worker(site_at(tmp_path, encoder)), terms_of(run="else", run_hash="f" * 12, seed=9)
    for work, result in zip(works, wanted, strict=False):
        assert alike(result_of(worker, work), result)
        result_of(worker, replace(work, terms=other))
        assert worker.prepared is not None
        assert worker.prepared.terms == other, "the other run's trainer has gone"


def test_nothing_grows_from_task_to_task(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    for work in works:
        result_of(worker, work)
    assert worker.prepared is not None
    base = worker.prepared.base
    slots, shards = len(base.model.peft_config), worker.prepared.trainer.shards
    for number in range(4, 8):
        result_of(worker, replace(works[2], task=replace(works[2].task, id=number), last_accepted=number - 1))
    assert worker.prepared.base is base
    assert (len(base.model.peft_config), worker.prepared.trainer.shards) == (slots, shards)


# Who may work, and what a site does not do ---------------------------------------------------------------------------


def test_a_welcome_says_what_the_site_has_and_allows(encoder: Path, tmp_path: Path) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder, more="[limits]\nrank = 4\nsteps = 20\ndepth = 1\n"))
    told = asked(worker, JoinRequest(terms_of(), 3))
    assert isinstance(told, Welcome)
    assert (told.incarnation, told.profile.client, told.profile.examples) == (3, "ward", 40)
    assert told.profile.most == Budget(4, 20, 1)
    assert told.profile.flops > 1e5
    assert told.profile.memory > 1e8
    again = asked(simulated_worker(worker.site), JoinRequest(terms_of(), 4))
    assert again.profile == told.profile, "the speed is measured once"


def test_a_speed_that_the_site_gives_is_not_measured(encoder: Path, tmp_path: Path) -> None:
    site = site_at(tmp_path, encoder, more="[speed]\nflops = 2e9\nmemory = 1e9\nup_bps = 1e6\n")
    profile = asked(simulated_worker(site), JoinRequest(terms_of(), 1)).profile
    assert (profile.flops, profile.memory, profile.up_bps) == (2e9, 1e9, 1e6)
    assert not (tmp_path / "state" / "speed.json").exists()


LIMITS = {
    "rank = 2": "the task has rank 4, this site allows 2",
    "steps = 2": "the task has 3 steps, this site allows 2",
    "depth = 1": "the task trains all layers, this site allows 1",
    'runs = ["mrpc-*", "qqp"]': "takes part in runs named mrpc-* or qqp, not in 'toy'",
    'hours = "20:00-06:00"': "works at 20:00-06:00, and it is 13:30 there",
    "megabytes = 0.001": "above the limit of 1000",
}


@pytest.mark.parametrize(("limit", "reason"), LIMITS.items(), ids=str)
def test_a_limit_is_kept_and_the_reason_told(
    encoder: Path, tmp_path: Path, works: list[TaskRequest], limit: str, reason: str
) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder, more=f"[limits]\n{limit}\n"), hour=lambda: 13.5)
    told = asked(worker, works[0])
    assert isinstance(told, Refusal)
    assert (told.client, told.lasting) == ("ward", True)
    assert told.task == (None if "megabytes" in limit else 1)
    assert reason in told.reason
    assert (worker.trained, worker.refused, worker.prepared) == (0, 1, None)


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"model": "another/encoder"}, "the run trains 'another/encoder', this site has '/at/the/server/tiny'"),
        (
            {"labels": ("cat", "dog")},
            r"table.label: the data of this site do not fit the run; its owner finds the reason in the worker's log",
        ),
        ({"labels": None}, "the run writes text, the data of this site have labels"),
        ({"rank": 4000}, "no layer of the model is that large"),
        ({"lora": LoRA(("rotary",))}, "name linear layers of Bert"),
    ],
)
def test_a_run_that_the_site_is_not_fit_for_is_refused_with_the_reason(
    encoder: Path, tmp_path: Path, terms: dict[str, Any], reason: str
) -> None:
    told = asked(simulated_worker(site_at(tmp_path, encoder)), JoinRequest(terms_of(**terms), 1))
    assert isinstance(told, Refusal)
    assert re.search(reason, told.reason)
    assert told.lasting


@pytest.mark.slow
def test_a_checkpoint_is_asked_the_same_questions_at_a_site(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = BertForSequenceClassification.from_pretrained(encoder, id2label={0: "pet", 1: "colour"})
    shutil.copytree(encoder, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    site = site_at(tmp_path / "site", tmp_path / "model")
    told = asked(simulated_worker(site), JoinRequest(terms_of(labels=LABELS), 1))
    assert isinstance(told, Refusal)
    assert "numbers the labels as pet, colour, the run as colour, pet" in told.reason
    ready = prepare_site(site, terms_of(labels=("pet", "colour")), SECRET)
    assert torch.equal(ready.first.dense["classifier.weight"], model.classifier.weight.detach())
    model.get_parameter("bert.pooler.dense.weight").data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    told = asked(simulated_worker(site), JoinRequest(terms_of(labels=("pet", "colour")), 1))
    assert isinstance(told, Refusal)
    assert "not all of its weights are finite numbers: bert.pooler.dense.weight" in told.reason
    assert told.reason in caplog.text


def test_a_task_of_another_base_or_another_client_is_refused(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    task = works[0].task
    name, factor = next(iter(task.start.train.factors.items()))
    for factors, reason in (
        ({f"{name}x": factor}, "the copy here has no such layer"),
        ({name: Factor(factor.down[:, :-1], factor.up)}, "it is another model"),
    ):
        start = replace(task.start, train=Adapter(factors, task.start.train.dense))
        told = asked(worker, replace(works[0], task=replace(task, start=start)))
        assert isinstance(told, Refusal)
        assert reason in told.reason
    told = asked(worker, replace(works[0], task=replace(task, client="clinic")))
    assert told.reason == "this site is 'ward', the task is for 'clinic'"


def test_a_model_with_other_weights_is_refused(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    other = tiny_encoder(tmp_path / "other", initializer_range=0.3)
    right, wrong = (load_base(str(path), 2, terms_of().lora, 4, 3).fingerprint() for path in (encoder, other))
    assert right != wrong
    worker = simulated_worker(site_at(tmp_path / "site", encoder))
    assert isinstance(asked(worker, JoinRequest(terms_of(weights=right), 1)), Welcome)
    told = asked(worker, replace(works[0], terms=terms_of(weights=wrong)))
    assert isinstance(told, Refusal)
    assert "its weights are not those of the run's '/at/the/server/tiny'" in told.reason


def test_trouble_in_training_is_told_and_the_next_task_is_done(
    encoder: Path, tmp_path: Path, works: list[TaskRequest]
) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    result_of(worker, works[0])
    assert worker.prepared is not None
    worker.prepared.base.model.to("meta")  # as good as no memory left
    told = asked(worker, works[1])
    assert (told.task, told.lasting) == (2, False)
    assert result_of(worker, works[1]).steps == 3


def test_whatever_comes_is_answered_with_a_refusal(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    worker, good, draw = simulated_worker(site_at(tmp_path, encoder)), encode_request(works[0]), random.Random(3)
    for _ in range(200):
        cut = good[: draw.randrange(len(good))]
        told = decode_reply(worker.answer(draw.choice((cut, draw.randbytes(draw.randrange(300))))), LIMIT, {})
        assert isinstance(told, Refusal)
        assert told.reason.startswith("not a valid message: ")


def test_the_status_says_what_is_going_on(encoder: Path, tmp_path: Path, works: list[TaskRequest]) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder))
    result_of(worker, works[0])
    told = json.loads(worker.status())
    assert told == {"name": "ward", "pid": os.getpid(), "doing": "nothing", "run": "toy"} | {
        "trained": 1, "repeated": 0, "refused": 0,
    }  # fmt: skip


def test_the_end_of_a_run_is_noted_whatever_the_site_allows(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is loaded for it, and no limit stands against it: a site that may do nothing can stop waiting too."""
    worker = SiteWorker(site_at(tmp_path, encoder, more='[limits]\nruns = ["other"]\n'))
    with caplog.at_level("INFO", "fedloom.worker"):
        reply = worker.answer(encode_request(RunEnded(terms_of(), 1, "9 versions\nmade")))
    assert b"Acknowledged" in reply
    assert worker.prepared is None
    [record] = [one for one in caplog.records if getattr(one, "event", "") == RUN_ENDED]
    assert "run toy has ended: 9 versions made; 0 tasks trained" in record.getMessage()
    last = json.loads((tmp_path / "state" / "record.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["run"], last["reason"]) == ("run ended", "toy", "9 versions made")
    assert worker.refused == 0
