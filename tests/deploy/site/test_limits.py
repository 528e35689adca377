"""Limits of a site: everything that a server may vary is judged, and a refusal prints the line that allows what it refuses."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedloom.core.codec import Summed
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.types import Budget, Pruning, Rules, Task, TaskStart
from fedloom.deploy.messages.messages import EvaluateRequest, JoinRequest, Request, RunTerms, TaskRequest
from fedloom.deploy.site.limits import (
    LOOSEST,
    SiteLimits,
    answer_steps,
    beyond_terms,
    needed_rows,
    refusals,
    region_limits,
    requested,
    require_allowed,
    task_epochs,
    task_rows,
    used,
)
from fedloom.deploy.site.request_record import SiteUsage
from fedloom.privacy.private import Private
from fedloom.train.settings import PLAIN, Engine, LoRA, Training, cosine
from tests.support.sites import terms_of
from tests.support.storms import tries

ROWS = 1000
PAIR = Factor(torch.ones(2, 8), torch.full((8, 2), 0.01))
ADAPTER = Adapter({"layer.0.query": PAIR}, {"head": torch.full((2, 8), 0.1)})
TERMS = replace(
    terms_of(training=Training(max_length=64, clip=1.0, learning_rate=5e-4), weights="0" * 12), steps=20, held_out=0.2
)
TASK = Task(1, "ward", 0, TaskStart(ADAPTER, "0"), Budget(2, 10), 0.0)
WORK, EXAM = TaskRequest(TERMS, 1, TASK, 0), EvaluateRequest(TERMS, 1, "ward", TASK.start, 0)

JUDGED: Mapping[type, Mapping[str, Any]] = {
    RunTerms: {
        "steps": 1, "threads": 1000, "held_out": 0.9, "evaluations": 2, "folds": True, "controls": True,
        "labels": tuple(map(str, range(2000))), "records": Private(1e-16, 1e-9, 10, unit="record"),
    },
    Training: {
        "learning_rate": 1e8, "batch_size": 1, "max_length": 10**9, "weight_decay": 10.0, "clip": 1e-16, "proximal": 1e6,
    },
    LoRA: {"scaling": 1e-9, "dropout": 0.99, "target_modules": ("key",)},
    Engine: {"cache": 10**15},
    Task: {},
    Budget: {"rank": 16, "steps": 1, "depth": 30, "rate": RateByRank(2.0, 8)},
    TaskStart: {"train": Adapter({"layer.0.query": Factor(PAIR.down, 1e-9 * PAIR.up)}), "scaling": 1e9, "fold": ADAPTER,
                "control": ADAPTER},
    Rules: {"up_rate": 1e6, "pruning": Pruning(1e9)},
    Pruning: {"strength": 1e9},
}  # fmt: skip
"""By class, a value of each field that is judged, which the limits of `STRICT` refuse."""
HARMLESS: Mapping[type, Mapping[str, str]] = {
    RunTerms: {
        "run": "a name; limits.runs says which", "run_hash": "a name; the document's hash covers it",
        "model": "must be the name of the site's own copy", "rank": "each task is judged", "depth": "each task is judged",
        "lora": "judged by field", "training": "judged by field", "engine": "judged by field",
        "seed": "draws what the server could send: the first adapter, frozen sides; the site's draws have its own secret",
        "weights": "must be those of the site's own copy", "first_adapter": "saves bytes where it agrees",
        "date": "a date in a prompt, checked", "versions": "shown; passes over the rows are counted",
        "privacy": "shown, and said to be a promise",
        "least_sum": "a sum hides more than none; that it is over too few sites is refused, see below",
        "sum_threshold": "shown; more than half in any case", "rates": "each task is judged; shown",
    },
    Training: {
        "warmup": "lowers the learning rate of some steps", "decay": "one of three, which lower the learning rate",
        "bucket": "which rows share a batch follows from the site's secret", "stratified": "as bucket",
        "keep_moments": "moments stay at the site; what they do to later steps is said in docs/site.md",
        "base_dropout": "shown; a model may have none in any case",
    },
    LoRA: {},
    Engine: {
        "kernel": "one of three, the same product", "first_token": "the same result", "together": "a site has one client",
        "bfloat16": "rounds the site's own copy", "checkpointing": "the same gradients", "four_bit": "as bfloat16",
        "answer_tokens": "the same gradients",
        "byte_dropout": "the site's own secret decides what is dropped, either way",
        "cache_dir": "refused in any terms: no server names a folder of a site", "cache_dir_bytes": "of no folder",
    },
    Task: {
        "id": "a number", "client": "must be the site", "version": "a number", "start": "judged by field",
        "budget": "judged by field", "sent": "a time",
    },
    Budget: {"rounds": "of a region; a site does its steps once", "why": "words for the report"},
    TaskStart: {
        "basis": "a name; decides whether moments are kept", "directions": "within the rank of the terms",
        "seeded": "saves bytes", "rules": "judged by field", "codec": "how numbers are packed: fewer bits, never more",
    },
    Rules: {
        "frozen": "less is trained and sent", "private": "less is sent",
        "select": "less is trained and sent; the steps that choose count as none",
    },
    Pruning: {"keep": "how much of the rank is penalised", "least": "directions that are kept"},
}  # fmt: skip
"""By class, the fields that no limit judges, each with the reason."""
STRICT = SiteLimits(depth=2, layers=("query",))


def with_field(request: TaskRequest, kind: type, name: str, value: Any) -> TaskRequest:
    """The same request with another value of one field of one of the classes in it."""
    changed = {name: value}
    terms, task = request.terms, request.task
    if kind is RunTerms:
        return replace(request, terms=replace(terms, **changed))
    if kind in (Training, LoRA, Engine):
        part = {Training: "training", LoRA: "lora", Engine: "engine"}[kind]
        return replace(request, terms=replace(terms, **{part: replace(getattr(terms, part), **changed)}))
    if kind is Budget:
        return replace(request, task=replace(task, budget=replace(task.budget, **changed)))
    rules = task.start.rules
    if kind is Pruning:
        changed, kind = {"pruning": replace(Pruning(), **changed)}, Rules
    if kind is Rules:
        changed = {"rules": replace(rules, **changed)}
    return replace(request, task=replace(task, start=replace(task.start, **changed)))


def reasons(limits: SiteLimits, request: Request, rows: int = ROWS) -> list[str]:
    held_out = round(rows * request.terms.held_out)
    asked = [*requested(request), *needed_rows(request, rows, held_out), *used(request, SiteUsage(), rows, held_out)]
    return [*refusals(limits, asked)]


def allowing(limits: SiteLimits, reason: str) -> SiteLimits:
    """The same limits with the line that a refusal prints."""
    [line] = re.findall(r"\[limits\] (.*)\)$", reason)
    return SiteLimits.model_validate(limits.model_dump() | tomllib.loads(line))


def test_every_field_is_judged_or_harmless_with_a_reason() -> None:
    for kind in JUDGED:
        names = {one.name for one in fields(kind)}
        assert names == JUDGED[kind].keys() | HARMLESS[kind].keys(), kind
        assert not JUDGED[kind].keys() & HARMLESS[kind].keys()
    inside = {type(value) for value in _values(WORK) if is_dataclass(value)}
    unjudged = {JoinRequest, TaskRequest, Adapter, Factor}
    assert inside - unjudged <= JUDGED.keys(), "a part of a request that nobody judges"


def _values(value: Any) -> Iterator[Any]:
    yield value
    if is_dataclass(value):
        for one in fields(value):
            yield from _values(getattr(value, one.name))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in JUDGED for name in JUDGED[kind]])
def test_each_judged_field_is_refused_with_the_line_that_allows_it(kind: type, name: str) -> None:
    assert not reasons(STRICT, with_field(WORK, Budget, "depth", 1))
    request = with_field(with_field(WORK, Budget, "depth", 1), kind, name, JUDGED[kind][name])
    limits, first = STRICT, reasons(STRICT, request)
    assert first, "no limit judges it"
    for _ in range(10):
        if not (refused := reasons(limits, request)):
            break
        limits = allowing(limits, refused[0])
        assert refused[0] not in reasons(limits, request)
    assert not reasons(limits, request)


def test_the_terms_are_judged_with_the_request_to_join() -> None:
    for kind in (RunTerms, Training, LoRA, Engine):
        for name, value in JUDGED[kind].items():
            terms = with_field(WORK, kind, name, value).terms
            assert [*refusals(STRICT, requested(JoinRequest(terms, 1)))], f"{name}: refused before anything is loaded"


@tries(200)
@given(st.data())
def test_what_a_refusal_prints_allows_it(data: st.DataObject) -> None:
    """Whatever is asked: line by line, the site comes to allow it, and asks for nothing that is no setting."""
    numbers = st.floats(1e-12, 1e12)
    training = Training(
        learning_rate=data.draw(numbers), batch_size=data.draw(st.integers(1, 10**6)), clip=data.draw(numbers),
        max_length=data.draw(st.integers(4, 10**6)), weight_decay=data.draw(numbers), proximal=data.draw(numbers),
        decay=cosine,
    )  # fmt: skip
    lora = LoRA(("query", "value"), data.draw(numbers), data.draw(st.floats(0, 0.99)))
    steps = data.draw(st.integers(1, 10**6))
    terms = replace(TERMS, training=training, lora=lora, steps=steps, threads=data.draw(st.integers(1, 1024)))
    budget = Budget(data.draw(st.integers(1, 2**20)), steps, data.draw(st.none() | st.integers(1, 50)))
    start = replace(TASK.start, rules=Rules(up_rate=data.draw(st.floats(1e-9, 1e6))), scaling=data.draw(numbers))
    request = TaskRequest(terms, 1, replace(TASK, budget=budget, start=start), 0)
    limits, rows = SiteLimits(depth=None), data.draw(st.integers(1, 10**6))
    for _ in range(60):
        if not (refused := reasons(limits, request, rows)):
            break
        limits = allowing(limits, refused[0])
    assert not refused


@tries(200)
@given(st.integers(1, 10**6), st.integers(1, 10**4), st.floats(0.01, 100))
def test_the_largest_budget_is_one_that_is_allowed(rows: int, batch: int, epochs: float) -> None:
    limits = SiteLimits(epochs=epochs, batch=10**6)
    most = limits.most(rows, batch)
    request = replace(WORK, terms=replace(TERMS, training=replace(TERMS.training, batch_size=batch)))
    request = replace(request, task=replace(TASK, budget=Budget(2, most.steps)))
    assert most.steps == 1 or task_epochs(request, rows) <= epochs + 1e-3
    assert limits.most() == Budget(8, 10_000, None)


def test_rows_are_those_that_are_trained_on_or_scored() -> None:
    few = [*refusals(SiteLimits(), needed_rows(WORK, 99, 500))]
    assert few[0] == (
        "this site would train on 99 rows, this site allows at least 100 (its owner can allow it: [limits] least_rows = 99)"
    )
    assert not [*refusals(SiteLimits(), needed_rows(WORK, 1000, 0))]
    assert "an evaluation would have 49 rows" in next(iter(refusals(SiteLimits(), needed_rows(EXAM, 1000, 49))))
    assert not [*refusals(SiteLimits(), needed_rows(EXAM, 1, 50))]


def with_steps(steps: int, batch: int = 16) -> TaskRequest:
    terms = replace(TERMS, training=replace(TERMS.training, batch_size=batch))
    return replace(WORK, terms=terms, task=replace(TASK, budget=Budget(2, steps)))


@tries(200)
@given(st.integers(100, 10**4), st.integers(8, 256))
def test_a_task_must_use_as_many_rows_as_a_site_must_have_and_a_whole_pass_does(rows: int, batch: int) -> None:
    """However many rows the site has, an answer tells of those that were trained on."""
    whole = with_steps(SiteLimits().most(rows, batch).steps, min(batch, rows))
    assert not [one for one in refusals(SiteLimits(), needed_rows(whole, rows, 0)) if "least_rows" in one]
    short = with_steps(99 // batch or 1, batch)
    if (99 // batch or 1) * batch < 100 and rows >= 100 + batch:
        assert "least_rows" in next(iter(refusals(SiteLimits(), needed_rows(short, rows, 0))))


def test_steps_that_choose_directions_train_nothing_that_is_sent() -> None:
    """Else a task of two steps would be the single one that `least_steps` keeps off, on half the rows."""
    for steps, select, trained in ((2, 1, 1), (2, 2, 2), (2, None, 2), (10, 1, 8)):
        start = replace(TASK.start, rules=Rules(select=select))
        task = replace(TASK, start=start, budget=Budget(2, steps))
        assert answer_steps(task) == trained
        found = [*refusals(SiteLimits(), requested(replace(WORK, task=task)))]
        assert any("least_steps" in one for one in found) == (trained < 2)
        assert task_rows(replace(WORK, task=task), ROWS) == trained * TERMS.training.batch_size


def test_the_rate_of_up_has_both_limits() -> None:
    for rate, limit in ((1e6, "learning_rate = "), (1e-9, "least_learning_rate = ")):
        [refused] = refusals(SiteLimits(), requested(with_field(WORK, Rules, "up_rate", rate)))
        assert f"[limits] {limit}" in refused


def test_the_rate_of_a_small_rank_has_both_limits() -> None:
    """Where rank 8 has a rate of 5e-4, rank 2 has 1e-3, which the default allows, and 2e-3 at power 1, which it does not."""
    for power, sides in ((0.5, 0), (1.0, 2)):
        found = [*refusals(SiteLimits(), requested(with_field(WORK, Budget, "rate", RateByRank(power, 8))))]
        assert len(found) == sides
        assert all("learning rate of 0.002 for" in one for one in found)


def test_what_was_done_counts() -> None:
    limits = SiteLimits(tasks_a_day=3, total_epochs=1.0, megabytes_a_day=1)
    assert not [*refusals(limits, used(WORK, SiteUsage(2, 10, 0.5, 7), ROWS, 100))]
    for usage, word in ((SiteUsage(3), "4 tasks today"), (SiteUsage(run_epochs=0.95), "times over the rows")):
        assert word in next(iter(refusals(limits, used(WORK, usage, ROWS, 100))))
    assert "2 times" in next(iter(refusals(limits, used(EXAM, SiteUsage(run_evaluations=1), ROWS, 100))))
    for before, refused in (
        (100, 0),
        (50, 0),
        (51, 1),
        (149, 1),
        (150, 0),
    ):  # of which these are a part, or the other way round
        found = [*refusals(limits, used(EXAM, SiteUsage(scored=frozenset({before, 300})), ROWS, 100))]
        assert len(found) == refused, before
    with pytest.raises(Refused, match=r"limits.megabytes_a_day = 1.0: answers of 2.0 MB were sent today"):
        require_allowed(limits, used(WORK, SiteUsage(bytes_today=2 * 10**6), ROWS, 100))


def test_a_server_is_held_to_its_own_terms() -> None:
    assert not [*beyond_terms(WORK)]
    for request in (
        with_field(WORK, Budget, "rank", 5),
        with_field(WORK, Budget, "steps", 21),
        with_field(WORK, TaskStart, "fold", ADAPTER),
        with_field(WORK, TaskStart, "control", ADAPTER),
        replace(WORK, terms=replace(TERMS, depth=1)),
        replace(EXAM, terms=replace(TERMS, evaluations=0)),
        with_field(WORK, TaskStart, "directions", (0, TERMS.rank)),
        with_field(WORK, Budget, "rate", RateByRank(0.5, 4)),
        replace(WORK, terms=replace(TERMS, rates=RateByRank(0.5, 4))),
    ):
        assert len([*beyond_terms(request)]) == 1


def test_a_small_bias_is_no_small_start() -> None:
    """That of two labels is small by chance, and makes no gradient small; a small matrix does."""
    for name, allowed in (("classifier.bias", True), ("classifier.weight", False)):
        start = Adapter(ADAPTER.factors, ADAPTER.dense | {name: torch.full((2,), 1e-8)})
        assert (not reasons(SiteLimits(least_rows=20), with_field(WORK, TaskStart, "train", start))) is allowed


def test_a_region_has_the_limits_that_its_file_names() -> None:
    limits = region_limits(SiteLimits(rank=4, scores=False))
    assert (limits.rank, limits.scores, limits.least_rows, limits.steps) == (4, False, 1, 10**9)
    assert not reasons(LOOSEST, with_field(WORK, Training, "clip", 1e-16), rows=1)


@pytest.mark.parametrize("value", [math.inf, math.nan, -math.inf])
def test_a_limit_is_a_number(value: float) -> None:
    for name, field in SiteLimits.model_fields.items():
        if field.annotation is float:
            with pytest.raises(ValidationError):
                SiteLimits.model_validate({name: value})


def test_no_pattern_travels_to_a_site() -> None:
    """The regular expression that hung a worker for ever, and others that are no names."""
    for names in ("(([a-z]+)[._0-9]?)+Z", ".*query", ("que.*", "value"), ("query", ""), ("a" * 201,)):
        with pytest.raises(Refused, match="no regular expression travels to a site"):
            replace(TERMS, lora=LoRA(names))
    plain: tuple[Any, ...] = (None, "all-linear", ("query", "layer.0.attention-x.v_proj"))
    for names in plain:
        assert replace(TERMS, lora=LoRA(names), engine=PLAIN)


@pytest.mark.parametrize(
    ("limit", "terms", "refused"), [(1, 0, False), (1, 3, False), (5, 0, True), (5, 4, True), (5, 5, False)]
)
def test_a_site_may_take_part_in_sums_over_so_many_sites_alone(limit: int, terms: int, refused: bool) -> None:
    found = reasons(SiteLimits(least_sum=limit), replace(WORK, terms=replace(TERMS, least_sum=terms)))
    assert [one for one in found if "least_sum" in one] == found
    assert bool(found) is refused


def test_a_task_is_summed_if_and_only_if_the_terms_say_so() -> None:
    """Else a server could have terms with sums accepted, and then ask for single answers."""
    summed = replace(WORK, task=replace(TASK, start=replace(TASK.start, codec=Summed(16, 0.1, 5))))
    for request, least, words in (
        (WORK, 5, ["the terms say that the run sums answers over at least 5 sites, the task is of another kind"]),
        (summed, 0, ["the terms say that the server sees the answer of each site, the task is of another kind"]),
        (summed, 5, []),
        (WORK, 0, []),
    ):
        assert [*beyond_terms(replace(request, terms=replace(TERMS, least_sum=least)))] == words
