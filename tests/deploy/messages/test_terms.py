"""The terms that a server sends follow from its Run, and hold nothing that a site would have to interpret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fedloom import (
    FFA,
    IID,
    DepthByMemory,
    FedEx,
    FedIT,
    FixedDepth,
    FixedRank,
    FlexLoRA,
    FLoRA,
    Hierarchy,
    JointPlan,
    LossRate,
    Plan,
    Private,
    ProductDelta,
    RateByRank,
    Run,
    Scaffold,
    Secure,
)
from fedloom.core.errors import Refused
from fedloom.core.policies import Aggregator
from fedloom.deploy.messages.messages import RunTerms
from fedloom.deploy.messages.terms import terms_of_run
from fedloom.deploy.start import run_terms
from fedloom.runs.prepare import prepare
from fedloom.train.settings import Engine, LoRA
from tests.support.tiny_runs import tiny_run
from tests.support.toys import adapter


def terms_of(run: Run) -> RunTerms:
    return terms_of_run(run, run.aggregator.init(adapter(4)), ("no", "yes"), "0" * 12, "")


def test_a_pattern_for_layers_travels_as_names_of_the_same_layers(encoder: Path) -> None:
    pattern = LoRA(r".*\.attention\.self\.(query|key)")
    job = prepare(tiny_run(encoder, lora=pattern))
    names = run_terms(job).lora.target_modules
    assert isinstance(names, tuple)
    assert {*names} == {*job.server.state.first.adapter.factors}
    again = prepare(tiny_run(encoder, lora=replace(pattern, target_modules=names)))
    assert run_terms(again).first_adapter == run_terms(job).first_adapter, "the same adapter, to the byte"


@pytest.mark.parametrize(
    ("method", "folds", "controls"),
    [
        (ProductDelta(), False, False), (FedIT(), False, False), (FFA(), False, False), (FlexLoRA(), False, False),
        (FLoRA(), True, False), (FedEx(), True, False), (Scaffold(clients=2), False, True),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_terms_say_what_tasks_bring(method: Aggregator, folds: bool, controls: bool) -> None:
    terms = terms_of(tiny_run(Path("model"), aggregator=method))
    assert (terms.folds, terms.controls) == (folds, controls)


def test_terms_of_sums_say_how_many_and_refuse_numbers_that_would_hide_steps() -> None:
    run = tiny_run(Path("model"), aggregator=FFA(), plan=Plan(FixedRank(4), local_steps=20))
    summed = replace(run, hierarchy=Hierarchy(secure=Secure(least=4, threshold=0.7)))
    terms = terms_of(summed)
    assert (terms.least_sum, terms.sum_threshold, terms_of(run).least_sum) == (4, 0.7, 0)
    for secure in (Secure(bits=4), Secure(bound=1000.0)):
        with pytest.raises(Refused, match=r"hierarchy\.secure\.bits .* a step of the optimiser"):
            terms_of(replace(run, hierarchy=Hierarchy(secure=secure)))


def test_sums_have_room_for_the_largest_rate_of_a_rank_and_tell_a_step_at_the_smallest() -> None:
    plan, coarse = Plan(FixedRank(4), local_steps=20), Hierarchy(secure=Secure(bits=8))
    run = tiny_run(Path("model"), aggregator=FFA(), plan=plan, hierarchy=coarse)
    assert terms_of(run).rates is None
    assert terms_of(replace(run, plan=replace(plan, rate=RateByRank(0.0)))).rates == RateByRank(0.0, reference=4)
    for rule in (
        RateByRank(2.0),
        RateByRank(2.0, reference=1),
    ):  # rank 1 at 16 times the rate; rank 4 at a sixteenth of it
        with pytest.raises(Refused, match=r"hierarchy\.secure\.bits .* a step of the optimiser"):
            terms_of(replace(run, plan=replace(plan, rate=rule)))


def test_terms_say_the_largest_task_and_what_is_said_of_privacy() -> None:
    run = tiny_run(Path("model"), plan=Plan(FixedRank(4), local_steps=7, depth=FixedDepth(2)), partition=IID(2))
    terms = terms_of(run)
    assert (terms.rank, terms.steps, terms.depth, terms.versions) == (4, 7, 2, run.limits.versions)
    assert terms.privacy == ""
    learned = terms_of(replace(run, hierarchy=Hierarchy(plan=JointPlan(LossRate(steps=30)))))
    assert (learned.steps, learned.depth) == (30, None)
    varied = terms_of(replace(run, plan=Plan(FixedRank(4), depth=DepthByMemory())))
    started = terms_of(replace(run, start="trained"))
    folds = (terms.folds, learned.folds, varied.folds, started.folds)
    assert folds == (False, True, True, True), "a task of less depth brings layers below that were trained"
    noisy = terms_of(replace(run, privacy=Private(clip=1.0, multiplier=0.5, most_answers=3)))
    assert "multiplier 0.5, at most 3 answers of a client" in noisy.privacy
    assert terms_of(replace(run, held_out=0.0)).evaluations == 0


def test_no_folder_of_the_server_is_told_to_a_site_or_taken_by_it() -> None:
    terms = terms_of(tiny_run(Path("model"), engine=Engine("torch", cache_dir="/srv/kept")))
    assert terms.engine == Engine("torch")
    with pytest.raises(Refused, match=r"engine\.cache_dir.*no server names a folder of a site"):
        replace(terms, engine=Engine("torch", cache_dir="/srv/kept"))
