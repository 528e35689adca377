"""What is found doubtful about examples: counts that are right, and never a text."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from fedloom.data.data_checks import label_sentences, missing_sentences, overlap_sentences, repeat_sentences
from fedloom.data.examples import Examples
from fedloom.data.raw_table import RawTable
from tests.support.storms import tries


def examples(rows: Sequence[tuple[str, int]], names: tuple[str, ...] = ("no", "yes", "never")) -> Examples:
    return Examples(tuple(text for text, _ in rows), None, tuple(label for _, label in rows), names, None)


def test_clean_examples_have_nothing_doubtful() -> None:
    clean = examples([(f"text {i}", i % 2) for i in range(40)])
    assert list(repeat_sentences(clean)) == list(overlap_sentences(clean, examples([("new", 0)]))) == []
    (share,) = label_sentences(clean)
    assert "50.0 %" in share
    assert list(missing_sentences(RawTable({"t": ["a", "b"]}, "here"), {"text": "t"})) == []


def test_a_text_counts_once_whatever_its_blanks() -> None:
    (repeated,) = repeat_sentences(examples([("a b", 0), ("a  b ", 0), ("c", 1)]))
    assert repeated.startswith("1 of 3 texts")


def test_one_text_with_two_labels_is_found() -> None:
    assert any(
        line.startswith("1 texts have different labels") for line in repeat_sentences(examples([("a", 0), ("a", 1)]))
    )


def test_labels_without_examples_are_not_counted() -> None:
    assert list(label_sentences(examples([("a", 0), ("b", 0)]))) == []


@tries(50)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 2)), min_size=1, max_size=30))
def test_counts_are_those_of_sets(rows: list[tuple[str, int]]) -> None:
    held = examples(rows)
    said = " ".join([*repeat_sentences(held), *overlap_sentences(held, held)])
    assert f"{len(rows)} of {len(rows)} test examples" in said
    repeated = len(rows) - len({text for text, _ in rows})
    assert (f"{repeated} of {len(rows)} texts" in said) == (repeated > 0)


def test_labels_that_only_test_examples_have_are_counted() -> None:
    train = examples([("a", 0), ("b", 1)], ("no", "yes"))
    assert list(overlap_sentences(train, examples([("c", 0), ("d", 1)], ("yes", "never")))) == [
        "1 of 2 test examples have a label that no training example has."
    ]
    assert list(overlap_sentences(train, examples([("c", 0)], ("",)))) == []
