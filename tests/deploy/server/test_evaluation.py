"""The exam: what a site holds out stays the same, is never trained on, and is scored as in a simulation; only counts leave it."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.fedsa import FedSA
from fedloom.core.codec import Codec, Half
from fedloom.core.lora import Adapter
from fedloom.core.policies import Aggregator
from fedloom.core.schema import Malformed
from fedloom.core.seeds import derive, simulated_secret
from fedloom.core.transfer import encode_answer
from fedloom.core.types import ClientState
from fedloom.data.partition import hold_out
from fedloom.deploy.messages.messages import (
    EvaluateRequest,
    EvaluateResult,
    JoinRequest,
    Refusal,
    TaskRequest,
    decode_evaluation,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from fedloom.deploy.site.worker import SiteWorker
from fedloom.train.base_model import load_base
from fedloom.train.evaluate import AnswerScores, Scores, score
from fedloom.train.objective import personal_adapter
from tests.support.sites import SECRET, accepting, labelled, simulated_worker, site_at, task_of, terms_of, trainer_of
from tests.support.tiny_models import toy_rows

LIMIT = 10**8
HELD = {"held_out": 0.25}
SHARDS = hold_out({"ward": tuple(range(40))}, labelled(toy_rows(40)), 0.25, partial(simulated_secret, 3))


def exam_of(
    method: Aggregator, encoder: Path, codec: Codec | None = None, last_accepted: int = 0, **more: Any
) -> EvaluateRequest:
    terms = terms_of(**(HELD | more))
    start = task_of(method, trainer_of(encoder, terms_of()), codec, 1).start
    return EvaluateRequest(terms, 1, "ward", start, last_accepted)


def marks_of(worker: SiteWorker, exam: EvaluateRequest) -> EvaluateResult | Refusal:
    return decode_evaluation(worker.answer(encode_request(exam)), LIMIT, exam)


def test_an_exam_and_its_marks_arrive(encoder: Path) -> None:
    exam = exam_of(FedIT(), encoder, Half())
    data = encode_request(exam)
    back = decode_request(data, LIMIT)
    assert isinstance(back, EvaluateRequest)
    assert encode_request(back) == data
    marks = EvaluateResult("ward", 10, 10, 7, 3.5, 5)
    assert decode_evaluation(encode_reply(marks), LIMIT, exam) == marks
    with pytest.raises(Malformed):
        decode_reply(encode_reply(marks), LIMIT, {})  # no answer to a task
    assert {field.type for field in fields(EvaluateResult)} == {"ClientId", "int", "float | None"}, "counts and sums"


WRONG = [
    {"client": "clinic"}, {"client": ""}, {"examples": 0}, {"examples": -1}, {"predictions": 11}, {"predictions": 0}, {"correct": 11},
    {"correct": -1}, {"base_correct": 11}, {"base_correct": -1}, {"loss": -0.1}, {"loss": float("nan")}, {"loss": float("inf")},
    {"base_loss": 1.0}, {"correct": 7.0}, {"correct": True}, {"correct": "7"}, {"loss": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_marks_that_cannot_be_are_refused(encoder: Path, wrong: dict[str, Any]) -> None:
    exam, good = exam_of(FedIT(), encoder), EvaluateResult("ward", 10, 10, 7, 3.5, 5)
    with pytest.raises(Malformed):
        decode_evaluation(encode_reply(replace(good, **wrong)), LIMIT, exam)
    data = encode_reply(good)
    for length in range(0, len(data), 5):
        with pytest.raises(Malformed):
            decode_evaluation(data[:length], LIMIT, exam)
    with pytest.raises(Malformed, match="above the limit"):
        decode_evaluation(data, len(data) - 1, exam)


@pytest.mark.parametrize(
    ("field", "value"),
    [("client", ""), ("last_accepted", -1), ("incarnation", -1), ("seconds", 0.0), ("seconds", 1e10)],
)
def test_an_exam_out_of_its_range_is_refused(encoder: Path, field: str, value: Any) -> None:
    exam = exam_of(FedIT(), encoder)
    with pytest.raises(Malformed, match=field):
        decode_request(encode_request(replace(exam, **{field: value})), LIMIT)
    with pytest.raises(Malformed, match="nothing to train"):
        decode_request(encode_request(replace(exam, start=replace(exam.start, train=Adapter({}, {})))), LIMIT)


@pytest.mark.parametrize("method", [FedIT(), FedSA()], ids=lambda method: type(method).__name__)
def test_a_site_is_scored_as_a_simulation_s_client(encoder: Path, tmp_path: Path, method: Aggregator) -> None:
    """After a task that was accepted, so that private sides matter (FedSA); of another start of the worker."""
    (shard,), site = SHARDS, site_at(tmp_path, encoder)
    trainer = trainer_of(encoder, terms_of())
    trainer = replace(trainer, shards={"ward": tuple(40 + i for i in shard.train)})
    task = task_of(method, trainer, None, 1)
    ((trained, local),) = trainer.train([(task, ClientState())])
    local = encode_answer(task, ClientState(), trained, local)[1]
    given = decode_reply(
        simulated_worker(site).answer(encode_request(TaskRequest(terms_of(**HELD), 1, task, 0))), LIMIT, {1: task}
    )
    assert isinstance(given, tuple)
    assert (given[2].examples, given[2].tokens) == (len(shard.train), trained.tokens)
    exam = exam_of(method, encoder, last_accepted=1)
    texts, held_out = trainer.texts, [40 + i for i in shard.held_out]
    wanted = score(trainer.base, personal_adapter(exam.start, local), texts, held_out, exam.start.fold)
    assert isinstance(wanted, Scores)
    marks = marks_of(simulated_worker(site), exam)
    assert isinstance(marks, EvaluateResult)
    right = int((wanted.predicted == wanted.labels).sum())
    assert (marks.examples, marks.predictions, marks.correct) == (len(held_out), len(held_out), right)
    assert marks.loss == pytest.approx(float(wanted.losses.double().sum()))
    own = [texts.labels[40 + i] for i in shard.train]
    commonest = max(sorted(set(own)), key=own.count)
    assert marks.base_correct == sum(texts.labels[i] == commonest for i in held_out)
    without = marks_of(simulated_worker(site), replace(exam, last_accepted=0))
    assert isinstance(without, EvaluateResult)
    assert (without.loss != marks.loss) == isinstance(method, FedSA)


def test_what_is_held_out_is_the_same_at_every_start_and_is_never_trained_on(encoder: Path, tmp_path: Path) -> None:
    site = site_at(tmp_path, encoder)
    for _ in range(2):
        worker = simulated_worker(site)
        worker.answer(encode_request(JoinRequest(terms_of(**HELD), 1)))
        assert worker.prepared is not None
        assert (worker.prepared.shard,) == SHARDS
        (trained,) = worker.prepared.trainer.shards.values()
        assert not set(trained) & set(worker.prepared.shard.held_out)
        assert len(trained) + len(SHARDS[0].held_out) == 40


def test_which_rows_are_held_out_is_not_for_a_server_to_choose(encoder: Path, tmp_path: Path) -> None:
    """Neither by the run's seed, hash or name; a site with another secret holds out others."""
    found = []
    for number, secret in enumerate((SECRET, SECRET, None)):
        worker = accepting(SiteWorker(site_at(tmp_path / str(number), encoder), secret=secret))
        told = {"seed": 4, "run_hash": "e" * 12, "run": "other"} if number else {}
        worker.answer(encode_request(JoinRequest(terms_of(**HELD, **told), 1)))
        assert worker.prepared is not None
        found.append(worker.prepared.shard)
    assert found[0] == found[1] == SHARDS[0]
    assert found[2] != SHARDS[0]


