"""What a client tells of its labels."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.private_histogram import centres, count_topics, noised, topics

ASKED = 20_000


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_a_noisy_histogram_is_as_private_as_it_says_and_no_noisier(epsilon: float) -> None:
    """P(answer in S | D) <= e^epsilon P(answer in S | D') for D, D' one example apart, in both directions, for every tail S.

    Counted on answers to (6, 3) and to (7, 3), for tails that hold at least a hundredth: the rarest ratios have an error of 10 %.
    """
    one, two = (Counter(noised((count, 3.0), epsilon, seed, "a")[0] for seed in range(ASKED)) for count in (6.0, 7.0))
    ratios = []
    for edge in range(1, 25):
        for tail in (lambda value, edge=edge: value >= edge, lambda value, edge=edge: value < edge):
            ours, theirs = (sum(n for value, n in held.items() if tail(value)) / ASKED for held in (one, two))
            if min(ours, theirs) > 0.01:
                ratios.append(abs(math.log(ours / theirs)))
    assert max(ratios) < epsilon + 0.3
    assert max(ratios) > 0.8 * epsilon  # half the noise would be twice epsilon, twice the noise half of it


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0.01, 20.0), st.integers(0, 9))
def test_noisy_counts_are_counts(labels: list[int], epsilon: float, seed: int) -> None:
    told = noised(labels, epsilon, seed, "a")
    assert len(told) == len(labels)
    assert all(count >= 0 and count == int(count) for count in told)
    assert told == noised(labels, epsilon, seed, "a")


def test_noise_is_unbiased_of_the_scale_it_says_and_each_clients_own() -> None:
    """Laplace of scale 1 / epsilon: variance 2 / epsilon^2, and 1/12 of rounding."""
    drawn = torch.tensor([noised((1000.0, 1000.0), 0.1, seed, "a") for seed in range(2000)])
    assert abs(float(drawn.mean()) - 1000.0) < 1.0  # 4.5 standard errors
    assert 180.0 < float(drawn.var()) < 220.0
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.1
    assert noised((1000.0,), 0.1, 0, "a") != noised((1000.0,), 0.1, 0, "b")
    assert noised((3.0, 0.0), 1e6, 0, "a") == (3.0, 0.0)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_is_positive(epsilon: float) -> None:
    with pytest.raises(Refused, match="epsilon"):
        noised((1.0,), epsilon, 0, "a")


def clouds(sizes: dict[str, tuple[int, int, int]]) -> dict[str, torch.Tensor]:
    """Texts of three kinds as points around three directions."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.eye(3, 8) * 3
    return {
        client: torch.cat([axes[kind] + 0.3 * torch.randn(n, 8, generator=generator) for kind, n in enumerate(counts)])
        for client, counts in sizes.items()
    }


def test_topics_are_the_kinds_of_text_that_there_are() -> None:
    sizes = {"a": (30, 0, 5), "b": (0, 40, 1), "c": (3, 2, 50)}
    found = topics(clouds(sizes), 3, 0)
    assert {client: sum(counts) for client, counts in found.items()} == {"a": 35, "b": 41, "c": 55}
    columns = {tuple(found[client][topic] for client in "abc") for topic in range(3)}
    assert columns == {(30.0, 0.0, 3.0), (0.0, 40.0, 2.0), (5.0, 1.0, 50.0)}


def test_topics_depend_on_the_seed_alone() -> None:
    texts = clouds({"a": (9, 4, 2), "b": (1, 8, 3)})
    assert topics(texts, 4, 1) == topics(dict(reversed(texts.items())), 4, 1)


def test_a_client_counts_at_home_with_centres_from_elsewhere() -> None:
    texts = clouds({"public": (20, 20, 20), "a": (7, 0, 2)})
    assert sorted(count_topics(texts["a"], centres(texts["public"], 3, 0))) == [0.0, 2.0, 7.0]


@pytest.mark.parametrize("count", [0, 4])
def test_there_are_no_more_topics_than_examples(count: int) -> None:
    with pytest.raises(Refused, match="topics"):
        topics({"a": torch.randn(3, 2, generator=torch.Generator().manual_seed(0))}, count, 0)


def test_texts_that_are_all_alike_are_one_topic() -> None:
    assert sorted(topics({"a": torch.ones(5, 3)}, 2, 0)["a"]) == [0.0, 5.0]
