"""Figures against those made by hand, and predictions in the order they were asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from fedloom.core.lora import Adapter
from fedloom.data.partition import Shard
from fedloom.train import evaluate
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.evaluate import (
    BATCH,
    AnswerScores,
    KeptActivations,
    Scores,
    evaluate_held_out,
    evaluate_untrained,
    roc_auc,
    score,
)
from fedloom.train.tokenised import EncodedTexts, answer_choices, encode_texts
from tests.support.storms import tries
from tests.support.tiny_runs import answered, base_of, examples, lively, logits, writer_of


def scores(predicted: list[int], labels: list[int], classes: int = 2) -> Scores:
    losses = torch.arange(len(labels), dtype=torch.float32)
    return Scores(torch.tensor(predicted), torch.tensor(labels), losses, classes)


def test_two_classes_by_hand() -> None:
    # label 1: 2 hits, 1 false alarm, 2 missed: precision 2/3, recall 2/4, F1 = 4/7
    figures = scores([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]).metrics()
    assert figures == pytest.approx({"accuracy": 3 / 6, "f1": 4 / 7, "loss": 2.5})


def test_three_classes_by_hand() -> None:
    # F1: 0 -> 2*1/(2+1), 1 -> 2*1/(1+3), 2 -> 2*1/(2+1)
    figures = scores([0, 1, 1, 1, 2], [0, 0, 1, 2, 2], 3).metrics()
    assert figures["accuracy"] == pytest.approx(3 / 5)
    assert figures["f1_macro"] == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_a_class_that_is_neither_present_nor_predicted_does_not_count() -> None:
    assert scores([0, 1], [0, 1], 7).metrics()["f1_macro"] == 1.0


def test_nothing_right_is_zero_and_not_nan() -> None:
    figures = scores([0, 0], [1, 1]).metrics()
    assert figures["accuracy"] == figures["f1"] == 0.0


def test_a_part_has_the_scores_of_its_members() -> None:
    part = replace(scores([1, 0, 1], [1, 1, 0]), margins=torch.tensor([0.5, -1.0, 2.0])).subset([2, 0])
    assert part.predicted.tolist() == [1, 1]
    assert part.labels.tolist() == [0, 1]
    assert part.losses.tolist() == [2.0, 0.0]
    assert part.margins is not None
    assert part.margins.tolist() == [2.0, 0.5]


def test_counts_are_by_true_and_predicted_label() -> None:
    counted = scores([0, 1, 1, 1, 2], [0, 0, 1, 2, 2], 4).confusion()
    assert counted.counts == ((1, 1, 0, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 0, 0, 0))


class Area(NamedTuple):
    """Scores of few distinct values, so that many tie, and which of their examples are positive."""

    scores: list[float]
    positive: list[bool]


areas = st.lists(st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), st.booleans()), max_size=25).map(
    lambda rows: Area([score for score, _ in rows], [positive for _, positive in rows])
)


@tries(200)
@given(areas)
def test_the_area_is_the_probability_of_concordance(area: Area) -> None:
    """Every pair of a positive and a negative example counted, a tie as half (Hanley and McNeil 1982)."""
    rows = [*zip(area.scores, area.positive, strict=True)]
    ours, others = ([score for score, kind in rows if kind is wanted] for wanted in (True, False))
    found = roc_auc(torch.tensor(area.scores), torch.tensor(area.positive, dtype=torch.bool))
    if not ours or not others:
        assert found is None
        return
    pairs = [Fraction((a > b) * 2 + (a == b), 2) for a in ours for b in others]
    assert found == float(sum(pairs) / len(pairs))


@tries(200)
@given(areas)
def test_the_area_sees_only_the_order(area: Area) -> None:
    scores, positive = torch.tensor(area.scores), torch.tensor(area.positive, dtype=torch.bool)
    found = roc_auc(scores, positive)
    assert roc_auc(scores.exp() * 3 - 7, positive) == found
    turned = roc_auc(-scores, positive)
    assert (turned is None) is (found is None)
    assert turned is None or found is None or turned == pytest.approx(1 - found)


def test_scores_that_are_not_finite_have_no_area() -> None:
    assert roc_auc(torch.tensor([0.0, math.nan]), torch.tensor([True, False])) is None


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_scores_come_in_the_order_asked_for_whatever_the_batches(request: pytest.FixtureRequest, kind: str) -> None:
    base = base_of(request.getfixturevalue(kind))
    texts = encode_texts(examples(BATCH + 9), base.tokenizer, 32)
    adapter = lively(initial_adapter(base, 4))
    asked = list(reversed(range(BATCH + 9)))
    found = score(base, adapter, texts, asked)
    wanted = logits(base, adapter, texts)[asked]
    labels = torch.tensor(texts.labels)[asked]
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.predicted, wanted.argmax(1))
    assert torch.allclose(found.losses, functional.cross_entropy(wanted, labels, reduction="none"), atol=1e-5)
    assert torch.allclose(found.margins, wanted[:, 1] - wanted[:, 0], atol=1e-5)
    assert math.isfinite(found.metrics()["loss"])


def test_who_holds_nothing_out_is_not_scored(encoder: Path) -> None:
    base = base_of(encoder)
    texts, adapter = encode_texts(examples(12), base.tokenizer, 32), lively(initial_adapter(base, 4))
    shards = [Shard("none", (0, 1), ()), Shard("some", (2, 3, 5), (4, 7, 6)), Shard("one", (8,), ())]
    (found,) = evaluate_held_out(base, adapter, texts, shards).items()
    assert found[0] == "some"
    alone = score(base, adapter, texts, [4, 7, 6])
    assert isinstance(found[1], Scores)
    assert torch.equal(found[1].losses, alone.losses)
    (baseline,) = evaluate_untrained(base, texts, shards).items()
    assert baseline[0] == "some"
    assert baseline[1].counts()[:2] == (3, 1)  # examples 3 and 5 make label 1 the commonest, which 7 alone has
    for evaluate_nobody in (
        evaluate_held_out(base, adapter, texts, shards[::2]),
        evaluate_untrained(base, texts, shards[::2]),
    ):
        assert evaluate_nobody == {}


def test_answers_by_hand() -> None:
    # 3 of 4 tokens of one answer, 0 of 2 of another: 3/6; residuals 3 - 2 and 0 - 1: sqrt(2) / 6
    scores = AnswerScores(torch.tensor([3, 0]), torch.tensor([4, 2]), torch.tensor([2.0, 4.0]))
    found = scores.metrics()
    assert found == pytest.approx(
        {
            "accuracy": 0.5,
            "accuracy_error": 2**0.5 / 6,
            "loss": 1.0,
            "perplexity": math.e,
            "exact_match": 0.0,
            "tokens": 6,
        }
    )
    assert AnswerScores(scores.tokens, scores.tokens, scores.losses).metrics()["exact_match"] == 1.0
    assert scores.subset([1]).metrics()["accuracy"] == 0.0


@torch.no_grad()
@pytest.mark.parametrize("few", [False, True])
def test_answers_are_scored_token_by_token_in_the_order_asked_for(
    generator: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    base = writer_of(generator)
    texts, adapter, asked = answered(base), lively(initial_adapter(base, 4)), [40, 3, 17, 8]
    if few:  # room for the logits of one answer
        monkeypatch.setattr(evaluate, "MOST_LOGITS", 7 * base.vocabulary)
    found = score(base, adapter, texts, asked)
    assert isinstance(found, AnswerScores)
    for row, i in enumerate(asked):
        ids, begin = torch.tensor([texts.ids[i]]), texts.answer_starts[i]  # type: ignore[index]
        told = base.model(input_ids=ids).logits[0, begin - 1 : -1].log_softmax(1)
        assert int(found.hits[row]) == int((told.argmax(1) == ids[0, begin:]).sum())
        assert int(found.tokens[row]) == len(told)
        wanted = -float(told.gather(1, ids[0, begin:, None]).sum())
        assert float(found.losses[row]) == pytest.approx(wanted, rel=1e-4)


def test_a_base_alone_scores_as_before_any_training(generator: Path) -> None:
    base = writer_of(generator)
    texts, start = answered(base), initial_adapter(base, 4)
    before = score(base, start, texts, range(20)).metrics()  # `up` is zero
    base.put(lively(start))
    assert score(base, None, texts, range(20)).metrics() == before
    assert score(base, lively(start), texts, range(20)).metrics() != before


def raised(adapter: Adapter, seed: int, block: str = ".1.") -> Adapter:
    """All layers, of which those of one block alone add something: what clients of partial depth make of an adapter."""
    alive = lively(adapter, seed)
    factors = {n: alive.factors[n] if block in n else f for n, f in adapter.factors.items()}
    return Adapter(factors, adapter.dense)


@pytest.mark.parametrize("depth", [None, 1])
def test_layers_that_add_nothing_are_computed_once_for_all_versions(generator: Path, depth: int | None) -> None:
    base = writer_of(generator)
    start, texts, kept = initial_adapter(base, 4), answered(base), KeptActivations(10**6, depth)
    versions = [*([start] if depth else []), *(raised(start, seed) for seed in range(3)), None]
    plain = [score(base, version, texts, range(9)).metrics() for version in versions]
    lowest, calls = base.model.get_base_model().get_submodule("model.layers.0"), list[int]()
    score(base, versions[0], texts, range(9), None, kept)
    hook = lowest.register_forward_hook(lambda *_: calls.append(1))
    for version, expected in zip(versions if depth else versions[:-1], plain, strict=False):
        assert score(base, version, texts, range(9), None, kept).metrics() == pytest.approx(expected, rel=1e-5)
    hook.remove()
    assert not calls
    assert len(kept.cache.entries) == 1


def test_kept_layers_that_somebody_changed_are_computed_again(generator: Path) -> None:
    """A run of depth 1 that began from an adapter of all layers, and one in which a fold lies below."""
    base = writer_of(generator)
    start, texts, kept = initial_adapter(base, 4), answered(base), KeptActivations(10**6, 1)
    below = [Adapter(raised(start, seed, ".0.").factors) for seed in (1, 2)]
    for adapter, fold in [*((one, None) for one in below), *((start, one) for one in below), (start, None)]:
        plain = score(base, adapter, texts, range(9), fold).metrics()
        assert score(base, adapter, texts, range(9), fold, kept).metrics() == pytest.approx(plain, rel=1e-5)


def named(texts: EncodedTexts, count: int = 40) -> EncodedTexts:
    """The same requests, each answered by one of four texts of two or three tokens, of which two begin alike."""
    words, starts = ((5, 6, 2), (5, 7, 2), (8, 2), (9, 2)), texts.answer_starts or ()
    ids = tuple((*texts.ids[i][: starts[i]], *words[i % len(words)]) for i in range(count))
    told = replace(texts, ids=ids, labels=(0,) * count, answer_starts=starts[:count])
    return replace(told, choices=answer_choices(told))


@pytest.mark.parametrize(
    ("answers", "count", "few"), [(1, 4, True), (32, 128, True), (33, 1000, False), (4, 15, False), (0, 0, True)]
)
def test_few_answers_with_many_examples_are_labels(answers: int, count: int, few: bool) -> None:
    ids = tuple((1, 3, 100 - i % answers, 2) for i in range(count))
    texts = EncodedTexts(ids, {}, (0,) * count, 0, False, (2,) * count)
    assert answer_choices(texts) == (tuple((100 - k, 2) for k in reversed(range(answers))) if few else ())
    assert answer_choices(replace(texts, answer_starts=None)) == ()


@torch.no_grad()
def test_label_accuracy_is_that_of_greedy_decoding_which_may_only_write_labels(generator: Path) -> None:
    base = writer_of(generator)
    texts, found = named(answered(base), 16), list[bool]()
    for seed in (0, 1, 2):
        adapter = lively(initial_adapter(base, 4), seed)
        scores = score(base, adapter, texts, range(16))
        assert isinstance(scores, AnswerScores)
        assert scores.chosen is not None
        written = list[bool]()
        for i in range(16):
            row, told = list(texts.ids[i][: texts.answer_starts[i]]), list[int]()  # type: ignore[index]
            while tuple(told) not in texts.choices:
                following = {one[len(told)] for one in texts.choices if list(one[: len(told)]) == told}
                logits = base.model(input_ids=torch.tensor([row + told])).logits[0, -1]
                told.append(max(sorted(following), key=lambda token: float(logits[token])))
            written.append(tuple(told) == texts.answer(i))
        assert scores.chosen.tolist() == written
        assert scores.metrics()["label_accuracy"] == sum(written) / 16
        assert scores.subset([3, 5]).metrics()["label_accuracy"] == (written[3] + written[5]) / 2
        found += written
    assert 0 < sum(found) < len(found)


def chosen(base: Base, texts: EncodedTexts) -> list[bool]:
    found = score(base, None, texts, range(16))
    assert isinstance(found, AnswerScores)
    assert found.chosen is not None
    return found.chosen.tolist()


def test_an_answer_that_is_no_label_is_never_chosen_and_earlier_answers_do_not_count(generator: Path) -> None:
    """Not one that goes on after a label, either, or ends before."""
    base = writer_of(generator)
    texts = named(answered(base), 16)
    right, starts = chosen(base, texts), texts.answer_starts or ()
    assert any(right)
    for change in (lambda answer: (*answer, 3), lambda answer: answer[:1]):
        ids = tuple((*row[:begin], *change(row[begin:])) for row, begin in zip(texts.ids, starts, strict=True))
        assert not any(chosen(base, replace(texts, ids=ids)))
    talk = replace(texts, earlier_answers=((), ((2, 4),), *[()] * 14))
    assert talk.next_choices(1) == [(texts.ids[1][2],), (texts.ids[1][3],), (5, 8, 9), (6, 7), (2,)]
    assert chosen(base, talk) == right
    assert "label_accuracy" not in score(base, None, replace(texts, choices=()), [0]).metrics()