def test_an_exam_changes_nothing_for_the_tasks_after_it(encoder: Path, tmp_path: Path) -> None:
    task = task_of(FedIT(), trainer_of(encoder, terms_of()), None, 1)
    work = encode_request(TaskRequest(terms_of(**HELD), 1, task, 0))
    calm, asked = (
        simulated_worker(site_at(tmp_path / "calm", encoder)),
        simulated_worker(site_at(tmp_path / "asked", encoder)),
    )
    first = marks_of(asked, exam_of(FedIT(), encoder))
    _, _, wanted = decode_reply(calm.answer(work), LIMIT, {1: task})  # type: ignore[misc]
    _, _, given = decode_reply(asked.answer(work), LIMIT, {1: task})  # type: ignore[misc]
    assert all(given.adapter.factors[n].up.equal(f.up) for n, f in wanted.adapter.factors.items())
    assert marks_of(asked, exam_of(FedIT(), encoder)) == first


def test_a_site_may_decline_and_trains_on_all_it_has(encoder: Path, tmp_path: Path) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder, more="[limits]\nscores = false\n"))
    told = marks_of(worker, exam_of(FedIT(), encoder))
    assert isinstance(told, Refusal)
    assert told.reason == "this site tells no scores (limits.scores)"
    welcome = decode_reply(worker.answer(encode_request(JoinRequest(terms_of(**HELD), 1))), LIMIT, {})
    assert welcome.profile.examples == 40  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "limit", "reason"),
    [({"client": "clinic"}, "", "the task is for 'clinic'"), ({}, "rank = 2", "this site allows 2"),
     ({}, 'runs = ["mrpc"]', "takes part in runs named mrpc"), ({"terms": terms_of()}, "", "holds no example out")],
)  # fmt: skip
def test_an_exam_that_is_not_for_the_site_is_refused(
    encoder: Path, tmp_path: Path, more: dict[str, Any], limit: str, reason: str
) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder, more=f"[limits]\n{limit}\n"))
    told = decode_reply(worker.answer(encode_request(replace(exam_of(FedIT(), encoder), **more))), LIMIT, {})
    assert isinstance(told, Refusal)
    assert reason in told.reason


