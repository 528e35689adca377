"""The plan of a run: rules for rank, depth and learning rate and a number of local steps make the budget of each task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet
from fedloom.core.rate_by_rank import RateByRank
from fedloom.core.types import Budget, Profile
from fedloom.plan.depth import DepthRule
from fedloom.plan.rank import FixedRank, RankRule


@dataclass(frozen=True, slots=True)
class Plan:
    """Budget of each task from independent rules.

    Fields:
        rank: rule for the LoRA rank.
        local_steps: optimiser steps per task, whatever the client's data size: equal steps keep clients comparable.
        depth: rule for the number of blocks to train, given the other two (None: everything that is adapted).
        rate: how the learning rate of adapters follows their rank (None: all have `training.learning_rate`). With `RateByRank()` that
            is the rate of the largest rank, and smaller ranks have larger ones.
    """

    rank: RankRule = field(default_factory=FixedRank)
    local_steps: int = 10
    depth: DepthRule | None = None
    rate: RateByRank | None = None

    def __post_init__(self) -> None:
        if self.local_steps < 1:
            raise Refused("plan.local_steps", self.local_steps, "a task needs at least 1 optimiser step")

    @property
    def rates(self) -> RateByRank | None:
        """The rule for the learning rate, with the rank that it refers to."""
        if self.rate is None or self.rate.reference is not None:
            return self.rate
        return replace(self.rate, reference=self.rank.largest)

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """Return the budget of this client's next task."""
        budget = Budget(self.rank(profile, fleet), self.local_steps, rate=self.rates)
        return replace(budget, depth=self.depth(profile, fleet, budget)) if self.depth else budget
