"""Partitions along an axis: one owner an example, totals equal where they are held equal, the axis skewed and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples
from fedloom.data.skew import LengthDirichlet, Mixture, QualityDirichlet, Shuffled, Skew, SkewedPartition, rake_shares
from fedloom.data.text_measures import Measure, labels, ones, words
from tests.support.storms import tries


def corpus(size: int, kinds: int = 3, longest: int = 60) -> Examples:
    """Texts of 1 to `longest` words; quality, label and length are independent."""
    draw = np.random.default_rng(size)
    lengths = draw.integers(1, longest + 1, size).tolist()
    return Examples(
        texts=tuple("word " * length for length in lengths),
        pairs=None,
        labels=tuple(draw.integers(0, kinds, size).tolist()),
        names=tuple(map(str, range(kinds))),
        clients=None,
        quality=tuple((-draw.integers(0, 5, size) / 4).tolist()),
    )


@st.composite
def partitions(draw: st.DrawFn, equal: Measure | None) -> SkewedPartition:
    clients, alpha, bins = draw(st.integers(1, 12)), draw(st.floats(1e-3, 1e3)), draw(st.integers(1, 12) | st.none())
    kinds: tuple[SkewedPartition, ...] = (
        LengthDirichlet(clients, alpha, 4, bins, equal),
        QualityDirichlet(clients, alpha, 4, bins, equal),
        Mixture(clients, (Skew(words, alpha, bins), Skew(ones, 1.0), Skew(labels, 0.5, None)), 4, equal),
    )
    return draw(st.sampled_from(kinds))


@tries(40)
@given(st.data(), st.integers(150, 400), st.integers(0, 2**40))
def test_with_nothing_held_equal_every_example_has_one_owner(data: st.DataObject, size: int, seed: int) -> None:
    how, examples = data.draw(partitions(None)), corpus(size)
    for partition in (how, Shuffled(how)):
        parts = partition.split(examples, seed)  # type: ignore[attr-defined]
        assert sorted(index for part in parts.values() for index in part) == list(range(size))
        assert len(parts) == how.clients
        assert min(map(len, parts.values())) >= how.smallest
        assert parts == partition.split(examples, seed)  # type: ignore[attr-defined]


@tries(40)
@given(st.data(), st.integers(150, 400), st.integers(0, 2**40), st.sampled_from([ones, words]))
def test_what_is_held_equal_is_equal(data: st.DataObject, size: int, seed: int, equal: Measure) -> None:
    """Methods 2b, modes L-n and L-tok: the same sum at all clients, exactly of ones, of words to within one that was left out."""
    how, examples = data.draw(partitions(equal)), corpus(size)
    for partition in (how, Shuffled(how)):
        parts = partition.split(examples, seed)  # type: ignore[attr-defined]
        owned = [index for part in parts.values() for index in part]
        assert len(set(owned)) == len(owned)
        assert set(owned) <= set(range(size))
        weights = equal(examples)
        totals = [sum(weights[i] for i in part) for part in parts.values()]
        assert max(totals) - min(totals) <= (0 if equal is ones else 60)
        assert parts == partition.split(examples, seed)  # type: ignore[attr-defined]


def means(of: Measure, examples: Examples, parts: dict[str, tuple[int, ...]]) -> list[float]:
    """Each client's mean of the measure."""
    values = np.asarray(of(examples), dtype=float)
    return [float(values[list(part)].mean()) for part in parts.values()]


def test_little_is_thrown_away_to_hold_totals_equal() -> None:
    """Cutting every client to the poorest one's size would leave less than a fifth at this alpha."""
    examples = corpus(4000)
    plain = LengthDirichlet(20, 0.1, smallest=1).split(examples, 0)
    assert 20 * min(map(len, plain.values())) < 0.2 * 4000
    for equal in (ones, words):
        kept = LengthDirichlet(20, 0.1, equal=equal).split(examples, 0)
        weights = equal(examples)
        assert sum(weights[i] for part in kept.values() for i in part) > 0.95 * sum(weights)


