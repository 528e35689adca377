"""Metrics of counted predictions against their definitions, worked from lists of labels."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.train.confusion import Confusion, commonest_label, constant_answer
from tests.support.storms import tries

Pairs = list[tuple[int, int]]
"""True and predicted label of each example."""
LABELS = 4

predictions = st.lists(st.tuples(st.integers(0, LABELS - 1), st.integers(0, LABELS - 1)), min_size=1, max_size=30)


def counted(pairs: Pairs, labels: int = LABELS) -> Confusion:
    return Confusion(tuple(tuple(pairs.count((t, p)) for p in range(labels)) for t in range(labels)))


def share(part: Sequence[object], whole: Sequence[object]) -> float | None:
    return len(part) / len(whole) if whole else None


@tries(200)
@given(predictions)
def test_recall_precision_and_f1_follow_from_the_examples_themselves(pairs: Pairs) -> None:
    """As scikit-learn defines them, but undefined where it warns and says 0."""
    found = counted(pairs)
    for label in range(LABELS):
        true, given_it = [p for p in pairs if p[0] == label], [p for p in pairs if p[1] == label]
        hits = [p for p in true if p[1] == label]
        recall, precision = share(hits, true), share(hits, given_it)
        assert (found.recall()[label], found.precision()[label]) == (recall, precision)
        f1 = found.f1()[label]
        if recall and precision:
            assert f1 == pytest.approx(2 / (1 / recall + 1 / precision))  # the harmonic mean
        else:
            assert f1 == (0.0 if true or given_it else None)


@tries(200)
@given(predictions)
def test_rows_are_the_examples_of_a_label_and_columns_its_predictions(pairs: Pairs) -> None:
    found = counted(pairs)
    assert found.true == [sum(true == label for true, _ in pairs) for label in range(LABELS)]
    assert found.predicted == [sum(given == label for _, given in pairs) for label in range(LABELS)]
    assert sum(found.true) == sum(found.predicted) == len(pairs)
    assert found.accuracy() == sum(true == given for true, given in pairs) / len(pairs)


@tries(200)
@given(predictions)
def test_means_are_over_labels_that_are_there(pairs: Pairs) -> None:
    """Balanced accuracy over labels with examples (Brodersen et al. 2010), macro F1 over labels present or predicted."""
    metrics, found = counted(pairs).metrics(), counted(pairs)
    present = sorted({true for true, _ in pairs})
    seen = sorted({label for pair in pairs for label in pair})
    recalls, f1s = ([values[k] for k in kinds] for values, kinds in ((found.recall(), present), (found.f1(), seen)))
    assert metrics["balanced_accuracy"] == pytest.approx(sum(filter(None, recalls)) / len(recalls))
    assert metrics["f1_macro"] == pytest.approx(sum(filter(None, f1s)) / len(f1s))


@tries(200)
@given(predictions)
def test_accuracy_is_the_mean_recall_weighed_by_examples(pairs: Pairs) -> None:
    found = counted(pairs)
    weighed = sum(Fraction(recall) * true for recall, true in zip(found.recall(), found.true, strict=True) if recall)
    assert found.accuracy() == pytest.approx(float(weighed / len(pairs)))


@tries(200)
@given(st.lists(st.integers(0, LABELS - 1), min_size=1, max_size=30), st.lists(st.integers(0, LABELS - 1), min_size=1))
def test_the_baseline_is_a_predictor_that_always_says_the_commonest_training_label(
    train: list[int], test: list[int]
) -> None:
    label = commonest_label(train)
    assert train.count(label) == max(map(train.count, train))
    assert all(train.count(other) < train.count(label) for other in range(label)), "of several the smallest"
    constant = constant_answer([test.count(k) for k in range(LABELS)], label)
    assert constant == counted([(true, label) for true in test])
    assert constant.accuracy() == test.count(label) / len(test)


def test_what_two_labels_are_named_by_and_what_more_are() -> None:
    two, three = counted([(0, 0), (1, 1), (1, 0)], 2), counted([(0, 0), (1, 1), (2, 0)], 3)
    assert two.f1_metrics() == {"f1": pytest.approx(2 / 3)}
    assert three.f1_metrics().keys() == {"f1_macro"}
    assert {"f1", "f1_macro", "roc_auc"} <= two.metrics().keys()
    assert {"f1", "roc_auc"}.isdisjoint(three.metrics())


def test_a_constant_answer_ranks_by_chance_and_one_label_ranks_nothing() -> None:
    assert constant_answer([5, 1], 0).roc_auc == 0.5
    assert constant_answer([5, 0], 0).roc_auc is None
    assert constant_answer([5, 1, 1], 0).roc_auc is None


def test_no_test_example_of_a_label_is_undefined_and_not_zero() -> None:
    metrics = counted([(0, 0), (0, 1)], 2).metrics()
    assert metrics["recall_by_label"] == [0.5, None]
    assert metrics["roc_auc"] is None
    assert metrics["balanced_accuracy"] == 0.5
