"""Partitions along an axis of the texts (length, quality, amount, label, several at once), with all else held equal on request.

CLLoRA (Zhang et al. 2025, arXiv 2502.18910) divides texts by Dirichlet along context length, quality and quantity, to see what each
does to local training and to the global model. It leaves the procedure open; ours: the axis is cut into quantile bins, the clients'
shares of a bin are Dirichlet(alpha), and shares are scaled until every client's total is the same (docs/decisions/0019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples
from fedloom.data.partition import (
    Indices,
    check_enough_examples,
    check_partition,
    deal_at_least,
    name_clients,
    partition_generator,
)
from fedloom.data.text_measures import Measure, labels, quality, words

Floats: TypeAlias = npt.NDArray[np.float64]
LEAST = (
    1e-12  # share of a bin: a draw of exactly 0 could not be scaled, and a product of three of them is still a number
)
ROUNDS, CLOSE = 2000, 1e-6  # of scaling, and how near to equal the totals are when it is over


@dataclass(frozen=True)
class Skew:
    """Skew along one axis: the clients' shares of each bin are from Dirichlet(alpha).

    Equal values are in one bin. A measure that is the same for all (`ones`) has one bin: its skew is one of sizes.

    Fields:
        of: measure of an example.
        alpha: concentration; the smaller, the more uneven.
        bins: quantile bins of the measure, of which there may be fewer; None gives each value its own.
    """

    of: Measure = words
    alpha: float = 0.5
    bins: int | None = 10

    def __post_init__(self) -> None:
        check_partition(1, self.alpha)
        if self.bins is not None and self.bins < 1:
            raise Refused("partition.bins", self.bins, "choose a whole number of at least 1, or None for a bin a value")

    def bin(self, examples: Examples) -> Indices:
        """Return the number of each example's bin."""
        values = np.asarray(self.of(examples), dtype=np.float64)
        if self.bins is None:
            return np.unique(values, return_inverse=True)[1].astype(np.int64)
        edges = np.unique(np.quantile(values, np.arange(1, self.bins) / self.bins))
        return np.searchsorted(edges, values, side="right").astype(np.int64)


class SkewedPartition(Protocol):
    """A partition by skews along some axes."""

    @property
    def clients(self) -> int:
        """Number of clients."""

    @property
    def smallest(self) -> int:
        """Examples that every client has at least, before anything is held equal."""

    @property
    def equal(self) -> Measure | None:
        """Measure whose sum is to be the same at all clients; None: nothing is held equal."""

    @property
    def skews(self) -> tuple[Skew, ...]:
        """Return the skews, one per axis."""


@dataclass(frozen=True)
class LengthDirichlet:
    """Clients whose texts differ in length: quantile bins of `measure`, each divided by Dirichlet(alpha).

    Source: CLLoRA, as at the top of this file.

    Fields:
        clients: number of clients.
        alpha: concentration; the smaller, the more uneven.
        smallest: examples that every client has at least, before anything is held equal.
        bins: quantile bins of the measure (None: one for each value).
        equal: `ones` gives all clients as many examples; their amounts of text then differ. `words` gives as many words, or tokens
            with the measure `Tokens`; their numbers of examples then differ. Both hold to within one example, and some examples stay
            unused. None holds nothing equal and uses every example.
        measure: length of an example.
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8
    bins: int | None = 10
    equal: Measure | None = None
    measure: Measure = words

    def __post_init__(self) -> None:
        check_partition(self.clients, self.alpha, self.smallest)

    @property
    def skews(self) -> tuple[Skew, ...]:
        """Skew of the one axis."""
        return (Skew(self.measure, self.alpha, self.bins),)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients c00, c01, ..."""
        return divide_along_axes(self, examples, examples, seed)


@dataclass(frozen=True)
class QualityDirichlet:
    """Clients whose texts differ in quality, as the examples state it (`Corrupted`, `Judged`).

    Fields:
        clients: number of clients.
        alpha: concentration; the smaller, the more uneven.
        smallest: examples that every client has at least, before anything is held equal.
        bins: quantile bins of the quality (None: one for each value).
        equal: what all clients have as much of, as in `LengthDirichlet` (None: nothing).
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8
    bins: int | None = 10
    equal: Measure | None = None

    def __post_init__(self) -> None:
        check_partition(self.clients, self.alpha, self.smallest)

    @property
    def skews(self) -> tuple[Skew, ...]:
        """Skew of the one axis."""
        return (Skew(quality, self.alpha, self.bins),)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients c00, c01, ..."""
        return divide_along_axes(self, examples, examples, seed)


