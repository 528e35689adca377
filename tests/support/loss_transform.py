"""A second oracle for epsilon: delta as an integral over the moment generating function of the loss, without a grid of losses.

With S the sum of the privacy losses of all events and M(s) = E exp(s S) their moment generating function,

    delta(epsilon) = E (1 - exp(epsilon - S))_+ = 1 / (2 pi i) integral of M(s) exp(-s epsilon) / (s (s + 1)) ds

over a vertical line with real part c > 0, since 1 / (s (s + 1)) is the Laplace transform of (1 - exp(-x))_+. M is a product over
events, so composition is exact; on the line through the saddle point little cancels. The sum over points of the line at equal
distances is, by Poisson's formula, delta plus terms that are positive and have a bound (`aliasing`), so it is never below. The line
goes on until its terms do not count, and the integral over outputs is exact to rounding; `finer` points show that both are.

Shares nothing with dp-accounting, which rounds losses to a grid and multiplies their Fourier transforms. That characteristic
functions do is the idea of Zhu, Dong and Wang, arXiv 2106.08567, 2022; the line is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedloom.privacy.accounting import Gaussian, Laplace, PrivacyEvent, SampledGaussian

Complex = NDArray[np.complex128]
LogMoments = Callable[[Complex], Complex]
"""Logarithm of the moment generating function of a loss, at complex arguments of positive real part."""
TAIL = 11.0
"""Deviations of the output beyond which a Gaussian density does not count (1e-27)."""
BLOCK = 128
"""Points of the line that are added up before asking whether more are needed."""
MOST_BLOCKS = 400
LAST_TERMS = 1e-13
"""Sum of the absolute terms of a block over the total, at which the line is left."""
FARTHEST = 500.0
"""Real part of the line at most."""
NOTHING = 1e-20
"""A delta below this is not computed but bounded."""


@dataclass(frozen=True, slots=True)
class Bracket:
    """A delta, and how far it can be from the truth.

    Fields:
        value: the sum over the points of the line, which is never below but for rounding; below `NOTHING` a bound from above.
        aliasing: bound of what the distance of the points adds.
        rest: size of the last block of terms, where the line was left.
    """

    value: float
    aliasing: float
    rest: float


def oracle_epsilon(events: Sequence[PrivacyEvent], delta: float, finer: int = 1) -> float:
    """The epsilon of the events at `delta`, for a record or a client that is added or taken away: that of the worse direction."""
    removed, added = (log_moments(events, direction) for direction in (False, True))
    epsilon = epsilon_in_direction(removed, delta, finer)
    if epsilon and chernoff(added, epsilon) <= delta:
        return epsilon
    return max(epsilon, epsilon_in_direction(added, delta, finer))


def chernoff(moments: LogMoments, epsilon: float) -> float:
    """A delta that is not exceeded: M(c) exp(-c epsilon) / (c + 1), since (1 - exp(-x))_+ is at most exp(c x) / (c + 1)."""
    c, height = saddle_point(moments, epsilon)
    return c * math.exp(height)


def epsilon_in_direction(moments: LogMoments, delta: float, finer: int = 1) -> float:
    """The epsilon at which the delta of this direction is `delta`; 0 where it is less at once.

    By Newton's method on log delta, which is concave, with bisection where a step leaves the interval.
    """
    low, high, at = 1e-9, math.inf, 1.0
    for _ in range(100):
        value = math.log(max(delta_of(moments, at, finer).value, 1e-300) / delta)
        low, high = (at, high) if value > 0 else (low, at)
        if high == math.inf:
            at *= 2
            continue
        slope = math.log(max(delta_of(moments, at * (1 + 1e-5), finer).value, 1e-300) / delta) - value
        step = at - value * at * 1e-5 / slope if slope < 0 else low
        after = step if low < step < high else (low + high) / 2
        if abs(after - at) <= 1e-13 * at or high <= 2e-9:
            return 0.0 if high <= 2e-9 else after
        at = after
    raise ArithmeticError("the epsilon was not found")


def log_moments(events: Sequence[PrivacyEvent], added: bool) -> LogMoments:
    """The sum of the logarithms of all events; the direction is that of a unit taken away, or added."""
    parts = [partial(_EVENTS[type(event)], event, added) for event in events]

    def total(s: Complex) -> Complex:
        return np.asarray(sum(part(s) for part in parts), dtype=np.complex128)

    return total


def gaussian_log_moments(event: Gaussian, added: bool, s: Complex) -> Complex:
    """The loss is normal with mean mu^2 / 2 and variance mu^2, in either direction."""
    return s * (s + 1) * event.mu**2 / 2


def laplace_log_moments(event: Laplace, added: bool, s: Complex) -> Complex:
    """The loss is epsilon with probability 1/2, -epsilon with exp(-epsilon) / 2, and exponential in between."""
    epsilon = event.epsilon
    between = np.exp(s * epsilon) * -np.expm1(-(1 + 2 * s) * epsilon) / (1 + 2 * s)
    return np.log((np.exp(s * epsilon) + np.exp(-(1 + s) * epsilon) + between) / 2)


def sampled_log_moments(event: SampledGaussian, added: bool, s: Complex) -> Complex:
    """With r(x) = 1 - q + q exp((2 x - 1) / (2 z^2)), the ratio of the densities with and without the record: E r^(1 + s), or E r^-s.

    By the trapezoidal rule over outputs x without the record, N(0, z^2). The integrand is analytic up to an imaginary part of pi z^2
    and oscillates no faster than Im(s) / z^2, so the error falls exponentially in the number of points.
    """
    rate, z = event.rate, event.multiplier
    end = TAIL * z + (0.0 if added else 1.0 + float(np.real(s).max()))
    fastest = float(np.imag(s).max()) / z**2 + 2 * TAIL / z + 12 / z**2
    outputs = np.linspace(-TAIL * z, end, math.ceil((end + TAIL * z) * fastest / math.pi) + 2)
    log_density = -((outputs / z) ** 2) / 2 - math.log(z * math.sqrt(2 * math.pi) / (outputs[1] - outputs[0]))
    log_ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * outputs - 1) / (2 * z * z))
    powers = np.outer(-s if added else 1 + s, log_ratio) + log_density
    top = np.real(powers).max(axis=1, keepdims=True)
    return np.asarray(event.steps * (np.log(np.exp(powers - top).sum(axis=1)) + top[:, 0]), dtype=np.complex128)


_EVENTS: dict[type, Callable[..., Complex]] = {
    Gaussian: gaussian_log_moments,
    Laplace: laplace_log_moments,
    SampledGaussian: sampled_log_moments,
}


def delta_of(moments: LogMoments, epsilon: float, finer: int = 1) -> Bracket:
    """The delta at an epsilon above 0, by the trapezoidal rule on the line through the saddle point.

    Args:
        moments: logarithm of the moment generating function.
        epsilon: the epsilon.
        finer: how many times closer the points are.
    """
    c, height = saddle_point(moments, epsilon)
    if c * math.exp(height) < NOTHING:
        return Bracket(c * math.exp(height), c * math.exp(height), 0.0)
    period = 2 * math.pi / c
    while aliasing(moments, epsilon, c, height, period) > 1e-15:
        period *= 1.5
    step = 2 * math.pi / (period * finer)
    total, rest = -0.5, 1.0
    for block in range(MOST_BLOCKS):
        line = np.asarray(c + 1j * step * np.arange(block * BLOCK, (block + 1) * BLOCK), dtype=np.complex128)
        terms = np.exp(_exponent(moments, epsilon, line) - height)
        total += float(np.real(terms).sum())
        rest = float(np.abs(terms).sum())
        if rest < LAST_TERMS * total * finer:
            break
    scale = step / math.pi * math.exp(height)
    return Bracket(total * scale, aliasing(moments, epsilon, c, height, period) * math.exp(height), rest * scale)


def aliasing(moments: LogMoments, epsilon: float, c: float, height: float, period: float) -> float:
    """A bound of what the distance of the points adds, over exp(height): delta(epsilon + k period) exp(c k period), all k but 0.

    Below, a delta is at most 1; above, at most M(a) exp(-a epsilon) for any a above c (Chernoff).
    """
    below = -c * period - height - math.log(-math.expm1(-c * period))
    bounds = [below]
    for wider in (1.1, 1.25, 1.5, 2.0):
        a = wider * c
        chernoff = float(np.real(moments(np.array([a + 0j])))[0]) - a * epsilon - height
        bounds.append(chernoff - (a - c) * period - math.log(-math.expm1(-(a - c) * period)))
    return math.exp(min(bounds[0], 700.0)) + math.exp(min(*bounds[1:], 700.0))


def saddle_point(moments: LogMoments, epsilon: float) -> tuple[float, float]:
    """Where the exponent is smallest on the positive real line, where it is convex, and its value; any point would be right.

    Losses have a bound where a unit is added; above it delta is 0, and the exponent falls for ever.
    """

    def value(at: float) -> float:
        return float(np.real(_exponent(moments, epsilon, np.array([at + 0j])))[0])

    high = 1e-2
    while high < FARTHEST and value(2 * high) < value(high):
        high *= 2
    low, high = high / 2, 2 * high
    share = (math.sqrt(5) - 1) / 2
    for _ in range(20):
        left, right = high - share * (high - low), low + share * (high - low)
        low, high = (low, right) if value(left) < value(right) else (left, high)
    return (low + high) / 2, value((low + high) / 2)


def _exponent(moments: LogMoments, epsilon: float, s: Complex) -> Complex:
    return moments(s) - s * epsilon - np.log(s * (s + 1))
