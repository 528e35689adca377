"""Batches: every example once a pass, seeded, bucketed by length."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from fedloom.train.tokenised import POOL, epoch_batches, plan_batches

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=100)


def padded(lengths: list[int], made: list[list[int]]) -> int:
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in made)


@given(LENGTHS, st.integers(1, 20), st.booleans(), st.integers(0, 5))
def test_a_pass_holds_every_index_once(lengths: list[int], size: int, bucket: bool, number: int) -> None:
    made = epoch_batches(lengths, size, bucket, seed=1, number=number)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, made), reverse=True)[:-1] == [size] * (len(made) - 1)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 30), st.booleans())
def test_as_many_batches_as_steps_pass_after_pass(lengths: list[int], size: int, steps: int, bucket: bool) -> None:
    made = list(plan_batches(lengths, size, steps, bucket, seed=2))
    first = epoch_batches(lengths, size, bucket, 2, 0)
    assert len(made) == steps
    assert made[: len(first)] == first[:steps]


def test_the_seed_and_the_pass_decide_the_order() -> None:
    lengths = [5] * 50
    assert epoch_batches(lengths, 4, True, 1, 0) == epoch_batches(lengths, 4, True, 1, 0)
    assert epoch_batches(lengths, 4, True, 1, 0) != epoch_batches(lengths, 4, True, 2, 0)
    assert epoch_batches(lengths, 4, True, 1, 0) != epoch_batches(lengths, 4, True, 1, 1)


def test_buckets_pad_far_less() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(4, 128) for _ in range(16 * POOL * 4)]
    plain, bucketed = (padded(lengths, epoch_batches(lengths, 16, bucket, 3, 0)) for bucket in (False, True))
    assert sum(lengths) / plain < 0.6
    assert sum(lengths) / bucketed > 0.85


@given(LENGTHS, st.integers(1, 20), st.integers(0, 5))
def test_a_stratified_pass_holds_every_index_once(lengths: list[int], size: int, number: int) -> None:
    made = epoch_batches(lengths, size, True, seed=1, number=number, stratified=True)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert max(map(len, made)) - min(map(len, made)) <= 1
    assert max(map(len, made)) <= size


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 5))
def test_a_stratified_batch_has_one_example_of_each_stratum(count: int, size: int, number: int) -> None:
    """As many lengths as examples: the k-th shortest of every batch is among the k-th `count` shortest of all."""
    lengths = list(range(count * size))
    random.Random(number).shuffle(lengths)
    for batch in epoch_batches(lengths, size, True, seed=1, number=number, stratified=True):
        assert [own // count for own in sorted(lengths[i] for i in batch)] == list(range(size))
