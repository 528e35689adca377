"""The plan of a run: a rule for the rank, a number of local steps and a rule for the depth make the budget of each task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet
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
    """

    rank: RankRule = field(default_factory=FixedRank)
    local_steps: int = 10
    depth: DepthRule | None = None

    def __post_init__(self) -> None:
        if self.local_steps < 1:
            raise Refused("plan.local_steps", self.local_steps, "a task needs at least 1 optimiser step")

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """Return the budget of this client's next task."""
        budget = Budget(self.rank(profile, fleet), self.local_steps)
        return replace(budget, depth=self.depth(profile, fleet, budget)) if self.depth else budget
