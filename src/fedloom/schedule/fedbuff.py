"""FedBuff: answers are collected, and a full buffer makes a new version.

Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv 2106.06639, 2022, Alg. 1:
w <- w + eta / K sum s(staleness) change. Huba et al., "Papaya", arXiv 2111.04877, 2022, section 3: a client is replaced as
soon as it answered, work that would come too late is aborted. The delay-adaptive rate is that of FADAS, arXiv 2407.18365, 2024,
section 4. `waiting` is what the literature calls semi-asynchronous: who answered waits for the next version.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet, Merge
from fedloom.core.types import ClientId
from fedloom.schedule.shared.client_draw import refill
from fedloom.schedule.shared.staleness import SQUARE_ROOT, Discount, check_discount, check_limits, staleness, too_stale
from fedloom.schedule.shared.weights import Weigh, normalised, uniform


@dataclass(frozen=True, slots=True)
class FedBuff:
    """A full buffer of answers makes a version.

    Fields:
        buffer_size: answers that make a version (K).
        max_in_flight: clients at work at once.
        server_learning_rate: factor of the mean change (above 0, at most 1).
        weigh: weight of an answer before the discount.
        discount: factor by staleness.
        normalised_weights: whether stale answers count less only relative to fresh ones. Then a buffer of stale ones steps as far
            as one of fresh ones.
        waiting: whether a client that answered rests, and its slot stays empty, until the next version (semi-asynchronous);
            otherwise another client takes the slot at once.
        uploader_goes_on: whether the client that answered is started again, and not an idle one drawn at random.
        delay_threshold: staleness above which the server learning rate is divided by the largest staleness in the buffer (FADAS;
            None: never).
        max_staleness: versions after which outstanding work is aborted, since its answer would come too late (None: never).
    """

    buffer_size: int = 10
    max_in_flight: int = 20
    server_learning_rate: float = 1.0
    weigh: Weigh = uniform
    discount: Discount = SQUARE_ROOT
    normalised_weights: bool = False
    waiting: bool = False
    uploader_goes_on: bool = False
    delay_threshold: int | None = None
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        if self.buffer_size < 1:
            raise Refused("schedule.buffer_size", self.buffer_size, "a version is made of at least 1 answer")
        if self.waiting and self.buffer_size > self.max_in_flight:
            remedy = f"clients that wait for a version fill at most the {self.max_in_flight} places of max_in_flight"
            raise Refused("schedule.buffer_size", self.buffer_size, remedy)
        if not 0 < self.server_learning_rate <= 1:
            raise Refused("schedule.server_learning_rate", self.server_learning_rate, "in (0, 1]; 1 is the mean change")
        if self.delay_threshold is not None and self.delay_threshold < 1:
            raise Refused("schedule.delay_threshold", self.delay_threshold, "at least 1 version, or None for one rate")
        check_limits(self.max_in_flight, self.max_staleness)
        check_discount(self.discount)

    @property
    def answers_per_merge(self) -> int:
        """The most answers in a merge."""
        return self.buffer_size

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the changes in the buffer once it is full, or once everybody who could fill it waits."""
        stuck = self.waiting and not fleet.busy and len(_waiting(fleet)) == len(fleet.idle)
        if not fleet.arrived or (len(fleet.arrived) < self.buffer_size and not stuck):
            return None
        discounts = {update.task.id: self.discount(staleness(fleet, update)) for update in fleet.arrived}
        plain = normalised(fleet.arrived, self.weigh)
        # a merge's weights sum to 1, so what the discounts take off the whole buffer goes into the step
        counted = 1.0 if self.normalised_weights else fsum(share * discounts[update.task.id] for share, update in plain)
        return Merge(
            normalised(fleet.arrived, lambda update: self.weigh(update) * discounts[update.task.id]),
            step=self._rate(fleet) * counted,
            as_delta=True,
            cancel=too_stale(fleet, self.max_staleness),
        )

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return an idle client for each free slot; slots of clients that wait are not free."""
        waiting = _waiting(fleet) if self.waiting else frozenset[ClientId]()
        slots = self.max_in_flight - (len(fleet.arrived) if self.waiting else 0)
        drawn = refill(fleet, slots + len(waiting), self.uploader_goes_on)  # enough, whoever of the drawn must wait
        return [client for client in drawn if client not in waiting][: max(slots - len(fleet.busy), 0)]

    def wake(self, fleet: Fleet) -> float | None:
        """Return None: only answers count, no timer."""
        return None

    def _rate(self, fleet: Fleet) -> float:
        worst = max(staleness(fleet, update) for update in fleet.arrived)
        slow = self.delay_threshold is not None and worst > self.delay_threshold
        return self.server_learning_rate / worst if slow else self.server_learning_rate


def _waiting(fleet: Fleet) -> frozenset[ClientId]:
    """Return the idle clients whose answers are in the buffer."""
    return frozenset(update.task.client for update in fleet.arrived if update.task.client in fleet.idle)
