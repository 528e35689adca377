"""Every answer is a step of its own at once: for an aggregator that publishes an average (`Averaged`).

Source: our own combination. A buffer, that of FedBuff (arXiv 2106.06639, 2022) or FedFa's window (arXiv 2404.11015, 2024), both sums
and smooths. Summing needs no buffer: a change divided by K at once is in the model K - 1 answers earlier than in a buffer of K.
Smoothing is better done on what is published, where it costs no speed. And where idle clients are drawn at random, slow ones hold
most slots most of the time: with equal time for all, and not an equal number of tasks, as many slots bring far more answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet, Merge
from fedloom.core.types import ClientId
from fedloom.schedule.shared.client_draw import draw_least_worked
from fedloom.schedule.shared.staleness import CONSTANT, Discount, check_discount, check_limits, staleness, too_stale


@dataclass(frozen=True, slots=True)
class Immediate:
    """A step along each client's change as soon as it answers.

    Fields:
        server_learning_rate: factor of each change (above 0, at most 1).
        max_in_flight: clients at work at once.
        steady: versions after which the rate falls as 1 / sqrt(version) (None: never).
        discount: factor by staleness.
        max_staleness: versions after which outstanding work is aborted, since its answer would come too late (None: never).
        choices: idle clients drawn at random for a free slot, which goes to the one that has worked the fewest seconds.
    """

    server_learning_rate: float = 0.1
    max_in_flight: int = 20
    steady: int | None = None
    discount: Discount = CONSTANT
    max_staleness: int | None = None
    choices: int = 3
    answers_per_merge: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.server_learning_rate <= 1:
            raise Refused(
                "schedule.server_learning_rate", self.server_learning_rate, "in (0, 1], at most about 2 / max_in_flight"
            )
        if self.steady is not None and self.steady < 1:
            raise Refused("schedule.steady", self.steady, "at least 1 version, or None for a rate that stays")
        if self.choices < 1:
            raise Refused("schedule.choices", self.choices, "1 is a draw at random, 3 gives all about equal time")
        check_limits(self.max_in_flight, self.max_staleness)
        check_discount(self.discount)

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the first answer that waits, alone."""
        if not fleet.arrived:
            return None
        update, *others = fleet.arrived
        fall = min(1.0, (self.steady / (fleet.version + 1)) ** 0.5) if self.steady else 1.0
        step = self.server_learning_rate * fall * self.discount(staleness(fleet, update))
        stale = too_stale(fleet, self.max_staleness)
        return Merge(((1.0, update),), step, as_delta=True, retain=tuple(others), cancel=stale)

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return an idle client for each free slot."""
        return draw_least_worked(fleet, self.max_in_flight - len(fleet.busy), self.choices)

    def wake(self, fleet: Fleet) -> float | None:
        """Return None: only answers count, no timer."""
        return None
