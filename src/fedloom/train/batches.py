"""Which examples share a batch: seeded, and bucketed by length so that little time goes into padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedloom.seeds import rng

POOL = 8
"""Batches that are sorted together. Larger pools pad less and mix less; 8 keeps about 90 % of the tokens useful."""


def epoch(lengths: Sequence[int], batch_size: int, bucket: bool, seed: int, number: int) -> list[list[int]]:
    """One pass over all examples as lists of indices: shuffled, sorted by length inside pools of `POOL` batches, shuffled again."""
    draw = rng(seed, "epoch", number)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if bucket:
        step = POOL * batch_size
        pools = [sorted(order[i : i + step], key=lambda j: lengths[j]) for i in range(0, len(order), step)]
        order = [j for pool in pools for j in pool]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if bucket:
        draw.shuffle(batches)
    return batches


def batches(lengths: Sequence[int], batch_size: int, steps: int, bucket: bool, seed: int) -> Iterator[list[int]]:
    """`steps` batches, pass after pass. The last batch of a pass may be smaller."""
    made, number = 0, 0
    while True:
        for batch in epoch(lengths, batch_size, bucket, seed, number):
            if made == steps:
                return
            yield batch
            made += 1
        number += 1
