"""Figures against those made by hand, and predictions in the order they were asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fedloom.train.base import initial
from fedloom.train.evaluate import BATCH, Scores, score
from fedloom.train.texts import encode
from tiny import base_of, examples, lively, logits


def scores(predicted: list[int], labels: list[int], classes: int = 2) -> Scores:
    losses = torch.arange(len(labels), dtype=torch.float32)
    return Scores(torch.tensor(predicted), torch.tensor(labels), losses, classes)


def test_two_classes_by_hand() -> None:
    # label 1: 2 hits, 1 false alarm, 2 missed: precision 2/3, recall 2/4, F1 = 4/7
    figures = scores([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]).figures()
    assert figures == pytest.approx({"accuracy": 3 / 6, "f1": 4 / 7, "loss": 2.5})


def test_three_classes_by_hand() -> None:
    # F1: 0 -> 2*1/(2+1), 1 -> 2*1/(1+3), 2 -> 2*1/(2+1)
    figures = scores([0, 1, 1, 1, 2], [0, 0, 1, 2, 2], 3).figures()
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["f1"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_a_class_that_is_neither_present_nor_predicted_does_not_count() -> None:
    assert scores([0, 1], [0, 1], 7).figures()["f1"] == 1.0


def test_nothing_right_is_zero_and_not_nan() -> None:
    figures = scores([0, 0], [1, 1]).figures()
    assert figures["accuracy"] == figures["f1"] == 0.0


def test_a_part_has_the_scores_of_its_members() -> None:
    part = scores([1, 0, 1], [1, 1, 0]).at([2, 0])
    assert part.predicted.tolist() == [1, 1]
    assert part.labels.tolist() == [0, 1]
    assert part.losses.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_scores_come_in_the_order_asked_for_whatever_the_batches(request: pytest.FixtureRequest, kind: str) -> None:
    base = base_of(request.getfixturevalue(kind))
    texts = encode(examples(BATCH + 9), base.tokenizer, 32)
    adapter = lively(initial(base, 4))
    asked = list(reversed(range(BATCH + 9)))
    found = score(base, adapter, texts, asked)
    wanted = logits(base, adapter, texts)[asked]
    labels = torch.tensor(texts.labels)[asked]
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.predicted, wanted.argmax(1))
    assert torch.allclose(found.losses, functional.cross_entropy(wanted, labels, reduction="none"), atol=1e-5)
    assert math.isfinite(found.figures()["loss"])
