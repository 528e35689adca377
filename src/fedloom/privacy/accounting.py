"""Accounting: the epsilon of everything that was released about one unit, which is never below the truth.

An event is one release, or several, seen from one unit: a client, or a record of a site. The events of a unit are composed as one
adaptive mechanism; events about units of disjoint data are not added up (the largest counts).

Gaussian events alone have a closed form (Dong, Roth and Su, arXiv 1905.02383, Corollary 2.13, and Balle and Wang, arXiv 1805.06530,
Theorem 8): their `mu` add as squares. With any other event the library `dp-accounting` composes privacy loss distributions, rounded
up throughout. It is an extra: `pip install 'fedloom[privacy]'`.

Amplification by sampling is claimed for `SampledGaussian` only: each record is in a step by a coin of its own that nobody else knows.
The answers of clients are chosen by their speed and by the server, so their events are `Gaussian`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fedloom.core.errors import Refused

INTERVAL = 1e-4
"""Step of the grid on which privacy losses are rounded up, where they are composed numerically, at most."""
FINENESS = 4e-4
"""That step times the root of the number of events: what rounding adds to epsilon grows as events times its square."""
GRID_SIZE = 8e6
"""Steps of that grid that one event may take; a wider one gets a coarser grid, and a larger epsilon."""
ROUND_UP = 1e-8
"""Share by which an epsilon in closed form is raised: above its own rounding, and above what the grid adds to the library's."""
STEP_ERROR = 1e-15
"""Error of a probability in one composition of the library, by its Fourier transform; it is taken off delta."""
UNIT_ROUNDOFF = 2.0**-53
SMALLEST = 2.0**-1000
"""Bound on what of a probability is lost where it is too small for a number."""
TOO_LARGE = 1e4
"""An epsilon above which nothing is computed: it protects nobody, and counts as infinite."""


@dataclass(frozen=True, slots=True)
class Gaussian:
    """One release with Gaussian noise, or several that are equal to one.

    Fields:
        mu: how far one unit can move what is released, in standard deviations of the noise (at least 0). k answers of one client,
            each with noise of z times what it can change, have sqrt(k) / z.
    """

    mu: float

    def __post_init__(self) -> None:
        _require("mu", self.mu, self.mu >= 0, "how far one unit moves a release, in deviations of its noise: 0 or more")


@dataclass(frozen=True, slots=True)
class SampledGaussian:
    """Steps of training on records that were drawn by secret coins (Poisson sampling), with Gaussian noise on the sum.

    Fields:
        rate: probability that a record is in a step (0 to 1).
        multiplier: standard deviation of the noise over what one record can change (above 0).
        steps: number of steps (at least 0).
    """

    rate: float
    multiplier: float
    steps: int = 1

    def __post_init__(self) -> None:
        _require("rate", self.rate, 0 <= self.rate <= 1, "the probability that a record is in a step: 0 to 1")
        _require("multiplier", self.multiplier, self.multiplier > 0, "the noise over what one record changes: above 0")
        _require("steps", self.steps, self.steps >= 0, "the number of steps: 0 or more")


@dataclass(frozen=True, slots=True)
class Laplace:
    """A release with continuous Laplace noise.

    Fields:
        epsilon: how far one unit can move it (sum of absolute changes) over the scale of the noise (at least 0).
    """

    epsilon: float

    def __post_init__(self) -> None:
        _require("epsilon", self.epsilon, self.epsilon >= 0, "what one unit changes over the scale of the noise")


@dataclass(frozen=True, slots=True)
class PureEpsilon:
    """A release by any mechanism that is epsilon-private without a delta: geometric noise on a count, a randomised response.

    It is composed as the worst such mechanism (Kairouz, Oh and Viswanath, arXiv 1311.0776), which loses epsilon or gains it.

    Fields:
        epsilon: its epsilon (at least 0).
    """

    epsilon: float

    def __post_init__(self) -> None:
        _require("epsilon", self.epsilon, self.epsilon >= 0, "the epsilon of the mechanism: 0 or more")


PrivacyEvent: TypeAlias = Gaussian | SampledGaussian | Laplace | PureEpsilon


