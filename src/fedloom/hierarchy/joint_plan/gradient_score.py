"""(to be written)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState
from fedloom.hierarchy.joint_plan.shared import check_counts, check_weight, most_rounds, divisors, drift_loss, fastest_seconds, explain_time


@dataclass(frozen=True, slots=True)
class GradientScore:
    """Along the curve of equal time, deeper against more often: the highest sqrt(G(d)) - drift * (steps / f)^2 * delta_g^2.

    All groups do `steps`; f divides them and is at most `most`. G(d) is the share of the changes' mass in the top d layers and the
    head; what is below is lost. A step of AdamW has a length of its own, so that the loss falls by the norm of the gradient that
    it follows, the root of its mass. The second term is how far members drift apart between two averages of the group, from the
    bound for hierarchical averaging. `drift` is gamma * eta^2, with eta the learning rate; at 0 depth is all that counts.
    """

    steps: int = 20
    most: int = 10
    rank: int = 8
    drift: float = 1e-3

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, most=self.most, rank=self.rank)
        check_weight("drift", self.drift)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """A choice for each group."""
        limit = fastest_seconds(groups, divisors(self.steps, self.most)[-1], self.steps, self.rank)
        return tuple(self.within(group, limit) for group in groups)

    def within(self, group: GroupState, limit: float) -> Choice:
        """The choice of a group that has so many seconds."""
        every = [Choice(self.most, depth, self.rank, self.steps) for depth in group.depths(self.rank)]
        timely = [replace(one, rounds=most_rounds(group, limit, one)) for one in every]
        curve = [one for one in timely if one.rounds] or [replace(every[0], rounds=1)]
        best = max(curve, key=lambda one: (self.score(group, one), one.depth))
        won, lost = math.sqrt(group.covered(best.depth)), drift_loss(self.drift, group, best)
        why = f"gradient norm {won:.2f} less drift {lost:.2g} is the best of {len(curve)} depths; "
        return explain_time(group, replace(best, why=why), limit)

    def score(self, group: GroupState, choice: Choice) -> float:
        """What is maximised."""
        return math.sqrt(group.covered(choice.depth)) - drift_loss(self.drift, group, choice)
