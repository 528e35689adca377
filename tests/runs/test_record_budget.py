"""What records of a run cost: refused before it where it is too much, and written down task by task as it goes."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.core.errors import Refused
from fedloom.core.events import Cancel, Dispatch, TimerFired
from fedloom.core.lora import Adapter
from fedloom.core.types import Budget, Task, TaskStart
from fedloom.hierarchy.grouping import RandomGroups
from fedloom.hierarchy.hierarchy import Hierarchy
from fedloom.hierarchy.secure_edge import Secure
from fedloom.plan.budget import Plan
from fedloom.plan.rank import FixedRank
from fedloom.privacy.accounting import Gaussian, SampledGaussian
from fedloom.privacy.ledger import LEDGER, read_ledger, spent_by_unit
from fedloom.privacy.private import Private
from fedloom.runs.prepare import prepare
from fedloom.runs.record_budget import largest_cost, reads_losses, task_recorders
from fedloom.runs.run import Run
from fedloom.schedule.rounds import Rounds
from fedloom.schedule.shared.weights import ByQuality
from fedloom.train.settings import Training
from tests.support.tiny_models import tiny_run
from tests.support.toys import factor

RECORDS = Private(clip=1.0, multiplier=2.0, most_answers=5, unit="record")
NO_DATA: Any = None
RUN = Run("m", NO_DATA, privacy=RECORDS, training=Training(batch_size=8), plan=Plan(FixedRank(4), 6))


def dispatch(number: int, client: str, steps: int = 6) -> Dispatch:
    start = TaskStart(Adapter({"a": factor(2)}), "0")
    return Dispatch(Task(number, client, 0, start, Budget(2, steps), 0.0))


def test_the_most_that_a_run_costs_is_all_its_tasks() -> None:
    assert largest_cost(RUN, 2.0, 80) == (SampledGaussian(0.1, 2.0, 30),)
    assert largest_cost(RUN, 3.0, 4) == (SampledGaussian(1.0, 3.0, 30),)


def test_who_weighs_by_losses_is_known() -> None:
    assert reads_losses(replace(RUN, schedule=Rounds(weigh=ByQuality())))
    assert not reads_losses(RUN)


def test_each_task_is_in_the_ledger_before_it_is_trained_and_once(tmp_path: Path) -> None:
    for _ in "ab":  # a run that goes on hands the same tasks out again
        with ExitStack() as opened:
            (recorder,) = task_recorders(RUN, {"a": 80, "b": 4}, tmp_path, opened)
            recorder(0.0, TimerFired(), [dispatch(1, "a"), Cancel(9, "b"), dispatch(2, "b"), dispatch(3, "edge0")])
            recorder(0.0, TimerFired(), [dispatch(4, "a", 2)])
    entries = [*read_ledger(tmp_path / LEDGER)]
    assert [entry.about["task"] for entry in entries] == [1, 2, 4]
    spent = spent_by_unit(entries)
    assert spent["a"] == (SampledGaussian(0.1, 2.0, 8),)
    assert spent["b"] == (Gaussian(math.sqrt(6) / 2.0),)


@pytest.mark.parametrize("run", [replace(RUN, privacy=None), replace(RUN, privacy=Private(1.0, 1.0, 5))])
def test_other_runs_have_no_such_ledger(tmp_path: Path, run: Run) -> None:
    with ExitStack() as opened:
        assert task_recorders(run, {"a": 80}, tmp_path, opened) == []
        assert task_recorders(RUN, {}, tmp_path, opened) == [], "sites count for themselves"
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"held_out": 0.2}, "held_out"),
        ({"schedule": Rounds(weigh=ByQuality())}, r"schedule\.weigh"),
        ({"training": Training(stratified=True)}, r"training\.stratified"),
        (
            {"privacy": replace(RECORDS, budget=(0.1, 1e-5)), "training": Training(batch_size=64)},
            r"privacy\.multiplier.*give multiplier=",
        ),
    ],
)
def test_what_would_tell_more_is_refused_before_it_begins(encoder: Path, changed: dict[str, Any], wrong: str) -> None:
    run = replace(tiny_run(encoder), held_out=0.0, privacy=RECORDS)
    with pytest.raises(Refused, match=wrong):
        prepare(replace(run, **changed))


@pytest.mark.slow
@pytest.mark.parametrize(
    "hierarchy", [None, Hierarchy(RandomGroups(2)), Hierarchy(RandomGroups(2), secure=Secure(least=3))]
)
def test_a_run_tells_no_losses_and_writes_each_task_down(
    encoder: Path, tmp_path: Path, hierarchy: Hierarchy | None
) -> None:
    records = replace(RECORDS, most_answers=2)
    run = replace(tiny_run(encoder), held_out=0.0, privacy=records, hierarchy=hierarchy)
    prepare(run).execute(tmp_path / "run", report=False)
    assert b"first_loss" not in (tmp_path / "run" / "trace.jsonl").read_bytes()
    entries = [*read_ledger(tmp_path / "run" / LEDGER)]
    tasks = Counter(entry.about["client"] for entry in entries)
    assert tasks
    assert max(tasks.values()) <= 2, "tasks handed out, not answers merged"
    assert {client for entry in entries for client in entry.events} == tasks.keys()
    assert all(str(client).startswith("c") for client in tasks)