def _require(field: str, value: float, fits: bool, remedy: str) -> None:
    if not (fits and math.isfinite(value)):
        raise Refused(field, value, remedy)


def epsilon_of(events: Iterable[PrivacyEvent], delta: float, fine: bool = False) -> float:
    """Return the smallest epsilon for which all events together are (epsilon, delta)-private, rounded up; `inf` above `TOO_LARGE`.

    Args:
        events: all that was released about one unit.
        delta: probability that the bound may fail (above 0, below 1).
        fine: round up by no more than about 1e-6 also over thousands of sampled steps, which may take a minute. Else it is as
            much as the library does by default: some 1e-5 over a thousand steps, 2e-4 over ten thousand that are drawn seldom.

    Raises:
        Refused: delta is none, or so small that the library's rounding would count; or the library is missing and needed.
    """
    _require(
        "delta", delta, 0 < delta < 1, "the probability with which the bound may fail: above 0, below 1; 1e-5 is usual"
    )
    merged = merged_events(events)
    mu = sum(event.mu for event in merged if isinstance(event, Gaussian))  # there is one at most
    rest = [event for event in merged if not isinstance(event, Gaussian)]
    return _composed_epsilon(mu, rest, delta, fine) if rest else gaussian_epsilon(mu, delta)


def merged_events(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Return fewer events that are equal to these: one Gaussian, one of each kind of step, no event that tells nothing."""
    squares, steps, others = list[float](), Counter[tuple[float, float]](), list[PrivacyEvent]()
    for event in events:
        match event:
            case Gaussian(mu):
                squares.append(mu * mu)
            case SampledGaussian(rate, multiplier, count) if rate == 1:
                squares.append(count / multiplier**2)
            case SampledGaussian(rate, multiplier, count) if rate > 0 and count:
                steps[rate, multiplier] += count
            case Laplace(epsilon) | PureEpsilon(epsilon) if epsilon > 0:
                others.append(event)
    total = math.sqrt(math.fsum(squares))
    sampled = [SampledGaussian(rate, multiplier, count) for (rate, multiplier), count in steps.items()]
    return (*([Gaussian(total)] if total else ()), *sampled, *others)


def multiplier_for(epsilon: float, delta: float, events_at: Callable[[float], Sequence[PrivacyEvent]]) -> float:
    """Return the smallest noise multiplier, rounded up in its fourth digit, whose events stay within the budget.

    Args:
        epsilon, delta: the budget.
        events_at: the events at a multiplier; more noise must not cost more.

    Raises Refused where no multiplier up to 10,000 is enough.

    >>> multiplier_for(8, 1e-5, lambda z: [Gaussian(math.sqrt(10) / z)])
    1.899
    """
    _require("epsilon", epsilon, epsilon > 0, "the largest loss of privacy that is accepted: above 0; 1 to 8 is usual")

    def excess(multiplier: float) -> float:
        """The logarithm of what is spent over the budget, for numbers that it can be taken of."""
        return math.log(min(max(epsilon_of(events_at(multiplier), delta), 1e-9), TOO_LARGE) / epsilon)

    low, high = 1.0, 1.0
    above = below = excess(1.0)
    while below > 0:
        low, above, high = high, below, 2 * high
        if high > 10_000:
            raise Refused("epsilon", epsilon, "no noise is enough for it; accept fewer answers, or more epsilon")
        below = excess(high)
    while above <= 0:
        high, below, low = low, above, low / 2
        if low < 1e-3:
            raise Refused("epsilon", epsilon, "it is met without noise; accept less epsilon, or count more answers")
        above = excess(low)
    high = _crossing(excess, (low, above), (high, below))
    digits = 3 - math.floor(math.log10(high))
    return math.ceil(high * 10.0**digits) / 10.0**digits


def _crossing(excess: Callable[[float], float], low: tuple[float, float], high: tuple[float, float]) -> float:
    """Return where a falling function is not above 0 any more, from above, to 2e-4 of it, by false position (Illinois rule)."""
    (left, above), (right, below), last = low, high, 0
    while right - left > 2e-4 * right:
        weight = min(max(above / (above - below), 0.05), 0.95)
        middle = left * (right / left) ** weight
        value = excess(middle)
        if value > 0:
            left, above, below, last = middle, value, below / 2 if last > 0 else below, 1
        else:
            right, below, above, last = middle, value, above / 2 if last < 0 else above, -1
    return right


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon of a Gaussian release at `delta`, rounded up; 0 where it is within delta as it is.

    >>> [round(gaussian_epsilon(mu, 1e-5), 5) for mu in (1.0, math.sqrt(10) / 4)]
    [4.37718, 3.34141]
    """
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, mu) > delta:
        low, high = high, 2 * high
        if high > TOO_LARGE:
            return math.inf
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if gaussian_delta(middle, mu) <= delta else (middle, high)
    return high * (1 + ROUND_UP)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the smallest delta of a Gaussian release at `epsilon`, plus a bound on its own rounding (mu above 0).

    It is Phi(-t) - exp(epsilon) Phi(-t - mu) with t = epsilon / mu - mu / 2. The second term is phi(t) R(t + mu), R the ratio of
    Mills: no large number meets a small one.
    """
    t = epsilon / mu - mu / 2
    first = math.erfc(t / math.sqrt(2)) / 2
    second = math.exp(-t * t / 2) / math.sqrt(2 * math.pi) * _mills_ratio(epsilon / mu + mu / 2)
    return first - second + 16 * UNIT_ROUNDOFF * (4 + t * t) * (first + second) + SMALLEST


def _mills_ratio(x: float) -> float:
    """Return Phi(-x) / phi(x) for x of at least 0: from erfc where it is exact, else by Laplace's continued fraction."""
    if x < 4:
        return math.sqrt(math.pi / 2) * math.exp(x * x / 2) * math.erfc(x / math.sqrt(2))
    tail = x
    for k in range(100, 0, -1):
        tail = x + k / tail
    return 1 / tail


