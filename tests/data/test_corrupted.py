"""Damage of a stated amount, remembered, and of nothing else."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.corrupted import Corrupted, damage_text
from fedloom.data.examples import Examples, Split


class Given(dict[str, object]):
    """A source of these examples; the test is the same."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def load(self, seed: int) -> Split:
        return Split(self.examples, self.examples)


def stories(count: int, answers: bool = False) -> Examples:
    context = tuple(" ".join(f"Sentence {k} of {i}." for k in range(10)) for i in range(count))
    told = tuple(f"answer {i}" for i in range(count)) if answers else None
    return Examples(
        tuple(f"Request {i}?" for i in range(count)),
        context,
        tuple(i % 3 for i in range(count)),
        ("a", "b", "c"),
        None,
        told,
    )


def test_a_stated_share_of_sentences_is_left_out_of_a_stated_share_of_examples() -> None:
    clean = stories(40)
    split = Corrupted(Given(clean), share=0.25, delete=0.3).load(7)
    assert split.test == clean
    train = split.train
    assert Counter(train.quality) == {0.0: 30, -0.3: 10}
    assert train.texts == clean.texts
    assert train.labels == clean.labels
    assert train.pairs is not None
    assert clean.pairs is not None
    assert train.quality is not None
    for before, after, quality in zip(clean.pairs, train.pairs, train.quality, strict=True):
        assert after.count(".") == (7 if quality else 10)
        assert (after == before) == (quality == 0)
    assert train == Corrupted(Given(clean), share=0.25, delete=0.3).load(7).train
    assert train != Corrupted(Given(clean), share=0.25, delete=0.3).load(8).train


def test_labels_are_swapped_at_the_rate() -> None:
    clean = stories(1000)
    train = Corrupted(Given(clean), share=0.5, delete=0.0, swap=0.4).load(0).train
    wrong = [a != b for a, b in zip(clean.labels, train.labels, strict=True)]
    assert sum(wrong) == pytest.approx(200, abs=35)
    assert train.quality == tuple(-1.0 if bad else 0.0 for bad in wrong)
    assert train.pairs == clean.pairs


def test_answers_are_handed_round_and_none_is_lost() -> None:
    clean = stories(50, answers=True)
    train = Corrupted(Given(clean), share=0.4, delete=0.0, swap=1.0).load(0).train
    assert train.answers is not None
    assert clean.answers is not None
    assert train.quality is not None
    assert sorted(train.answers) == sorted(clean.answers)
    assert train.labels == clean.labels
    assert [a != b for a, b in zip(clean.answers, train.answers, strict=True)] == [q == -1 for q in train.quality]
    assert sum(train.quality) == -20


def test_damage_adds_up() -> None:
    twice = Corrupted(Corrupted(Given(stories(20)), share=1.0, delete=0.5), share=1.0, delete=0.2).load(0).train
    assert twice.quality == (-0.7,) * 20


words = st.lists(st.text("abc", min_size=1, max_size=3), max_size=12)


@given(words, st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_damage_takes_words_away_and_adds_none(parts: list[str], delete: float, shuffle: float, seed: int) -> None:
    text, lost = damage_text(" ".join(parts), delete, shuffle, random.Random(seed))
    left = Counter(text.split())
    assert left <= Counter(parts)
    assert bool(parts) == bool(text)
    assert 0 <= lost <= 2
    assert lost or text.split() == parts
    if len(set(parts)) == len(parts) > 1 and not delete and shuffle == 1:
        assert lost == 1
        assert all(before != after for before, after in zip(parts, text.split(), strict=True))


def test_a_single_sentence_is_damaged_by_words() -> None:
    text, lost = damage_text("one two three four", 0.5, 0.0, random.Random(0))
    assert len(text.split()) == 2
    assert lost == 0.5
    assert damage_text("one", 1.0, 1.0, random.Random(0)) == ("one", 0.0)


@pytest.mark.parametrize("field", ["share", "delete", "shuffle", "swap"])
def test_a_share_is_a_share(field: str) -> None:
    with pytest.raises(Refused, match=field):
        Corrupted(**{field: 1.5})
