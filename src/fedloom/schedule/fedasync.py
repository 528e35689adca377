"""FedAsync: every answer is mixed into the model at once, the staler the less.

Source: Xie et al., "Asynchronous Federated Optimization", arXiv 1903.03934, 2019, Alg. 1: w <- (1 - a_t) w + a_t w_k with
a_t = a s(staleness). The rate is computed anew from `mixing` each time: one public implementation multiplies the stored rate
by s again and again, so that it decays to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet, Merge
from fedloom.core.types import ClientId
from fedloom.schedule.shared.client_draw import refill
from fedloom.schedule.shared.staleness import SQUARE_ROOT, Discount, check_discount, check_limits, staleness, too_stale


@dataclass(frozen=True, slots=True)
class FedAsync:
    """A step towards each client's model as soon as it answers.

    Fields:
        mixing: size of the step for a fresh answer (alpha; above 0, at most 1).
        discount: factor by staleness.
        max_in_flight: clients at work at once.
        uploader_goes_on: whether the client that answered is started again, and not an idle one drawn at random.
        max_staleness: versions after which outstanding work is aborted, since its answer would come too late (None: never).
    """

    mixing: float = 0.6
    discount: Discount = SQUARE_ROOT
    max_in_flight: int = 20
    uploader_goes_on: bool = False
    max_staleness: int | None = None
    answers_per_merge: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.mixing <= 1:
            raise Refused("schedule.mixing", self.mixing, "the share of a fresh answer in the new model: in (0, 1]")
        check_limits(self.max_in_flight, self.max_staleness)
        check_discount(self.discount)

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the first answer that waits, alone."""
        if not fleet.arrived:
            return None
        update, *others = fleet.arrived
        step = self.mixing * self.discount(staleness(fleet, update))
        return Merge(((1.0, update),), step, retain=tuple(others), cancel=too_stale(fleet, self.max_staleness))

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return an idle client for each free slot."""
        return refill(fleet, self.max_in_flight, self.uploader_goes_on)

    def wake(self, fleet: Fleet) -> float | None:
        """Return None: only answers count, no timer."""
        return None