def _composed_epsilon(mu: float, rest: Sequence[PrivacyEvent], delta: float, fine: bool) -> float:
    """Return the epsilon of a Gaussian and of other events, by privacy loss distributions that are rounded up."""
    library = _library()
    count = 1 + sum(event.steps if isinstance(event, SampledGaussian) else 1 for event in rest)
    error = STEP_ERROR * count
    if delta < 1000 * error:
        raise Refused(
            "delta", delta, f"it is too small to be computed over {count:,} steps; {1000 * error:.0e} or more"
        )
    accountant = library.pld.PLDAccountant(value_discretization_interval=_interval(rest, count if fine else 1))
    if mu:
        accountant.compose(library.GaussianDpEvent(1 / mu))
    for event in rest:
        accountant.compose(*_as_library_event(library, event))
    epsilon = float(accountant.get_epsilon(delta - error))
    return epsilon if epsilon <= TOO_LARGE else math.inf


def _interval(rest: Sequence[PrivacyEvent], count: int) -> float:
    """Return the step of the grid for so many events; it is coarser where one with little noise spreads wide."""
    multipliers = [event.multiplier for event in rest if isinstance(event, SampledGaussian)]
    return max([min(INTERVAL, FINENESS / math.sqrt(count)), *((one**-2 + 20 / one) / GRID_SIZE for one in multipliers)])


def _as_library_event(library: Any, event: PrivacyEvent) -> tuple[Any, int]:
    """Return an event as one of `dp-accounting`, and how often it happened."""
    match event:
        case SampledGaussian(rate, multiplier, steps):
            return library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(multiplier)), steps
        case Laplace(epsilon):
            return library.LaplaceDpEvent(1 / epsilon), 1
        case PureEpsilon(epsilon):
            return library.dp_event.DiscreteLaplaceDpEvent(
                epsilon, 1
            ), 1  # on a count it loses exactly epsilon, or gains it
        case Gaussian(mu):
            return library.GaussianDpEvent(1 / mu), 1


def _library() -> Any:
    """Return dp-accounting, imported when it is first needed. Raises Refused where it is missing."""
    try:
        import dp_accounting
        import dp_accounting.pld
    except ImportError as error:
        remedy = "sampling and Laplace noise are accounted by dp-accounting 0.6.0: pip install 'fedloom[privacy]'"
        raise Refused("privacy", str(error), remedy) from error
    return dp_accounting
