"""Staleness of an answer, the number of versions made since the one that it was trained from, and how much it then counts.

A schedule multiplies an answer's weight, or its step, by `discount(staleness(fleet, update))`. Besides the discount,
`FedBuff.delay_threshold` divides the step by the largest staleness in the buffer, and `max_staleness` cancels work. Aggregators see
the resulting weights and step only.

Source: Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, 2019, section 5.2 (constant, polynomial, hinge);
FedBuff, arXiv 2106.06639, section 4 uses the polynomial with exponent 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet
from fedloom.core.types import Update

Discount: TypeAlias = Callable[[int], float]
"""staleness (versions) -> factor in (0, 1], which is 1 for a fresh answer."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A factor of 1, however stale an answer is."""

    def __call__(self, staleness: int) -> float:
        """Return the factor of an answer of this staleness."""
        return 1.0


@dataclass(frozen=True, slots=True)
class Polynomial:
    """A factor of (1 + staleness) ** -exponent.

    Fields:
        exponent: how fast stale answers lose weight (0: never).
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        if not self.exponent >= 0:
            raise Refused("schedule.discount.exponent", self.exponent, "0 counts all alike, 0.5 is usual")

    def __call__(self, staleness: int) -> float:
        """Return the factor of an answer of this staleness."""
        return float((1 + staleness) ** -self.exponent)


@dataclass(frozen=True, slots=True)
class Hinge:
    """A factor of 1 up to `grace` versions, then 1 / (slope (staleness - grace) + 1).

    Fields:
        slope: how fast older answers lose weight.
        grace: versions that cost nothing.
    """

    slope: float = 10.0
    grace: int = 4

    def __post_init__(self) -> None:
        if not self.slope >= 0:
            raise Refused("schedule.discount.slope", self.slope, "0 counts all alike, 10 is the paper's")
        if self.grace < 0:
            raise Refused("schedule.discount.grace", self.grace, "a number of versions: 0 or more")

    def __call__(self, staleness: int) -> float:
        """Return the factor of an answer of this staleness."""
        return 1.0 if staleness <= self.grace else 1.0 / (self.slope * (staleness - self.grace) + 1.0)


CONSTANT, SQUARE_ROOT = Constant(), Polynomial(0.5)


def staleness(fleet: Fleet, update: Update) -> int:
    """Return the number of versions made since the one that this answer was trained from."""
    return fleet.version - update.task.version


def too_stale(fleet: Fleet, limit: int | None) -> tuple[int, ...]:
    """Return the outstanding tasks whose answers will be more than `limit` versions old once the next version is made.

    Tasks stand in the order in which they were sent, so that these are the first ones, and no other is looked at.
    """
    if limit is None:
        return ()
    oldest = takewhile(lambda item: fleet.version + 1 - item[1].version > limit, fleet.busy.items())
    return tuple(number for number, _ in oldest)


def check_discount(discount: Discount) -> None:
    """Raise Refused for a function that is no discount: 1 for a fresh answer, then in (0, 1]."""
    factors = [discount(age) for age in (0, 1, 50)]
    if factors[0] != 1 or not all(0 < factor <= 1 for factor in factors):
        remedy = "1 for a fresh answer, then above 0 and at most 1: Constant(), Polynomial(0.5) or Hinge(10, 4)"
        raise Refused("schedule.discount", discount, remedy)


def check_limits(max_in_flight: int, max_staleness: int | None) -> None:
    """Raise Refused for a federation in which nobody could work."""
    if max_in_flight < 1:
        raise Refused("schedule.max_in_flight", max_in_flight, "at least 1 client must be allowed to work")
    if max_staleness is not None and max_staleness < 1:
        remedy = "with 0 every new version would abort all work; give at least 1, or None for no limit"
        raise Refused("schedule.max_staleness", max_staleness, remedy)
