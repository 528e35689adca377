"""Clients that differ along an axis of their texts (length, quality, amount, label, several at once), all else held equal on request.

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
from fedloom.data.partition import Indices, at_least, check, enough, generator, named
from fedloom.data.text_measures import Measure, labels, quality, words

Floats: TypeAlias = npt.NDArray[np.float64]
LEAST = (
    1e-12  # share of a bin: a draw of exactly 0 could not be scaled, and a product of three of them is still a number
)
ROUNDS, CLOSE = 2000, 1e-6  # of scaling, and how near to equal the totals are when it is over


@dataclass(frozen=True)
class Skew:
    """The clients' shares along one axis: quantile `bins` of what is measured, the shares of each from Dirichlet(alpha).

    Equal values are in one bin, so there may be fewer; `bins=None` gives each value its own. A measure that is the same for all
    (`ones`) has one bin: its skew is one of sizes.
    """

    of: Measure = words
    alpha: float = 0.5
    bins: int | None = 10

    def __post_init__(self) -> None:
        check(1, self.alpha)
        if self.bins is not None and self.bins < 1:
            raise Refused("partition.bins", self.bins, "choose a whole number of at least 1, or None for a bin a value")

    def bin(self, examples: Examples) -> Indices:
        """The number of each example's bin."""
        values = np.asarray(self.of(examples), dtype=np.float64)
        if self.bins is None:
            return np.unique(values, return_inverse=True)[1].astype(np.int64)
        edges = np.unique(np.quantile(values, np.arange(1, self.bins) / self.bins))
        return np.searchsorted(edges, values, side="right").astype(np.int64)


class Along(Protocol):
    """A partition by the skews of some axes."""

    @property
    def clients(self) -> int:
        """How many."""

    @property
    def smallest(self) -> int:
        """Examples that everybody has, before anything is held equal."""

    @property
    def equal(self) -> Measure | None:
        """The measure whose sum is to be the same at all clients."""

    @property
    def skews(self) -> tuple[Skew, ...]:
        """One an axis."""


@dataclass(frozen=True)
class LengthDirichlet:
    """Clients whose texts differ in length: quantile bins of `measure`, each divided by Dirichlet(alpha).

    `equal=ones` gives all clients as many examples (their amounts of text then differ), `equal=words` as many words, or tokens
    with the measure `Tokens` (their numbers of examples then differ), to within one example; some stay unused for that. None holds
    nothing equal and uses every example, and then every client has `smallest` of them. Source: CLLoRA, as at the top of this file.
    """

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8
    bins: int | None = 10
    equal: Measure | None = None
    measure: Measure = words

    def __post_init__(self) -> None:
        check(self.clients, self.alpha, self.smallest)

    @property
    def skews(self) -> tuple[Skew, ...]:
        """The one axis."""
        return (Skew(self.measure, self.alpha, self.bins),)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Client ids c00, c01, ... and their examples."""
        return divide(self, examples, examples, seed)


@dataclass(frozen=True)
class QualityDirichlet:
    """Clients whose texts differ in quality, as the examples state it (`Corrupted`, `Judged`); the fields as in `LengthDirichlet`."""

    clients: int = 20
    alpha: float = 0.5
    smallest: int = 8
    bins: int | None = 10
    equal: Measure | None = None

    def __post_init__(self) -> None:
        check(self.clients, self.alpha, self.smallest)

    @property
    def skews(self) -> tuple[Skew, ...]:
        """The one axis."""
        return (Skew(quality, self.alpha, self.bins),)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Client ids c00, c01, ... and their examples."""
        return divide(self, examples, examples, seed)


@dataclass(frozen=True)
class Mixture:
    """Clients that differ along several axes at once: a client's share of a cell is the product of its shares on each axis.

    So each axis keeps its own alpha whatever the others are. `Skew(ones, alpha)` makes the sizes differ, and
    `Skew(labels, alpha, None)` the labels.
    """

    clients: int = 20
    of: tuple[Skew, ...] = (Skew(words), Skew(labels, bins=None))
    smallest: int = 8
    equal: Measure | None = None

    def __post_init__(self) -> None:
        check(self.clients, smallest=self.smallest)
        if not self.of:
            raise Refused("partition.of", self.of, "name at least one axis, such as (Skew(words),)")

    @property
    def skews(self) -> tuple[Skew, ...]:
        """All axes."""
        return self.of

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Client ids c00, c01, ... and their examples."""
        return divide(self, examples, examples, seed)


@dataclass(frozen=True)
class Shuffled:
    """The null of a study: the same shares and totals, but each example has the axis values of another one, by seed.

    What such clients still do differently from IID ones is chance and not the axis. What is held equal is equal in truth.
    """

    inner: Along = field(default_factory=LengthDirichlet)

    def split(self, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
        """Client ids c00, c01, ... and their examples."""
        others = generator(seed, "shuffled").permutation(len(examples)).tolist()
        return divide(self.inner, examples.take(others), examples, seed)


def divide(how: Along, told: Examples, examples: Examples, seed: int) -> dict[str, tuple[int, ...]]:
    """Examples over clients by the axis values of `told`, which are the examples themselves or stand in for them one by one."""
    enough(examples, how.clients, how.smallest)
    binned = np.stack([np.unique(skew.bin(told), return_inverse=True)[1] for skew in how.skews])
    cells = np.unique(binned, axis=1, return_inverse=True)[1].reshape(-1)
    weights = np.ones(len(examples)) if how.equal is None else np.asarray(how.equal(examples), dtype=np.float64)
    first = np.unique(cells, return_index=True)[1]
    masses = np.bincount(cells, weights).astype(np.float64)

    def deal(attempt: int) -> list[Indices]:
        draw = generator(seed, "axis", str(attempt))
        each = [
            (draw.dirichlet([skew.alpha] * how.clients, own.max() + 1) + LEAST)[own[first]]
            for skew, own in zip(how.skews, binned, strict=True)
        ]
        shares = reduce(np.multiply, each)
        shares /= shares.sum(axis=1, keepdims=True)
        return _deal(draw, cells, weights, shares if how.equal is None else raked(shares, masses))

    piles = at_least(how.smallest, deal, generator(seed, "axis", "repair"))
    return named(piles if how.equal is None else _level(piles, weights, generator(seed, "axis", "level")))


def raked(shares: Floats, masses: Floats) -> Floats:
    """Shares (cells, clients) scaled until every client's total, weighed by `masses` of cells, is the same; rows still sum to 1.

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
    """Each example of a cell, in random order, to the client that is owed most; what rounding leaves is owed in the next cell."""
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
    """Random examples of each pile, as many as fit into the total of the lightest pile."""
    room = min(float(weights[pile].sum()) for pile in piles)
    kept = []
    for pile in piles:
        own, total = [], 0.0
        for index in draw.permutation(pile).tolist():
            if total + weights[index] <= room:
                own.append(index)
                total += weights[index]
        kept.append(np.array(own, dtype=np.int64))
    if not min(map(len, kept)):
        raise Refused(
            "partition.equal", room, "no example is as small as what the poorest client holds; use fewer clients"
        )
    return kept