@dataclass(frozen=True)
class Mixture:
    """Clients that differ along several axes at once: a client's share of a cell is the product of its shares on each axis.

    So each axis keeps its own alpha whatever the others are. `Skew(ones, alpha)` makes the sizes differ, and
    `Skew(labels, alpha, None)` the labels.

    Fields:
        clients, smallest, equal: as in `LengthDirichlet`.
        of: skews, one per axis.
    """

    clients: int = 20
    of: tuple[Skew, ...] = (Skew(words), Skew(labels, bins=None))
    smallest: int = 8
    equal: Measure | None = None

    def __post_init__(self) -> None:
        check_partition(self.clients, smallest=self.smallest)
        if not self.of:
            raise Refused("partition.of", self.of, "name at least one axis, such as (Skew(words),)")

    @property
    def skews(self) -> tuple[Skew, ...]:
        """Skews of all axes."""
        return self.of

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients c00, c01, ..."""
        return divide_along_axes(self, examples, examples, seed)


@dataclass(frozen=True)
class Shuffled:
    """Null model of a study: the same shares and totals, but each example has the axis values of another one, by seed.

    Where such clients still differ from IID ones, that is chance and not the axis. What is held equal is truly equal.

    Fields:
        inner: the partition whose axis is shuffled.
    """

    inner: SkewedPartition = field(default_factory=LengthDirichlet)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Divide the examples over clients c00, c01, ..."""
        others = partition_generator(seed, "shuffled").permutation(len(examples)).tolist()
        return divide_along_axes(self.inner, examples.take(others), examples, seed)


def divide_along_axes(
    how: SkewedPartition, axis_examples: Examples, examples: Examples, seed: int
) -> dict[str, tuple[int, ...]]:
    """Divide examples over clients by the axis values of `axis_examples`: the same examples, or others in their place one by one."""
    check_enough_examples(examples, how.clients, how.smallest)
    binned = np.stack([np.unique(skew.bin(axis_examples), return_inverse=True)[1] for skew in how.skews])
    cells = np.unique(binned, axis=1, return_inverse=True)[1].reshape(-1)
    weights = np.ones(len(examples)) if how.equal is None else np.asarray(how.equal(examples), dtype=np.float64)
    first = np.unique(cells, return_index=True)[1]
    masses = np.bincount(cells, weights).astype(np.float64)

    def deal(attempt: int) -> list[Indices]:
        draw = partition_generator(seed, "axis", str(attempt))
        each = [
            (draw.dirichlet([skew.alpha] * how.clients, bins.max() + 1) + LEAST)[bins[first]]
            for skew, bins in zip(how.skews, binned, strict=True)
        ]
        shares = reduce(np.multiply, each)
        shares /= shares.sum(axis=1, keepdims=True)
        return _deal(draw, cells, weights, shares if how.equal is None else rake_shares(shares, masses))

    piles = deal_at_least(how.smallest, deal, partition_generator(seed, "axis", "repair"))
    return name_clients(
        piles if how.equal is None else _level(piles, weights, partition_generator(seed, "axis", "level"))
    )


def rake_shares(shares: Floats, masses: Floats) -> Floats:
    """Scale shares (cells, clients) until every client's total, weighted by `masses` of cells, is the same; rows still sum to 1.

    Scaling whole columns and rows keeps all ratios (s_ak s_bl) / (s_al s_bk): who is drawn to which cell stays as it was drawn.
    Source: Deming and Stephan 1940, "On a least squares adjustment of a sampled frequency table"; exists for positive shares
    (Sinkhorn 1967).
    """
    wanted = masses.sum() / shares.shape[1]
    for _ in range(ROUNDS):
        totals = masses @ shares
        if abs(totals / wanted - 1).max() < CLOSE:
            break
        shares = shares * (wanted / totals)
        shares /= shares.sum(axis=1, keepdims=True)
    return shares


def _deal(draw: np.random.Generator, cells: Indices, weights: Floats, shares: Floats) -> list[Indices]:
    """Give each example of a cell, in random order, to the client that is owed most; rounding errors are made up in the next cell."""
    piles: list[list[int]] = [[] for _ in shares[0]]
    owed = np.zeros(shares.shape[1])
    for cell, share in enumerate(shares):
        members = np.flatnonzero(cells == cell)
        owed += weights[members].sum() * share
        for index in draw.permutation(members).tolist():
            client = int(owed.argmax())
            owed[client] -= weights[index]
            piles[client].append(index)
    return [np.array(pile, dtype=np.int64) for pile in piles]


def _level(piles: list[Indices], weights: Floats, draw: np.random.Generator) -> list[Indices]:
    """Keep random examples of each pile, as many as fit into the total of the lightest pile."""
    room = min(float(weights[pile].sum()) for pile in piles)
    levelled = []
    for pile in piles:
        chosen, total = [], 0.0
        for index in draw.permutation(pile).tolist():
            if total + weights[index] <= room:
                chosen.append(index)
                total += weights[index]
        levelled.append(np.array(chosen, dtype=np.int64))
    if not min(map(len, levelled)):
        raise Refused(
            "partition.equal", room, "no example is as small as what the poorest client holds; use fewer clients"
        )
    return levelled