def test_a_single_example_is_trained_on(encoder: Path, tmp_path: Path) -> None:
    worker = simulated_worker(site_at(tmp_path, encoder, toy_rows(1)))
    told = decode_reply(worker.answer(encode_request(JoinRequest(terms_of(**HELD), 1))), LIMIT, {})
    assert told.profile.examples == 1  # type: ignore[union-attr]


def test_a_site_that_writes_is_scored_beside_the_base(generator: Path, tmp_path: Path) -> None:
    site = site_at(tmp_path, generator, section="instructions")
    terms = terms_of(labels=None, **HELD)
    base = load_base(str(generator), None, terms.lora, terms.rank, derive(terms.seed, "model"), engine=terms.engine)
    worker = simulated_worker(site)
    worker.answer(encode_request(JoinRequest(terms, 1)))
    assert worker.prepared is not None
    trainer = replace(worker.prepared.trainer, base=base)
    exam = EvaluateRequest(terms, 1, "ward", task_of(FedIT(), trainer, Half(), 1).start, 0)
    marks = marks_of(worker, exam)
    assert isinstance(marks, EvaluateResult)
    (held_out,) = ([*shard.held_out] for shard in [worker.prepared.shard])
    after, before = (score(base, one, trainer.texts, held_out) for one in (exam.start.train, None))
    for found, right, loss in ((after, marks.correct, marks.loss), (before, marks.base_correct, marks.base_loss)):
        assert isinstance(found, AnswerScores)
        assert (marks.examples, marks.predictions) == (len(held_out), int(found.tokens.sum()))
        assert right == int(found.hits.sum())
        assert loss == pytest.approx(float(found.losses.double().sum()))
    assert marks.loss != marks.base_loss
