"""Summaries and what they say: known answers, what chance gives, and that no text travels."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.client_summary import (
    LENGTHS,
    LOSSES,
    Summary,
    bin_middles,
    encode_summary,
    parse_summary,
    private_summary,
    summarise,
)
from fedloom.data.examples import Examples
from fedloom.data.heterogeneity import Heterogeneity, measure_heterogeneity, tenths
from fedloom.data.partition import IID, LabelDirichlet, Partition, QuantityDirichlet
from fedloom.data.skew import LengthDirichlet, QualityDirichlet, Shuffled
from fedloom.data.text_measures import ones, quality
from tests.support.storms import one_in

CLIENTS = 10


def corpus(size: int = 4000) -> Examples:
    draw = np.random.default_rng(0)
    lengths = draw.geometric(0.02, size).clip(max=800).tolist()
    return Examples(
        texts=tuple("word " * length for length in lengths),
        pairs=None,
        labels=tuple(draw.integers(0, 4, size).tolist()),
        names=("red", "green", "blue", "black"),
        clients=None,
        quality=tuple((-draw.exponential(1.0, size)).tolist()),
    )


def measured(how: Partition, examples: Examples, seed: int = 0) -> Heterogeneity:
    return measure_heterogeneity(
        [summarise(name, examples.take(part)) for name, part in how.split(examples, seed).items()]
    )


def plain(client: str, lengths: dict[int, int], labels: dict[str, float] | None = None) -> Summary:
    return Summary(client, tuple(float(lengths.get(k, 0)) for k in range(len(LENGTHS))), labels=labels)


def test_two_clients_with_nothing_in_common() -> None:
    """JS((1, 0) || (1/2, 1/2)) = H(3/4, 1/4) - 1/2 = 0.3113 bits, for lengths and labels alike."""
    found = measure_heterogeneity([plain("a", {3: 50}, {"x": 50.0}), plain("b", {30: 50}, {"y": 50.0})])
    assert found.length.value == pytest.approx(0.3113, abs=1e-4)
    assert found.labels is not None
    assert found.labels.value == pytest.approx(0.3113, abs=1e-4)
    assert found.quantity.value == 0
    assert found.quality is None
    assert found.length.chance[1] < 0.05


def test_sizes_by_hand() -> None:
    """CV of 10 and 30 is 10 / 20; CV^2 = (K - 1) / (K alpha + 1) gives alpha 3/2."""
    found = measure_heterogeneity([plain("a", {5: 10}), plain("b", {5: 30})])
    assert found.quantity.value == pytest.approx(0.5)
    assert found.quantity.alpha == pytest.approx(1.5)
    assert found.length.value == 0
    assert found.length.alpha == math.inf


def test_quality_by_hand() -> None:
    """Two clients a whole spread apart: every mean is one standard deviation from the mean of all."""
    counts = np.zeros((2, len(LOSSES)))
    counts[0, 2], counts[1, 9] = 40, 40
    found = measure_heterogeneity(
        [replace(plain(n, {5: 40}), quality=tuple(row)) for n, row in zip("ab", counts.tolist(), strict=True)]
    )
    assert found.quality is not None
    assert found.quality.value == pytest.approx(1.0)
    examples = corpus()
    parts = QualityDirichlet(CLIENTS, 0.2).split(examples, 0)
    values = np.array(quality(examples))
    exact = np.mean([abs(values[list(part)].mean() - values.mean()) for part in parts.values()]) / values.std()
    assert measured(QualityDirichlet(CLIENTS, 0.2), examples).quality.value == pytest.approx(exact, rel=0.05)  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_a_random_deal_is_as_uneven_as_chance_which_is_known(seed: int) -> None:
    """The bias of a divergence of B bins: JS(P_k || P) is about (B - 1) / (8 n ln 2) bits for n texts of a client, n << all."""
    examples = corpus()
    found = measured(IID(CLIENTS), examples, seed)
    for index, bins in ((found.length, 10), (found.labels, 4)):
        assert index is not None
        bias = (bins - 1) * (1 - 1 / CLIENTS) / (8 * 400 * math.log(2))
        assert index.chance[0] == pytest.approx(bias, rel=0.2)
        assert index.value < 2 * index.chance[1]
    assert found.quality is not None
    assert found.quality.value < 2 * found.quality.chance[1]
    assert found.quantity.value == 0


def test_every_index_sees_its_own_axis_and_no_other() -> None:
    examples = corpus()
    axes: dict[str, Partition] = {
        "length": LengthDirichlet(CLIENTS, 0.2, equal=ones),
        "quality": QualityDirichlet(CLIENTS, 0.2, equal=ones),
        "quantity": QuantityDirichlet(CLIENTS, 0.3),
        "labels": LabelDirichlet(CLIENTS, 0.2),
    }
    for axis, how in axes.items():
        found = measured(how, examples)
        assert getattr(found, axis).value > (0.25 if axis in ("quality", "quantity") else 0.1)
        for other in {"length", "quality", "labels"} - {axis}:
            index = getattr(found, other)
            assert index.value < 2 * index.chance[1], (axis, other)
    null = measured(Shuffled(LengthDirichlet(CLIENTS, 0.2, equal=ones)), examples)
    assert null.length.value < 1.5 * null.length.chance[1]


@pytest.mark.parametrize("alpha", one_in(3, [0.5, 0.1, 2.0]))
def test_the_alpha_that_is_told_is_about_the_one_that_was_drawn(alpha: float) -> None:
    """Within 2.5: bins of a summary are not quite those of the partition, which blurs a strong skew of lengths."""
    examples = corpus()
    for axis, how in (("length", LengthDirichlet(CLIENTS, alpha)), ("labels", LabelDirichlet(CLIENTS, alpha))):
        told = [getattr(measured(how, examples, seed), axis).alpha for seed in range(5)]
        assert 0.5 * alpha < np.median(told) < 2.5 * alpha


def test_tenths_are_of_equal_weight() -> None:
    counts = np.random.default_rng(0).integers(0, 9, (5, 57)).astype(float)
    found = tenths(counts, counts.sum(axis=0))
    assert found.sum(axis=1) == pytest.approx(counts.sum(axis=1))
    assert found.sum(axis=0) == pytest.approx(counts.sum() / 10, rel=0.3)


def test_a_summary_comes_back_from_its_file_and_holds_no_word() -> None:
    """The bytes that leave a client, with noise and without: no word of the texts is among them."""
    secret = ("Adamson", "pneumonia", "Tuesday", "discharged", "42", "milligrams")
    texts = tuple(" ".join(secret[i % 6 :] + secret[: i % 6]) for i in range(60))
    examples = Examples(texts, texts, (0, 1) * 30, ("plus", "minus"), ("ward",) * 60, texts, quality=(-0.5,) * 60)
    own = summarise("ward", examples)
    assert own.median() == pytest.approx(18, abs=2)
    for summary in (own, private_summary(own, 1.0, 7, ("plus", "minus", "none"))):
        told = encode_summary(summary)
        assert parse_summary(told, "here") == summary
        assert not any(word.encode() in told.encode() for word in secret[:4] + secret[5:])
        assert set(json.loads(told)) == {"type", "client", "lengths", "unit", "labels", "quality", "epsilon"}


def test_noise_is_that_of_the_stated_epsilon_for_the_whole_file() -> None:
    """Three histograms at epsilon / 3 each: the mean |noise| on a large count is 3 / epsilon."""
    many = plain("a", {20: 5000}, {"x": 4000.0, "y": 1000.0})
    many = replace(many, quality=tuple([9000.0] + [0.0] * (len(LOSSES) - 1)))
    off = [abs(private_summary(many, 0.5, seed, ("x", "y")).lengths[20] - 5000) for seed in range(400)]
    assert np.mean(off) == pytest.approx(6.0, rel=0.15)
    assert private_summary(many, 0.5, 1).labels is None
    with pytest.raises(Refused, match="name all labels"):
        private_summary(many, 0.5, 1, ("x",))


def test_noise_alone_does_not_look_like_unevenness() -> None:
    examples = corpus()
    own = [summarise(name, examples.take(part)) for name, part in IID(CLIENTS).split(examples, 0).items()]
    found = measure_heterogeneity([private_summary(one, 0.5, k, examples.names) for k, one in enumerate(own)])
    for index in (found.length, found.labels, found.quality):
        assert index is not None
        assert index.value < 1.5 * index.chance[1]


@given(st.lists(st.floats(0, 30_000), max_size=20))
def test_every_length_has_its_bin(values: list[float]) -> None:
    examples = Examples(("",) * len(values), None, (0,) * len(values), ("x",), None)
    own = summarise("a", examples, lambda _: values)
    assert sum(own.lengths) == own.examples == len(values)
    for value in values:
        (bin_,) = np.flatnonzero(summarise("a", examples.take([0]), lambda _, value=value: (value,)).lengths)
        assert LENGTHS[bin_] <= max(value, 1)
        assert bin_ + 1 == len(LENGTHS) or value < LENGTHS[bin_ + 1]
    assert (np.diff(bin_middles(LENGTHS)) > 0).all()


@pytest.mark.parametrize(
    ("summaries", "says"),
    [
        ([plain("a", {1: 5})], "one client"),
        ([plain("a", {1: 5}), plain("a", {1: 5})], "two summaries"),
        ([plain("a", {1: 5}), plain("b", {})], "no examples"),
        ([plain("a", {1: 5}), replace(plain("b", {1: 5}), unit="tokens of x")], "same way"),
    ],
)
def test_what_cannot_be_compared_is_refused(summaries: list[Summary], says: str) -> None:
    with pytest.raises(Refused, match=says):
        measure_heterogeneity(summaries)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"type": "Summary"}', '{"type": "Run"}', encode_summary(plain("a", {})).replace("0.0", "-1.0", 1)],
)
def test_a_broken_file_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_summary(text, "s.json")
