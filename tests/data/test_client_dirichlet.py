"""Client mixtures: equal sizes, one owner an example, labels even over all clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples
from fedloom.data.partition import ClientDirichlet
from tests.support.storms import tries


def skewed(size: int, labels: int = 2) -> Examples:
    """Label 0 is three times as common as each other one."""
    drawn = np.random.default_rng(0).choice(labels, size, p=np.array([3] + [1] * (labels - 1)) / (labels + 2))
    names = tuple(map(str, range(labels)))
    return Examples(tuple("text" for _ in drawn), None, tuple(map(int, drawn)), names, None)


@given(st.integers(1, 12), st.floats(1e-2, 1e2), st.integers(1, 25), st.integers(0, 2**40))
@tries(60)
def test_everybody_has_the_asked_size_and_no_example_two_owners(
    clients: int, alpha: float, size: int, seed: int
) -> None:
    examples = skewed(300, 3)
    parts = ClientDirichlet(clients, alpha, size).split(examples, seed)
    assert [len(part) for part in parts.values()] == [size] * clients
    taken = [index for part in parts.values() for index in part]
    assert len(set(taken)) == len(taken)
    assert set(taken) <= set(range(300))
    assert parts == ClientDirichlet(clients, alpha, size).split(examples, seed)


def test_all_clients_together_have_even_labels_although_the_data_have_not() -> None:
    examples = skewed(40_000)
    parts = ClientDirichlet(200, 0.5, 40).split(examples, 1)
    shares = [np.mean([examples.labels[i] for i in part]) for part in parts.values()]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.mean([min(share, 1 - share) < 0.1 for share in shares]) > 0.3  # many clients know hardly but one label


def test_alpha_decides_on_the_skew() -> None:
    examples = skewed(40_000)
    spreads = []
    for alpha in (0.1, 1.0, 100.0):
        parts = ClientDirichlet(100, alpha, 40).split(examples, 1)
        spreads.append(np.std([np.mean([examples.labels[i] for i in part]) for part in parts.values()]))
    assert spreads == sorted(spreads, reverse=True)


@pytest.mark.parametrize("settings", [{"clients": 0}, {"size": 0}, {"alpha": 0.0}])
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(Refused, match="partition"):
        ClientDirichlet(**settings)  # type: ignore[arg-type]


def test_too_few_examples_are_refused_with_the_most_that_is_possible() -> None:
    with pytest.raises(Refused, match="at most 10 to each"):
        ClientDirichlet(clients=10, size=11).split(skewed(100), 0)


@pytest.mark.parametrize("seed", range(10))
def test_the_last_example_can_be_given_away(seed: int) -> None:
    parts = ClientDirichlet(clients=20, size=20).split(skewed(400, 3), seed)
    assert sorted(index for part in parts.values() for index in part) == list(range(400))
