"""What canaries show of an epsilon: an estimate with its interval, a lower bound without any assumption, and an alarm.

A canary is a change, or a row, that somebody puts in on purpose to look for it in what is released; others, drawn alike, are left
out. The better the two are told apart, the larger the epsilon must be.

The estimate (Andrew et al., "One-shot empirical privacy estimation", arXiv 2302.03098, 2023) takes the scores for Gaussian: two
Gaussians that lie mu deviations apart have the epsilon of a release with that mu. A tight mechanism has an estimate above its epsilon
every other time, so the alarm goes by the lower end of the estimate: it is a fault, and not chance, where even that is above. The
lower bounds hold whatever the scores are. With some hundreds of canaries they show an epsilon of 4 or 5 at most: a small bound
does not say that little was learnt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from fedloom.audit.statistics import HALVINGS, binomial_tails, share_interval
from fedloom.core.mean_interval import Z95
from fedloom.privacy.accounting import gaussian_epsilon

CONFIDENCE = 0.95
ALARM = NormalDist().inv_cdf(0.9999)
"""Deviations of an estimate below it at which an alarm looks: one in ten thousand sound runs is suspected."""
LARGEST = 30.0
"""Epsilon above which a lower bound is not looked for: no number of canaries that fits into memory shows it."""


@dataclass(frozen=True, slots=True)
class EpsilonEstimate:
    """What canaries show of an epsilon at one delta.

    Fields:
        delta: of all epsilons here.
        canaries: how many were put in; as many were left out.
        separation: distance of the mean scores with and without, in deviations of a score (mu).
        estimate: epsilon of two Gaussians at that distance.
        low, high: 95 % interval of the estimate.
        surely: the lower end of the estimate that the alarm goes by: one in ten thousand sound mechanisms has it above epsilon.
        certified: lower bound of epsilon with 95 % confidence, whatever the scores' distribution.
    """

    delta: float
    canaries: int
    separation: float
    estimate: float
    low: float
    high: float
    surely: float
    certified: float

    def contradicts(self, epsilon: float) -> bool:
        """Whether so much was told that the mechanism cannot have this epsilon."""
        return self.surely > epsilon or self.certified > epsilon


def estimate_epsilon(inside: ArrayLike, outside: ArrayLike, delta: float, cuts: Sequence[float]) -> EpsilonEstimate:
    """Estimate an epsilon from the scores of canaries that were put in and of as many that were left out.

    Args:
        inside, outside: their scores, higher where a canary is more likely in; at least two of each.
        delta: the delta of the epsilon.
        cuts: scores above which a canary counts as in, chosen before the scores were seen; the bound is corrected for their number.

    Raises ValueError for fewer than two canaries.
    """
    with_, without = np.asarray(inside, float), np.asarray(outside, float)
    count = min(len(with_), len(without))
    if count < 2:
        raise ValueError("it takes two canaries on each side to estimate a spread")
    spread = math.sqrt((with_.var(ddof=1) + without.var(ddof=1)) / 2)
    mu = float(with_.mean() - without.mean()) / spread if spread else 0.0
    error = math.sqrt(2 / count + mu * mu / (4 * (count - 1)))

    def epsilon(separation: float) -> float:
        return gaussian_epsilon(max(0.0, separation), delta)

    return EpsilonEstimate(
        delta=delta,
        canaries=count,
        separation=mu,
        estimate=epsilon(mu),
        low=epsilon(mu - Z95 * error),
        high=epsilon(mu + Z95 * error),
        surely=epsilon(mu - ALARM * error),
        certified=certified_epsilon(with_, without, delta, cuts),
    )


def certified_epsilon(inside: ArrayLike, outside: ArrayLike, delta: float, cuts: Sequence[float]) -> float:
    """Return an epsilon that no (epsilon, delta)-private mechanism with a smaller one exceeds, with 95 % confidence.

    Of such a mechanism any guess has a rate of right alarms of at most e^epsilon times that of false ones, plus delta. Both rates
    are taken at the exact ends of their intervals, over all cuts and both directions (Jagielski et al., arXiv 2006.07709, 2020).
    """
    one, other, best = np.asarray(inside, float), np.asarray(outside, float), 0.0
    for cut in cuts:
        confidence = 1 - (1 - CONFIDENCE) / (2 * len(cuts))
        above, below = int((one > cut).sum()), int((other <= cut).sum())
        best = max(best, _ratio(above, len(one), len(other) - below, len(other), delta, confidence))
        best = max(best, _ratio(below, len(other), len(one) - above, len(one), delta, confidence))
    return best


def _ratio(right: int, of: int, wrong: int, among: int, delta: float, confidence: float) -> float:
    rightly, wrongly = share_interval(right, of, confidence)[0], share_interval(wrong, among, confidence)[1]
    return math.log((rightly - delta) / wrongly) if rightly > delta + wrongly else 0.0


def guessed_epsilon(rows: int, guesses: int, right: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound of epsilon from guesses in a single run which of `rows` rows were in, each by a fair coin of its own.

    Source: Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run", arXiv 2305.08846, 2023, theorem 5.2.

    Args:
        rows: rows that were in or out by a coin.
        guesses: how many of them a guess was made about; those that the attacker was least sure of may be left out.
        right: right guesses.
        delta: the delta of the epsilon.
        confidence: with which the bound holds.

    >>> guessed_epsilon(100, 100, 50, 1e-5)
    0.0
    """

    def explained(epsilon: float) -> bool:
        return _chance_of_guesses(rows, guesses, right, epsilon, delta) > 1 - confidence

    low, high = 0.0, LARGEST
    if explained(low):
        return 0.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if explained(middle) else (middle, high)
    return low


def _chance_of_guesses(rows: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return a bound of the chance that so many guesses are right where the mechanism has this epsilon and delta."""
    fair = 1 / (1 + math.exp(-epsilon))
    tails = binomial_tails(guesses, fair)
    enough, back = float(tails[right]), np.arange(1, right + 1)
    near = float(np.max((tails[right - back] - enough) / back, initial=0.0))
    return min(1.0, enough + 2 * rows * delta * near)
