"""The plan of a run: a rule for the rank, a number of local steps and a rule for the depth make the budget of each task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedloom.errors import Refused
from fedloom.plan.depth import DepthRule
from fedloom.plan.rank import FixedRank, RankRule
from fedloom.types import Budget, Fleet, Profile


@dataclass(frozen=True, slots=True)
class Plan:
    """Rank by `rank`; `local_steps` optimiser steps a task, whatever the client's data size (equal steps keep clients comparable).

    `depth` says how many blocks are trained, given the other two (None: all that is adapted).
    """

    rank: RankRule = field(default_factory=FixedRank)
    local_steps: int = 10
    depth: DepthRule | None = None

    def __post_init__(self) -> None:
        if self.local_steps < 1:
            raise Refused("plan.local_steps", self.local_steps, "a task needs at least 1 optimiser step")

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """The budget of this client's next task."""
        budget = Budget(self.rank(profile, fleet), self.local_steps)
        return replace(budget, depth=self.depth(profile, fleet, budget)) if self.depth else budget


def within(budget: Budget, most: Budget | None) -> Budget:
    """The budget, made smaller where the client does not let a task be so large.

    >>> within(Budget(8, 10), Budget(4, 20, depth=2))
    Budget(rank=4, steps=10, depth=2, rounds=1, why='')
    """
    if most is None:
        return budget
    depths = [depth for depth in (budget.depth, most.depth) if depth is not None]
    rank, steps = min(budget.rank, most.rank), min(budget.steps, most.steps)
    return replace(budget, rank=rank, steps=steps, depth=min(depths, default=None))
