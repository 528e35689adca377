"""Histograms of a client's labels with noise, and of topics where examples have no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedloom.core.errors import Refused
from fedloom.core.seeds import derive, rng
from fedloom.core.types import ClientId

ROUNDS = 100  # of k-means, at most; it is over when no point changes its centre


def noised(counts: Sequence[float], epsilon: float, seed: int, client: ClientId) -> tuple[float, ...]:
    """Add Laplace noise of scale 1 / `epsilon` to each count, round, and cut at 0; done by the client itself.

    This one answer has `epsilon`-differential privacy of one example of the client. Adding or removing an example changes one count
    by 1, which is the sensitivity. Exchanging an example changes two counts: 2 `epsilon`. Answers add up: two histograms cost twice
    as much. Rounding keeps the low bits of the noise from revealing what it was added to, and costs no privacy, nor does
    cutting at 0. The number of examples, if it is sent as well, is not covered. The draws follow `seed`: for real privacy it is the
    client's own secret. Source: Dwork and Roth, "The algorithmic foundations of differential privacy", 2014, Thm. 3.6.

    Raises:
        Refused: `epsilon` is not positive.
    """
    if not 0 < epsilon < math.inf:
        raise Refused("epsilon", epsilon, "a positive number; the smaller, the more private")
    draw = rng(seed, "histogram", client)
    # the difference of two exponential draws is Laplace
    drawn = [draw.expovariate(epsilon) - draw.expovariate(epsilon) for _ in counts]
    return tuple(float(max(round(count + noise), 0)) for count, noise in zip(counts, drawn, strict=True))


def topics(embeddings: Mapping[ClientId, Tensor], count: int, seed: int) -> dict[ClientId, tuple[float, ...]]:
    """Count each client's examples of `count` topics: an example's topic is the nearest of the centres of all clients' examples.

    `embeddings` are one row per example, (examples, width), from a frozen base model. They are pooled here, which a simulation may
    do. If they must not leave a client, find `centres` of public texts. Then each client calls `count_topics` and `noised` itself.

    Raises:
        Refused: fewer examples than topics.
    """
    pool = torch.cat([embeddings[client] for client in sorted(embeddings)])
    middle = centres(pool, count, seed)
    return {client: count_topics(points, middle) for client, points in embeddings.items()}


def count_topics(points: Tensor, middle: Tensor) -> tuple[float, ...]:
    """Count the rows of `points` (n, width) by the nearest row of `middle` (topics, width)."""
    return tuple(
        map(float, torch.bincount(nearest_centre(normalize(points.double()), middle), minlength=len(middle)).tolist())
    )


def centres(points: Tensor, count: int, seed: int) -> Tensor:
    """Find the centres of k-means by direction, (count, width), float64 and of length 1; initialised as k-means++ (Arthur 2007).

    Raises:
        Refused: fewer points than centres.
    """
    if not 1 <= count <= len(points):
        raise Refused("topics", count, f"there are {len(points)} examples; choose between 1 and that many topics")
    rows = normalize(points.double())
    generator = torch.Generator().manual_seed(derive(seed, "topics"))
    middle = rows[torch.randint(len(rows), (1,), generator=generator)]
    while len(middle) < count:
        far = (1.0 - rows @ middle.T).amin(1).clamp(min=1e-12)
        middle = torch.cat([middle, rows[torch.multinomial(far, 1, generator=generator)]])
    nearest = nearest_centre(rows, middle)
    for _ in range(ROUNDS):
        sums = torch.zeros_like(middle).index_add(0, nearest, rows)
        empty = torch.bincount(nearest, minlength=count) == 0
        middle = torch.where(empty[:, None], middle, normalize(sums))
        before, nearest = nearest, nearest_centre(rows, middle)
        if torch.equal(nearest, before):
            break
    return middle


def nearest_centre(rows: Tensor, middle: Tensor) -> Tensor:
    """Return the number of the centre with the smallest angle to each row."""
    return (rows @ middle.T).argmax(1)
