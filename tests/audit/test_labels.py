"""Labels from the bias of the head: what was planted is found, what all have in common tells nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedloom.audit.labels import bias_change, correlation, guess_labels, label_shares
from fedloom.core.lora import Adapter

SHARES = [np.array(row) for row in ([0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.5, 0.3, 0.2])]


OWNERS = ["a", "b", "c", "d"]


def test_changes_that_follow_the_shares_tell_them() -> None:
    found = guess_labels([0.01 * (share - 1 / 3) for share in SHARES], SHARES, OWNERS, [0] * 4)
    assert found.right == 4
    assert min(found.correlations) > 0.99
    assert found.by_chance < 0.2
    assert found.right_by_chance < 0.5


def test_what_all_clients_have_in_common_tells_nothing_of_one() -> None:
    common = np.array([5.0, 1.0, 0.0])
    found = guess_labels([common + share for share in SHARES], SHARES, OWNERS, [0] * 4)
    assert found.correlations == pytest.approx(guess_labels(SHARES, SHARES, OWNERS, [0] * 4).correlations)
    alike = guess_labels([common] * 4, SHARES, OWNERS, [0] * 4)
    assert alike.correlations == (0.0,) * 4


def test_what_answers_to_one_version_have_in_common_is_taken_off_version_by_version() -> None:
    first, second = np.array([9.0, 0.0, 0.0]), np.array([0.0, 0.0, 9.0])
    changes = [*(first + share for share in SHARES), *(second + share for share in SHARES)]
    found = guess_labels(changes, [*SHARES, *SHARES], [*OWNERS, *OWNERS], [1] * 4 + [2] * 4)
    assert min(found.correlations) > 0.99
    assert found.right == 8


def test_fewer_than_three_answers_have_nothing_of_their_own() -> None:
    with pytest.raises(ValueError, match="3 answers"):
        guess_labels(SHARES[:2], SHARES[:2], OWNERS[:2], [0, 0])
    with pytest.raises(ValueError, match="two owners"):
        guess_labels(SHARES, SHARES, ["a"] * 4, [0] * 4)


def test_two_answers_of_one_client_are_no_chance_for_each_other() -> None:
    found = guess_labels([*SHARES, *SHARES], [*SHARES, *SHARES], [*OWNERS, *OWNERS], [0] * 8)
    assert found.right == 8
    assert found.right_by_chance == guess_labels(SHARES, SHARES, OWNERS, [0] * 4).right_by_chance


def test_the_bias_is_found_by_its_shape_or_not_at_all() -> None:
    start = Adapter({}, {"head.bias": torch.zeros(3), "head.weight": torch.zeros(3, 5)})
    answer = Adapter({}, {"head.bias": torch.tensor([1.0, 0.0, -1.0]), "head.weight": torch.ones(3, 5)})
    assert bias_change(start, answer, 3) == pytest.approx([1.0, 0.0, -1.0])
    assert bias_change(start, answer, 4) is None
    twice = Adapter({}, {**answer.dense, "other.bias": torch.zeros(3)})
    assert bias_change(twice, twice, 3) is None


def test_shares_and_correlation() -> None:
    assert label_shares([0, 1, 1, 2], [1, 2, 3], 4) == pytest.approx([0, 2 / 3, 1 / 3, 0])
    assert correlation(np.ones(3), np.arange(3.0)) == 0.0
