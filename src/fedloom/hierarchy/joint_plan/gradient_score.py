"""The default rule: rounds and depth that follow the most of the gradient with the least drift, in the time of the fastest group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState
from fedloom.hierarchy.joint_plan.shared import (
    check_counts,
    check_weight,
    divisors,
    drift_loss,
    explain_time,
    fastest_seconds,
    most_rounds,
)


@dataclass(frozen=True, slots=True)
class GradientScore:
    """Along the curve of equal time, deeper against more often: the highest sqrt(G(d)) - drift * (steps / f)^2 * delta_g^2.

    All groups do `steps` steps; f divides them. G(d) is the share of the changes' mass in the top d layers and the head; what
    is below is lost. A step of AdamW has a length of its own. So the loss falls by the norm of the gradient that it follows,
    the root of its mass. The second term is how far members drift apart between two averages of the group, from the
    bound for hierarchical averaging.

    Fields:
        steps: local steps of each member in a global round.
        most: largest number of inner rounds.
        rank: rank of every task.
        drift: gamma * eta^2, with eta the learning rate; at 0 depth is all that counts.
    """

    steps: int = 20
    most: int = 10
    rank: int = 8
    drift: float = 1e-3

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, most=self.most, rank=self.rank)
        check_weight("drift", self.drift)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """Return a choice for each group."""
        limit = fastest_seconds(groups, divisors(self.steps, self.most)[-1], self.steps, self.rank)
        return tuple(self.choose(group, limit) for group in groups)

    def choose(self, group: GroupState, limit: float) -> Choice:
        """Return the choice of a group that has `limit` seconds."""
        every = [Choice(self.most, depth, self.rank, self.steps) for depth in group.depths(self.rank)]
        timely = [replace(one, rounds=most_rounds(group, limit, one)) for one in every]
        curve = [one for one in timely if one.rounds] or [replace(every[0], rounds=1)]
        best = max(curve, key=lambda one: (self.score(group, one), one.depth))
        won, lost = math.sqrt(group.covered_mass(best.depth)), drift_loss(self.drift, group, best)
        why = f"gradient norm {won:.2f} less drift {lost:.2g} is the best of {len(curve)} depths; "
        return explain_time(group, replace(best, why=why), limit)

    def score(self, group: GroupState, choice: Choice) -> float:
        """Return what is maximised."""
        return math.sqrt(group.covered_mass(choice.depth)) - drift_loss(self.drift, group, choice)
