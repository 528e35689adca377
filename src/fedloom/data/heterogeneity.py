"""How uneven clients are along each axis, from their summaries: indices of CLLoRA's axes, beside what chance alone would give.

H_len = mean_k JS(P_k(length bin) || P(length bin)), H_qual = mean_k |mean u on k - mean u| / sd(u), H_n = CV(n_k); labels by the same
divergence as lengths. Which lengths make a bin is ours: tenths of all texts, to within a bin of the summaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fedloom.core.errors import Refused
from fedloom.core.seeds import derive
from fedloom.data.client_summary import LOSSES, Floats, Summary, middles
from fedloom.data.partition import divergence, variation
from fedloom.data.private_histogram import noised

Measured: TypeAlias = Callable[[Floats], float]

TENTHS = 10
DEALS = 40
"""Random deals of all examples that chance is judged by."""
ALPHAS = 10 ** np.linspace(2, -2, 17)
DRAWS = 20  # Dirichlet draws for each alpha
LEAST = 1e-6  # of all texts: a client with less has none


@dataclass(frozen=True, slots=True)
class Index:
    """How uneven; `chance` is the mean and the 95th percentile over random deals of the same examples to clients of the same sizes.

    `alpha` is the concentration at which Dirichlet shares are as uneven: infinite where chance is enough, None for quality.
    """

    value: float
    chance: tuple[float, float]
    alpha: float | None


@dataclass(frozen=True, slots=True)
class Unevenness:
    """Of each axis; None where the clients do not tell of it."""

    length: Index
    quantity: Index
    labels: Index | None
    quality: Index | None


def unevenness(summaries: Sequence[Summary], seed: int = 0) -> Unevenness:
    """Of these clients; `seed` is that of the random deals.

    Raises:
        Refused: fewer than two clients, two of one name, one without examples, or lengths in different units.
    """
    _check(summaries)
    lengths, parts = np.array([own.lengths for own in summaries]), summaries[0].histograms
    epsilon = None if summaries[0].epsilon is None else summaries[0].epsilon / parts
    labels, qualities = label_table(summaries), quality_table(summaries)
    whole = lengths.sum(axis=0)
    in_tenths = tenths(lengths, whole)

    def length(counts: Floats) -> float:
        return divergence(tenths(counts, whole))

    sizes = variation(lengths.sum(axis=1))
    return Unevenness(
        length=_index(lengths, length, seed, epsilon, in_tenths),
        quantity=Index(sizes, (0.0, 0.0), _alpha_of_sizes(sizes, len(summaries))),
        labels=None if labels is None else _index(labels, divergence, seed, epsilon, labels),
        quality=None if qualities is None else _index(qualities, _distance, seed, epsilon),
    )


def label_table(summaries: Sequence[Summary]) -> Floats | None:
    """Counts (clients, labels) over all names, sorted; None unless every client tells of its labels."""
    told = [own.labels for own in summaries if own.labels]
    names = sorted({name for own in told for name in own})
    return np.array([[own.get(name, 0.0) for name in names] for own in told]) if len(told) == len(summaries) else None


def quality_table(summaries: Sequence[Summary]) -> Floats | None:
    """Counts (clients, bins); None unless every client tells of its quality."""
    told = [own.quality for own in summaries if own.quality]
    return np.array(told) if len(told) == len(summaries) else None


def tenths(counts: Floats, whole: Floats) -> Floats:
    """Neighbouring columns together, until there are ten of about the same number of texts each; `whole` decides where to cut."""
    middle = (whole.cumsum() - whole / 2) / whole.sum()
    group = (TENTHS * middle).astype(int).clip(max=TENTHS - 1)
    return np.stack([counts[:, group == k].sum(axis=1) for k in range(TENTHS)], axis=1)


def _distance(counts: Floats) -> float:
    """H_qual of a table by `LOSSES`."""
    values, sizes = middles(LOSSES), counts.sum(axis=1)
    whole = counts.sum(axis=0) / sizes.sum()
    mean = float(whole @ values)
    spread = math.sqrt(float(whole @ (values - mean) ** 2))
    return float(abs(counts @ values / sizes - mean).mean()) / spread if spread > 1e-9 else 0.0


def _index(counts: Floats, measure: Measured, seed: int, epsilon: float | None, cells: Floats | None = None) -> Index:
    """`cells` is the table that a Dirichlet draw is to be compared with."""
    value = measure(counts)
    deals = [measure(_deal(counts, derive(seed, "deal", k), epsilon)) for k in range(DEALS)]
    chance = float(np.mean(deals)), float(np.quantile(deals, 0.95))
    alpha = None
    if cells is not None:
        alpha = math.inf if value <= chance[1] else _alpha(value - chance[0], cells, seed)
    return Index(value, chance, alpha)


def _deal(counts: Floats, seed: int, epsilon: float | None) -> Floats:
    """All examples dealt at random to clients of the same sizes, with the same noise."""
    draw = np.random.default_rng(seed)
    rest, rows = counts.sum(axis=0).astype(np.int64), list[Floats]()
    for size in counts.sum(axis=1).astype(np.int64):
        own = draw.multivariate_hypergeometric(rest, size, method="marginals")
        rows.append(own.astype(np.float64))
        rest = rest - own
    dealt: Floats = np.array(rows)
    if epsilon is not None:
        dealt = np.array([noised(row, epsilon, seed, str(k)) for k, row in enumerate(dealt.tolist())])
    return np.asarray(dealt[dealt.sum(axis=1) > 0])


def _alpha(excess: float, counts: Floats, seed: int) -> float:
    """The concentration at which columns of this weight, divided over as many clients, diverge by this much more than by chance."""
    whole = counts.sum(axis=0) / counts.sum()
    expected = []
    for alpha in ALPHAS.tolist():
        draw = np.random.default_rng(derive(seed, "alpha", f"{alpha:.3g}"))
        drawn = [(draw.dirichlet([alpha] * len(counts), len(whole)) * whole[:, None]).T for _ in range(DRAWS)]
        expected.append(np.mean([divergence(own[own.sum(axis=1) > LEAST]) for own in drawn]))
    rising = np.maximum.accumulate(expected)
    return float(np.exp(np.interp(excess, rising, np.log(ALPHAS))))


def _alpha_of_sizes(cv: float, clients: int) -> float:
    """CV^2 = (K - 1) / (K alpha + 1) for shares from a symmetric Dirichlet over K clients."""
    return max(0.0, ((clients - 1) / cv**2 - 1) / clients) if cv > 0 else math.inf


def _check(summaries: Sequence[Summary]) -> None:
    names = [own.client for own in summaries]
    if len(names) < 2:
        raise Refused(
            "clients",
            len(names),
            "one client cannot be compared; give the column that names clients, or more summaries",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused("summary.client", twice, "two summaries have this name; write one anew under another file name")
    empty = next((own.client for own in summaries if own.examples < 1), None)
    if empty is not None:
        raise Refused("summary.client", empty, "it tells of no examples; leave it out")
    for what, kinds in (("unit", {own.unit for own in summaries}), ("epsilon", {own.epsilon for own in summaries})):
        if len(kinds) > 1:
            raise Refused(
                f"summary.{what}", sorted(map(str, kinds)), "all clients must tell in the same way; write some anew"
            )
