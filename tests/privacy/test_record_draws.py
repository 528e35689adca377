"""Coins and noise of records: independent, of the stated size, secret, repeatable, and never shared by two sums."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedloom.privacy.accounting import SampledGaussian
from fedloom.privacy.private import Private
from fedloom.privacy.record_draws import RecordDraws, for_records, sampling_rate, steps_cost
from fedloom.privacy.secret_noise import GRID

DRAWS = RecordDraws(b"s" * 32, "0123456789ab", 1)
PRIVATE = Private(clip=0.5, multiplier=2.0, most_answers=10, unit="record")


def total(size: float = 1.0) -> dict[str, Tensor]:
    return {"b": torch.full((40, 50), size, dtype=torch.float64), "a": torch.zeros(300, dtype=torch.float64)}


def test_each_row_has_a_coin_of_its_own() -> None:
    steps, rows, rate = 400, 50, 0.3
    drawn = torch.zeros(steps, rows, dtype=torch.float64)
    for step in range(steps):
        drawn[step, DRAWS.batch(step, rows, rate)] = 1.0
    error = math.sqrt(rate * (1 - rate) / (steps * rows))
    assert float(drawn.mean()) == pytest.approx(rate, abs=4 * error)
    sizes = drawn.sum(1)
    assert float(sizes.var()) == pytest.approx(rows * rate * (1 - rate), rel=0.3), "binomial, not fixed"
    for one, other in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):  # neighbours in a step, steps of a row
        both = float(((one - rate) * (other - rate)).mean())
        assert abs(both) <= 4 * rate * (1 - rate) / math.sqrt(one.numel())


@pytest.mark.parametrize(("rate", "expected"), [(0.0, []), (1.0, [*range(7)])])
def test_nobody_and_everybody(rate: float, expected: list[int]) -> None:
    assert DRAWS.batch(0, 7, rate) == expected


def test_a_batch_of_no_size_is_a_batch() -> None:
    assert any(not DRAWS.batch(step, 3, 0.1) for step in range(20))


@pytest.mark.parametrize(
    "other",
    [
        RecordDraws(b"t" * 32, DRAWS.run, 1),
        RecordDraws(DRAWS.secret, "another", 1),
        RecordDraws(DRAWS.secret, DRAWS.run, 2),
    ],
)
def test_draws_follow_from_secret_run_and_task(other: RecordDraws) -> None:
    assert DRAWS.batch(0, 200, 0.5) == DRAWS.batch(0, 200, 0.5) != other.batch(0, 200, 0.5)
    one, two = (draws.noisy_mean(0, total(), PRIVATE, 8.0) for draws in (DRAWS, other))
    assert not any(torch.equal(one[name], two[name]) for name in one)


def test_masks_follow_from_more_than_a_seed_and_from_the_step_too() -> None:
    words = DRAWS.dropout_words(0)
    assert 0 <= int(words.min()) < 2**28
    assert 2**32 - 2**28 <= int(words.max()) < 2**32
    others = [replace(DRAWS, secret=b"t" * 32), replace(DRAWS, run="another"), replace(DRAWS, task=2)]
    drawn = [words, DRAWS.dropout_words(1), *(one.dropout_words(0) for one in others)]
    assert torch.equal(words, DRAWS.dropout_words(0))
    assert len({tuple(one.tolist()) for one in drawn}) == len(drawn)
    assert DRAWS.secret.hex() not in repr(DRAWS)
    assert repr(DRAWS.secret) not in repr(DRAWS)


def test_noise_has_the_stated_size_and_lies_on_the_grid() -> None:
    noisy = DRAWS.noisy_mean(0, total(), PRIVATE, expected=8.0)
    noise = torch.cat([(8.0 * noisy[name] - exact).flatten() for name, exact in total().items()])
    assert float(noise.std()) == pytest.approx(2.0 * 0.5, abs=4 / math.sqrt(2 * len(noise)))
    assert float(noise.mean()) == pytest.approx(0.0, abs=4 / math.sqrt(len(noise)))
    cells = torch.cat([(8.0 * tensor).flatten() for tensor in noisy.values()]) / (GRID * 0.5)
    assert torch.equal(cells, cells.round())


def test_the_same_sum_has_the_same_noise_and_any_other_another() -> None:
    again = DRAWS.noisy_mean(0, total(), PRIVATE, 8.0)
    for name, tensor in DRAWS.noisy_mean(0, total(), PRIVATE, 8.0).items():
        assert torch.equal(tensor, again[name])
    for step, size in ((1, 1.0), (0, 1.0 + 2.0**-40)):
        other = DRAWS.noisy_mean(step, total(size), PRIVATE, 8.0)
        assert (other["a"] != again["a"]).double().mean() > 0.99, "the part that is equal has other noise too"
    other = DRAWS.noisy_mean(0, total(), replace(PRIVATE, multiplier=4.0), 8.0)
    alike = float((other["a"] * again["a"]).sum() / (other["a"].norm() * again["a"].norm()))
    assert abs(alike) < 0.3, "nor the same sum at two scales: their difference would tell it"


def test_a_step_expects_its_batch_or_all_rows() -> None:
    assert sampling_rate(200, 16) == 0.08
    assert sampling_rate(10, 16) == 1.0
    assert steps_cost(PRIVATE, 200, 16, 30) == SampledGaussian(0.08, 2.0, 30)


def test_only_noise_of_the_sites_is_for_records() -> None:
    assert for_records(PRIVATE) is PRIVATE
    assert for_records(Private(1.0, 1.0, 10)) is None
    assert for_records(None) is None
