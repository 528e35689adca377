"""Which examples share a batch: seeded, and bucketed by length so that little time goes into padding; or with all lengths in each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from fedloom.core.seeds import rng

POOL = 8
"""Batches that are sorted together. Larger pools pad less and mix less; 8 keeps about 90 % of the tokens useful."""


def epoch(
    lengths: Sequence[int], batch_size: int, bucket: bool, seed: int, number: int, stratified: bool = False
) -> list[list[int]]:
    """One pass over all examples as lists of indices: shuffled, sorted by length inside pools of `POOL` batches, shuffled again.

    `stratified` batches have one example of each stratum instead: of the shortest, the next longer ones, and so on.
    """
    draw = rng(seed, "epoch", number)
    order = list(range(len(lengths)))
    draw.shuffle(order)
    if stratified:
        return _stratified(sorted(order, key=lambda j: lengths[j]), batch_size, draw)
    if bucket:
        step = POOL * batch_size
        pools = [sorted(order[i : i + step], key=lambda j: lengths[j]) for i in range(0, len(order), step)]
        order = [j for pool in pools for j in pool]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if bucket:
        draw.shuffle(batches)
    return batches


def _stratified(order: list[int], batch_size: int, draw: random.Random) -> list[list[int]]:
    """Batches of as nearly the same size as can be, which take from consecutive strata of `order`."""
    count = -(-len(order) // batch_size)
    made: list[list[int]] = [[] for _ in range(count)]
    for start in range(0, len(order), count):
        stratum = order[start : start + count]
        for batch, j in zip(draw.sample(made, len(stratum)), stratum, strict=True):
            batch.append(j)
    return made


def batches(
    lengths: Sequence[int], batch_size: int, steps: int, bucket: bool, seed: int, stratified: bool = False
) -> Iterator[list[int]]:
    """`steps` batches, pass after pass. The last batch of a pass may be smaller."""
    made, number = 0, 0
    while True:
        for batch in epoch(lengths, batch_size, bucket, seed, number, stratified):
            if made == steps:
                return
            yield batch
            made += 1
        number += 1
