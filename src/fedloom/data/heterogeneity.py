"""Heterogeneity of clients along each axis, from their summaries: indices of CLLoRA's axes, and their values by chance alone.

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
from fedloom.data.client_summary import LOSSES, Floats, Summary, bin_middles
from fedloom.data.partition import coefficient_of_variation, mean_divergence
from fedloom.data.private_histogram import noised

Measured: TypeAlias = Callable[[Floats], float]

TENTHS = 10
DEALS = 40
"""Random deals of all examples that chance is judged by."""
ALPHAS = 10 ** np.linspace(2, -2, 17)
DRAWS = 20  # Dirichlet draws for each alpha
LEAST = 1e-6  # of all texts: a client with less has none


@dataclass(frozen=True, slots=True)
class HeterogeneityIndex:
    """Heterogeneity along one axis.

    Fields:
        value: the index; the larger, the more uneven.
        chance: mean and 95th percentile of the index over random deals of the same examples to clients of the same sizes.
        alpha: concentration at which Dirichlet shares are as uneven (infinite where chance is enough, None for quality).
    """

    value: float
    chance: tuple[float, float]
    alpha: float | None


@dataclass(frozen=True, slots=True)
class Heterogeneity:
    """Indices of all axes; None where the clients' summaries lack an axis."""

    length: HeterogeneityIndex
    quantity: HeterogeneityIndex
    labels: HeterogeneityIndex | None
    quality: HeterogeneityIndex | None


def measure_heterogeneity(summaries: Sequence[Summary], seed: int = 0) -> Heterogeneity:
    """Measure how uneven these clients are; `seed` is that of the random deals.

    Raises:
        Refused: fewer than two clients, two of one name, one without examples, or lengths in different units.
    """
    _check(summaries)
    lengths, parts = np.array([summary.lengths for summary in summaries]), summaries[0].histograms
    epsilon = None if summaries[0].epsilon is None else summaries[0].epsilon / parts
    labels, qualities = label_table(summaries), quality_table(summaries)
    whole = lengths.sum(axis=0)
    in_tenths = tenths(lengths, whole)

    def length(counts: Floats) -> float:
        return mean_divergence(tenths(counts, whole))

    sizes = coefficient_of_variation(lengths.sum(axis=1))
    return Heterogeneity(
        length=_index(lengths, length, seed, epsilon, in_tenths),
        quantity=HeterogeneityIndex(sizes, (0.0, 0.0), _alpha_of_sizes(sizes, len(summaries))),
        labels=None if labels is None else _index(labels, mean_divergence, seed, epsilon, labels),
        quality=None if qualities is None else _index(qualities, _distance, seed, epsilon),
    )


def label_table(summaries: Sequence[Summary]) -> Floats | None:
    """Counts (clients, labels) over all names, sorted; None unless every summary has labels."""
    counts = [summary.labels for summary in summaries if summary.labels]
    names = sorted({name for row in counts for name in row})
    return (
        np.array([[row.get(name, 0.0) for name in names] for row in counts]) if len(counts) == len(summaries) else None
    )


def quality_table(summaries: Sequence[Summary]) -> Floats | None:
    """Counts (clients, bins of `LOSSES`); None unless every summary has quality."""
    counts = [summary.quality for summary in summaries if summary.quality]
    return np.array(counts) if len(counts) == len(summaries) else None


def tenths(counts: Floats, whole: Floats) -> Floats:
    """Join neighbouring columns to ten of about the same number of texts each; `whole` decides where to cut."""
    middle = (whole.cumsum() - whole / 2) / whole.sum()
    group = (TENTHS * middle).astype(int).clip(max=TENTHS - 1)
    return np.stack([counts[:, group == k].sum(axis=1) for k in range(TENTHS)], axis=1)


def _distance(counts: Floats) -> float:
    """Index of quality, H_qual, of a table by `LOSSES`."""
    values, sizes = bin_middles(LOSSES), counts.sum(axis=1)
    whole = counts.sum(axis=0) / sizes.sum()
    mean = float(whole @ values)
    spread = math.sqrt(float(whole @ (values - mean) ** 2))
    return float(abs(counts @ values / sizes - mean).mean()) / spread if spread > 1e-9 else 0.0


def _index(
    counts: Floats, measure: Measured, seed: int, epsilon: float | None, cells: Floats | None = None
) -> HeterogeneityIndex:
    """Index of a table of counts; `cells` is the table that a Dirichlet draw is to be compared with."""
    value = measure(counts)
    deals = [measure(_deal(counts, derive(seed, "deal", k), epsilon)) for k in range(DEALS)]
    chance = float(np.mean(deals)), float(np.quantile(deals, 0.95))
    alpha = None
    if cells is not None:
        alpha = math.inf if value <= chance[1] else _alpha(value - chance[0], cells, seed)
    return HeterogeneityIndex(value, chance, alpha)


def _deal(counts: Floats, seed: int, epsilon: float | None) -> Floats:
    """Deal all examples at random to clients of the same sizes, with the same noise."""
    draw = np.random.default_rng(seed)
    rest, rows = counts.sum(axis=0).astype(np.int64), list[Floats]()
    for size in counts.sum(axis=1).astype(np.int64):
        row = draw.multivariate_hypergeometric(rest, size, method="marginals")
        rows.append(row.astype(np.float64))
        rest = rest - row
    dealt: Floats = np.array(rows)
    if epsilon is not None:
        dealt = np.array([noised(row, epsilon, seed, str(k)) for k, row in enumerate(dealt.tolist())])
    return np.asarray(dealt[dealt.sum(axis=1) > 0])


def _alpha(excess: float, counts: Floats, seed: int) -> float:
    """Concentration at which columns of this weight, divided over as many clients, diverge by this much more than by chance."""
    whole = counts.sum(axis=0) / counts.sum()
    expected = []
    for alpha in ALPHAS.tolist():
        draw = np.random.default_rng(derive(seed, "alpha", f"{alpha:.3g}"))
        drawn = [(draw.dirichlet([alpha] * len(counts), len(whole)) * whole[:, None]).T for _ in range(DRAWS)]
        expected.append(np.mean([mean_divergence(part[part.sum(axis=1) > LEAST]) for part in drawn]))
    rising = np.maximum.accumulate(expected)
    return float(np.exp(np.interp(excess, rising, np.log(ALPHAS))))


def _alpha_of_sizes(cv: float, clients: int) -> float:
    """Concentration from CV^2 = (K - 1) / (K alpha + 1), for shares from a symmetric Dirichlet over K clients."""
    return max(0.0, ((clients - 1) / cv**2 - 1) / clients) if cv > 0 else math.inf


def _check(summaries: Sequence[Summary]) -> None:
    names = [summary.client for summary in summaries]
    if len(names) < 2:
        raise Refused(
            "clients",
            len(names),
            "one client cannot be compared; give the column that names clients, or more summaries",
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise Refused("summary.client", twice, "two summaries have this name; write one anew under another file name")
    empty = next((summary.client for summary in summaries if summary.examples < 1), None)
    if empty is not None:
        raise Refused("summary.client", empty, "it has no examples; leave it out")
    for what, kinds in (("unit", {each.unit for each in summaries}), ("epsilon", {each.epsilon for each in summaries})):
        if len(kinds) > 1:
            raise Refused(
                f"summary.{what}",
                sorted(map(str, kinds)),
                "all summaries must be made in the same way; write some anew",
            )
