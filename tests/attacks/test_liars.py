"""A liar among six sites costs little where the limits hold, and decides the model where they are lifted."""

from __future__ import annotations

from statistics import fmean

import pytest

from tests.attacks.liars import LARGEST, Guard, Liar, federation, weight_of_a_liar


@pytest.mark.slow
def test_what_an_answer_says_of_examples_changes_not_a_bit() -> None:
    told, honest = (federation(liar, Guard(), versions=3) for liar in (Liar(tells=LARGEST), Liar()))
    assert told == honest


@pytest.mark.slow
@pytest.mark.redteam
def test_the_weight_of_a_liar_at_the_limits_is_small() -> None:
    assert fmean(weight_of_a_liar()) <= 0.05
    assert fmean(weight_of_a_liar(Guard.lifted())) > 0.3, "control"
