"""Clip (arXiv 1710.06963): what a client changed times min(1, S / |change|), over all factors and the head together."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch

from fedloom.aggregate.clip import Clip, clip_update
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.ffa import FFA
from fedloom.aggregate.flora import FLoRA
from fedloom.aggregate.hetlora import HetLoRA
from fedloom.aggregate.raflora import RaFLoRA
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, cut_factor
from fedloom.core.policies import Aggregator
from fedloom.core.types import Update
from tests.support.equations import values
from tests.support.toys import adapter, answers, changed, distance, function, mean_of, returned, sent


def length(update: Update) -> float:
    """|change| over every entry that came back."""
    gave, got = values(update.result.adapter), values(update.task.start.train)
    return sqrt(sum(float((x - got[key][: len(x)]).square().sum()) for key, x in gave.items()))


@pytest.mark.parametrize("inner", [FedIT(), FFA(), RaFLoRA(), FLoRA()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_longer_change_is_shortened_to_the_norm_in_its_own_direction(inner: Aggregator, share: float) -> None:
    (update,) = answers(inner, inner.init(adapter(8)), (4,))
    short = clip_update(update, share * length(update))
    assert length(short) == pytest.approx(share * length(update), rel=1e-5)
    gave, given, got = values(update.result.adapter), values(short.result.adapter), values(update.task.start.train)
    for key in gave:
        torch.testing.assert_close(given[key] - got[key], share * (gave[key] - got[key]), rtol=0, atol=1e-6)


def test_a_shorter_change_and_none_are_left_alone() -> None:
    (update,) = answers(FedIT(), FedIT().init(adapter(8)), (4,))
    assert clip_update(update, 1.001 * length(update)) is update
    nothing = returned(update.task)
    assert clip_update(nothing, 1e-9) is nothing


def test_the_head_is_a_part_of_the_change() -> None:
    task = sent(FedIT(), FedIT().init(adapter(4)), 4)
    head = {"head": task.start.train.dense["head"] + torch.tensor([3.0, 0.0, 4.0])}
    short = clip_update(returned(task, Adapter(task.start.train.factors, head)), 1.0)
    given = short.result.adapter.dense["head"] - task.start.train.dense["head"]
    torch.testing.assert_close(given, torch.tensor([0.6, 0.0, 0.8]))


def test_frozen_sides_come_through_to_the_bit() -> None:
    (update,) = answers(FFA(), FFA().init(adapter(8)), (4,))
    short = clip_update(update, 0.1)
    assert all(f.down.equal(update.task.start.train.factors[n].down) for n, f in short.result.adapter.factors.items())


def test_a_pruned_answer_is_measured_in_the_directions_that_it_kept() -> None:
    task = sent(HetLoRA(), HetLoRA().init(adapter(8)), 4)
    trained = changed(task.start, 1)
    pruned = returned(task, Adapter({n: cut_factor(f, 3) for n, f in trained.factors.items()}, trained.dense))
    short = clip_update(pruned, 0.5)
    assert {f.rank for f in short.result.adapter.factors.values()} == {3}
    assert length(short) == pytest.approx(0.5, rel=1e-5)


def test_one_client_cannot_pull_the_model_away_alone() -> None:
    inner = FedIT()
    model, norm = inner.init(adapter(4)), 0.5
    tasks = [sent(inner, model, 4, number) for number in (1, 2)]
    updates = [returned(tasks[0]), returned(tasks[1], changed(tasks[1].start, 1, by=100.0))]
    after = Clip(inner, norm).merge(model, mean_of(updates))
    moved = [after.adapter.factors[n].up - f.up for n, f in model.adapter.factors.items()]
    assert 0 < float(torch.stack([m.norm() for m in moved]).norm()) <= 0.5 * norm
    free = Clip(inner, 1e6).merge(model, mean_of(updates))
    assert distance(function(free), function(inner.merge(model, mean_of(updates)))) == 0.0


@pytest.mark.parametrize("norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_is_not_positive_is_refused(norm: Any) -> None:
    with pytest.raises(Refused, match="norm"):
        Clip(norm=norm)
