"""FedFa: every answer makes a new version, the mean of the last `window` answers, and nobody ever waits.

Source: Xu et al., "FedFa: A Fully Asynchronous Training Paradigm for Federated Learning", arXiv 2404.11015, IJCAI 2024.
FedFa-Param averages the clients' models; its rule is known from two public re-implementations that agree. Of FedFa-Delta it is
known only that clients send differences: here their mean over the window is a step of the server's learning rate, so that each
difference is used `window` times. The rest is our choice: how the window begins, the weights, `dedup`.

FedFa-Param damps itself: with C equally fast clients that always move by d, the model moves by d / (C + (window - 1) / 2) per
answer (law 11 in `core.server`), where a buffer of K answers moves by d / K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet, Merge
from fedloom.core.types import ClientId, Update
from fedloom.schedule.shared.client_draw import refill
from fedloom.schedule.shared.staleness import CONSTANT, Discount, check_discount, check_limits, staleness, too_stale
from fedloom.schedule.shared.weights import Weigh, normalised, uniform


@dataclass(frozen=True, slots=True)
class FedFa:
    """The mean of the last `window` answers, recomputed at each answer.

    Fields:
        window: answers in the mean (K).
        max_in_flight: clients at work at once.
        delta_rate: server learning rate of FedFa-Delta; with 1 / `window` one answer moves the model as far as with FedBuff at
            rate 1 (None: FedFa-Param).
        fill: "seed": the window begins filled with the first model; "wait": nothing is merged before `window` answers are there.
        weigh: weight of an answer before the discount.
        discount: factor by staleness at the merge.
        dedup: whether only the latest answer of each client counts; a window that is being filled still counts every answer.
        uploader_goes_on: whether the client that answered is started again, and not an idle one drawn at random.
        max_staleness: versions after which outstanding work is aborted, since its answer would come too late (None: never).
    """

    window: int = 10
    max_in_flight: int = 20
    delta_rate: float | None = None
    fill: Literal["seed", "wait"] = "seed"
    weigh: Weigh = uniform
    discount: Discount = CONSTANT
    dedup: bool = False
    uploader_goes_on: bool = False
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise Refused("schedule.window", self.window, "a mean of at least 1 answer")
        if self.delta_rate is not None and not 0 < self.delta_rate <= 1:
            remedy = "FedFa-Delta's server learning rate is in (0, 1]; None is FedFa-Param"
            raise Refused("schedule.delta_rate", self.delta_rate, remedy)
        if self.fill not in ("seed", "wait"):
            raise Refused(
                "schedule.fill", self.fill, '"seed" begins with the first model, "wait" with `window` answers'
            )
        check_limits(self.max_in_flight, self.max_staleness)
        check_discount(self.discount)

    @property
    def reuses_answers(self) -> bool:
        """Whether an answer is a part of more than one merge."""
        return self.window > 1

    @property
    def answers_per_merge(self) -> int:
        """The most answers in a merge."""
        return self.window

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the mean over the window, as soon as there is an answer that is in no version yet."""
        fresh, full = len(fleet.arrived) > fleet.retained, len(fleet.arrived) >= self.window
        if not fresh or (self.fill == "wait" and fleet.version == 0 and not full):
            return None
        window = _latest(fleet, self.dedup)[-self.window :]
        parts = normalised(window, lambda update: self.weigh(update) * self.discount(staleness(fleet, update)))
        filled = 1.0 if self.fill == "wait" else min(1.0, (fleet.version + 1) / self.window)
        return Merge(
            parts,
            step=filled * (self.delta_rate or 1.0),
            as_delta=self.delta_rate is not None,
            retain=window if self.reuses_answers else (),
            cancel=too_stale(fleet, self.max_staleness),
            anchor=None if self.delta_rate or filled == 1.0 else fleet.first,
        )

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return an idle client for each free slot."""
        return refill(fleet, self.max_in_flight, self.uploader_goes_on)

    def wake(self, fleet: Fleet) -> float | None:
        """Return None: only answers count, no timer."""
        return None


def _latest(fleet: Fleet, dedup: bool) -> tuple[Update, ...]:
    """Return the answers in order of arrival; with `dedup` each client's latest, and those that are in no version yet."""
    if not dedup:
        return tuple(fleet.arrived)
    latest = {update.task.client: place for place, update in enumerate(fleet.arrived)}
    return tuple(
        update
        for place, update in enumerate(fleet.arrived)
        if place >= fleet.retained or latest[update.task.client] == place
    )
