"""Synchronous rounds: a cohort starts together, its answers are merged, the next cohort starts.

Source: FedAvg, McMahan et al. 2017, Alg. 1; over-selection and the deadline as in Bonawitz et al., "Towards Federated Learning
at Scale", 2019, section 2.2: more clients than needed are started, and the slowest are cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet, Merge
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId
from fedloom.schedule.shared.weights import Weigh, by_examples, normalised


@dataclass(frozen=True, slots=True)
class Rounds:
    """A cohort of answers makes a round; a federation smaller than the cohort takes part whole.

    Fields:
        cohort_size: answers that make a round.
        over_selection: how many times more clients are started; the first `cohort_size` answers count, the rest is cancelled.
        deadline: seconds from the start of the round after which it closes with what has arrived (None: no deadline). If nothing has
            arrived, it closes with the first answer.
        weigh: weight of an answer.
    """

    cohort_size: int = 10
    over_selection: float = 1.0
    deadline: float | None = None
    weigh: Weigh = by_examples

    def __post_init__(self) -> None:
        if self.cohort_size < 1:
            raise Refused("schedule.cohort_size", self.cohort_size, "a round needs at least 1 client")
        if not 1.0 <= self.over_selection < math.inf:
            raise Refused(
                "schedule.over_selection", self.over_selection, "1.0 starts just the cohort, 1.3 a third more"
            )
        if self.deadline is not None and not self.deadline > 0:
            raise Refused("schedule.deadline", self.deadline, "give positive seconds, or None to wait for everyone")

    @property
    def answers_per_merge(self) -> int:
        """The most answers in a merge."""
        return self.cohort_size

    @property
    def max_in_flight(self) -> int:
        """Clients that are started in a round, over-selection included."""
        return math.ceil(round(self.cohort_size * self.over_selection, 9))

    def start(self, fleet: Fleet) -> Sequence[ClientId]:
        """Return a new random cohort once the last round is closed."""
        if fleet.busy or fleet.arrived:
            return ()
        size = min(len(fleet.idle), self.max_in_flight)
        return sorted(rng(fleet.seed, "cohort", fleet.version, fleet.tasks).sample(fleet.idle.sorted_keys(), size))

    def merge(self, fleet: Fleet) -> Merge | None:
        """Return the weighted mean of the round's answers, when the round is complete or overdue."""
        complete = not fleet.busy or len(fleet.arrived) >= self.cohort_size
        if not fleet.arrived or not (complete or self._overdue(fleet)):
            return None
        return Merge(normalised(fleet.arrived, self.weigh), cancel=tuple(fleet.busy))

    def wake(self, fleet: Fleet) -> float | None:
        """Return the deadline of the open round, also a missed one; None once it has passed with nothing arrived."""
        due = self._due(fleet)
        return due if due is not None and (fleet.arrived or due > fleet.now) else None

    def _due(self, fleet: Fleet) -> float | None:
        """Return when the open round closes. All of a round are sent at once, so that any of its tasks says when it began."""
        if self.deadline is None or not (fleet.busy or fleet.arrived):
            return None
        one = fleet.arrived[0].task if fleet.arrived else next(iter(fleet.busy.values()))
        return one.sent + self.deadline

    def _overdue(self, fleet: Fleet) -> bool:
        due = self._due(fleet)
        return due is not None and fleet.now >= due