def test_length_is_skewed_and_label_is_not() -> None:
    examples = corpus(4000)
    parts = LengthDirichlet(10, 0.1, equal=ones).split(examples, 0)
    assert np.std(means(words, examples, parts)) > 6
    assert np.std(means(labels, examples, parts)) < 0.1
    even = LengthDirichlet(10, 1000.0, equal=ones).split(examples, 0)
    assert np.std(means(words, examples, even)) < 2


def test_shuffled_keeps_the_sizes_and_loses_the_axis() -> None:
    examples = corpus(4000)
    how = LengthDirichlet(10, 0.1, equal=ones)
    parts, null = how.split(examples, 3), Shuffled(how).split(examples, 3)
    assert [len(part) for part in parts.values()] == [len(part) for part in null.values()]
    assert (
        np.std(means(words, examples, null)) < 3 * 60 / 12**0.5 / (4000 / 10) ** 0.5
    )  # thrice the standard error of a mean of 400
    uneven = LengthDirichlet(10, 0.1)
    assert sorted(map(len, uneven.split(examples, 3).values())) == sorted(
        map(len, Shuffled(uneven).split(examples, 3).values())
    )


def test_both_axes_of_a_mixture_are_skewed() -> None:
    examples = corpus(4000, kinds=2)
    parts = Mixture(8, (Skew(words, 0.2), Skew(labels, 0.2, None)), equal=ones).split(examples, 1)
    assert np.std(means(words, examples, parts)) > 6
    assert np.std(means(labels, examples, parts)) > 0.25
    sizes = [len(part) for part in Mixture(8, (Skew(ones, 0.3),)).split(examples, 1).values()]
    assert np.std(sizes) > 0.5 * np.mean(sizes)


@given(st.integers(1, 6), st.integers(2, 6), st.integers(0, 99))
def test_raking_keeps_the_odds_as_they_were_drawn(cells: int, clients: int, seed: int) -> None:
    """(s_ak s_bl) / (s_al s_bk) is what it was: Deming and Stephan 1940."""
    draw = np.random.default_rng(seed)
    shares, masses = draw.dirichlet([1.0] * clients, cells) + 1e-6, draw.uniform(1, 9, cells)
    made = rake_shares(shares / shares.sum(1, keepdims=True), masses)
    assert made.sum(1) == pytest.approx(1)
    assert masses @ made == pytest.approx(masses.sum() / clients, rel=1e-4)
    odds = [np.log(s[:, :1]) + np.log(s[0]) - np.log(s) - np.log(s[0, 0]) for s in (shares, made)]
    assert odds[0] == pytest.approx(odds[1], abs=1e-6)


def test_bins_are_quantiles_and_equal_values_stay_together() -> None:
    examples = Examples(tuple("w " * n for n in (1, 1, 1, 2, 3, 4)), None, (5, 5, 7, 0, 0, 7), tuple("abcdefgh"), None)
    assert Skew(words, bins=2).bin(examples).tolist() == [0, 0, 0, 1, 1, 1]
    assert len(set(Skew(words, bins=6).bin(examples)[:3].tolist())) == 1
    assert Skew(labels, bins=None).bin(examples).tolist() == [1, 1, 2, 0, 0, 2]
    assert len(set(Skew(ones).bin(examples).tolist())) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: LengthDirichlet(0),
        lambda: LengthDirichlet(alpha=0),
        lambda: LengthDirichlet(2, bins=0).split(corpus(100), 0),
        lambda: QualityDirichlet(smallest=0),
        lambda: Skew(alpha=-1.0),
        lambda: Mixture(of=()),
        lambda: LengthDirichlet(11).split(corpus(50), 0),
        lambda: QualityDirichlet(2).split(Examples(("a",) * 20, None, (0,) * 20, ("x",), None), 0),
    ],
)
def test_impossible_partitions_are_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(Refused):
        make()
