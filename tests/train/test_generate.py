"""Answers that a model writes, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.core.lora import Adapter
from fedloom.core.types import ClientState
from fedloom.train import evaluate
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.evaluate import (
    AnswerScores,
    answer_metrics,
    exact_match,
    generate_answers,
    score,
    worked_result,
)
from tests.support.tiny_models import toy_answers
from tests.support.tiny_runs import answered, lively, task_of, writer_of, writing_trainer
from tests.support.toys import factor


def by_hand(base: Base, request: tuple[int, ...], most: int) -> str:
    """One token at a time, the likeliest, without a cache."""
    ids, first = list(request), len(request)
    while len(ids) < first + most:
        logits = base.model.get_base_model()(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return str(base.tokenizer.decode(ids[first:], skip_special_tokens=True)).strip()


@torch.no_grad()
def test_the_likeliest_token_is_written_each_time_whatever_is_padded_beside_it(
    generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = writer_of(generator)
    texts, adapter, some = answered(base), lively(initial_adapter(base, 4)), [9, 1, 4, 22, 17]
    monkeypatch.setattr(evaluate, "GENERATED_TOGETHER", 3)
    fold = Adapter({n: factor(2, len(f.up), f.down.shape[1], 9) for n, f in adapter.factors.items()})
    found = generate_answers(base, adapter, texts, some, 8, fold)
    base.put(adapter, fold=fold)
    assert found == [by_hand(base, texts.ids[i][: texts.answer_starts[i]], 8) for i in some]  # type: ignore[index]
    assert len({*found}) > 1


@torch.no_grad()
def test_the_base_alone_writes_as_before_any_training(generator: Path) -> None:
    base = writer_of(generator)
    texts, start = answered(base), initial_adapter(base, 4)
    before = generate_answers(base, start, texts, [3, 5], 8)  # `up` is zero
    fold = Adapter({n: factor(2, len(f.up), f.down.shape[1], 9) for n, f in start.factors.items()})
    base.put(lively(start), fold=fold)
    assert generate_answers(base, None, texts, [3, 5], 8) == before
    assert generate_answers(base, lively(start), texts, [3, 5], 8) != before


def test_a_trained_model_ends_its_answers_and_those_counted_as_exact_are_the_references(generator: Path) -> None:
    base = writer_of(generator, rank=8, target_modules="all-linear")
    trainer = writing_trainer(base)
    ((result, _),) = trainer.train([(task_of(initial_adapter(base, 8), steps=60), ClientState())])
    told = generate_answers(base, result.adapter, trainer.texts, range(60), 30)
    assert sum(len(text.split()) <= 5 for text in told[:30]) >= 25
    right = [text == row["answer"] for text, row in zip(told, toy_answers(60), strict=True)]
    scores = score(base, result.adapter, trainer.texts, range(60))
    assert isinstance(scores, AnswerScores)
    assert (scores.hits == scores.tokens).tolist() == right
    assert scores.metrics()["exact_match"] == sum(right) / 60
    assert 0 < sum(right) < 60
    assert sum(text.startswith("the ") for text in told) >= 25


def test_nothing_is_written_beyond_what_the_model_reads(generator: Path) -> None:
    base = writer_of(generator)  # 64 positions
    (told,) = generate_answers(base, lively(initial_adapter(base, 4)), answered(base), [0], 1000)
    assert len(told.split()) <= 64


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("so it is 7.\n#### 1,234", "thus\n#### 1234", True),
        ("#### 1234.0", "#### 1,234", True),
        ("#### 3\n#### 4", "#### 4", True),
        ("#### -4", "#### 4", False),
        ("the answer is 4", "#### 4", False),
        ("#### 1.2.3", "#### 4", False),
        (" The CAT, is: cat!", "the cat is cat", True),
        ("die größe", "Die Größe.", True),
        ("cat the", "the cat", False),
        ("?", "!", False),
        ("", "the cat", False),
        ("+", "+", True),
    ],
)
def test_exact_is_the_number_where_there_is_one_and_else_the_words(text: str, reference: str, right: bool) -> None:
    assert exact_match(text, reference) is right


def test_the_result_of_an_answer_is_behind_its_last_mark() -> None:
    assert worked_result("#### 5 apples") == 5.0
    assert worked_result("5 apples") is None


def test_overlap_is_the_longest_common_subsequence_of_words_of_any_script() -> None:
    # Lin 2004: P = 2/3, R = 2/4, F1 = 4/7
    found = answer_metrics(["кот ест рыба"], ["кот не ест рыбу"])
    assert found["rouge_l"] == pytest.approx(4 / 7)
    assert answer_metrics(["a b", "c"], ["a b", "d"]) == {"exact_match": 0.5, "rouge_l": 0.5}
    assert answer_metrics([], []) == {"exact_match": 0.0, "rouge_l": 0.0}
