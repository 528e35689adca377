"""Batches: all of one size, every example equally often, seeded, bucketed by length."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom.train.tokenised import POOL, plan_batches

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=100)


def useful(lengths: list[int], made: list[list[int]]) -> float:
    """The share of tokens that are no padding."""
    tokens = sum(lengths[i] for batch in made for i in batch)
    return tokens / sum(len(batch) * max(lengths[i] for i in batch) for batch in made)


def plan(
    lengths: list[int], size: int, steps: int, bucket: bool = True, seed: int = 1, stratified: bool = False
) -> list[list[int]]:
    return list(plan_batches(lengths, size, steps, bucket, seed, stratified))


@given(LENGTHS, st.integers(1, 20), st.integers(0, 30), st.booleans(), st.booleans())
def test_every_batch_is_full_and_examples_come_equally_often(
    lengths: list[int], size: int, steps: int, bucket: bool, stratified: bool
) -> None:
    """At any step, within one: no batch is smaller than the others, and no example is left out for long."""
    made, counts = plan(lengths, size, steps, bucket, stratified=stratified), Counter[int]()
    assert len(made) == steps
    for batch in made:
        assert len({*batch}) == len(batch) == min(size, len(lengths))
        counts.update(batch)
        assert max(counts.values()) - min(counts[i] for i in range(len(lengths))) <= 1
    assert made == plan(lengths, size, steps, bucket, stratified=stratified)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 20), st.integers(0, 20), st.booleans())
def test_fewer_steps_are_the_first_of_more(lengths: list[int], size: int, few: int, more: int, bucket: bool) -> None:
    assert plan(lengths, size, few + more, bucket)[:few] == plan(lengths, size, few, bucket)


def test_an_example_that_a_pass_leaves_over_is_never_alone() -> None:
    """17 examples in batches of 16: no step of any pass is on the one that is left."""
    assert {len(batch) for seed in range(20) for batch in plan([5] * 17, 16, 20, seed=seed)} == {16}


@pytest.mark.parametrize(("bucket", "stratified"), [(True, False), (False, False), (False, True)])
def test_what_a_pass_leaves_over_is_random(bucket: bool, stratified: bool) -> None:
    """Not the longest texts, nor the last rows: any of them."""
    lengths = list(range(1, 11))
    left = [{*range(10)} - {*plan(lengths, 9, 1, bucket, seed, stratified)[0]} for seed in range(200)]
    assert {i for one in left for i in one} == {*range(10)}


def test_the_seed_and_the_pass_decide_the_order() -> None:
    lengths = [5] * 48
    assert plan(lengths, 4, 12) != plan(lengths, 4, 12, seed=2)
    assert plan(lengths, 4, 24)[:12] != plan(lengths, 4, 24)[12:]


def test_buckets_pad_far_less() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(4, 128) for _ in range(16 * POOL * 4 + 5)]
    plain, bucketed = (plan(lengths, 16, 96, bucket, 3) for bucket in (False, True))
    assert useful(lengths, plain) < 0.6
    assert useful(lengths, bucketed) > 0.85


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 5))
def test_a_stratified_batch_has_one_example_of_each_stratum(count: int, size: int, number: int) -> None:
    """As many lengths as examples: the k-th shortest of every batch is among the k-th `count` shortest of all."""
    lengths = list(range(count * size))
    random.Random(number).shuffle(lengths)
    for batch in plan(lengths, size, 3 * count, stratified=True):
        assert [own // count for own in sorted(lengths[i] for i in batch)] == list(range(size))
