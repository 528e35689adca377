"""A rule for how long a global round lasts: the time that pays best, not that of the fastest group at its most frequent.

Our own. Where inner averages go over slow links, a time that lets the fastest group do the most of them makes everybody slow, and
what it buys may be little (docs/groups.md: a fixed frequency over slow links costs two thirds of the speed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedloom.hierarchy.joint_plan.gradient_score import GradientScore
from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState
from fedloom.hierarchy.joint_plan.shared import divisors


@dataclass(frozen=True, slots=True)
class BestRoundTime:
    """`inner` at the time that earns most: the score of all members together, a second of the group that ends last.

    Times that are tried are those in which some group can do just so many rounds, at its least and at its greatest depth.

    Fields:
        inner: chooses rounds and depth for each of these times.
    """

    inner: GradientScore = field(default_factory=GradientScore)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """Return a choice for each group."""
        plans = [tuple(self.inner.choose(group, limit) for group in groups) for limit in self.times(groups)]
        return max(plans, key=lambda plan: self.score_rate(groups, plan), default=())

    def times(self, groups: Sequence[GroupState]) -> list[float]:
        """Return the times to try, the shortest first."""
        times = set[float]()
        for group in groups:
            depths = group.depths(self.inner.rank)
            for depth in {depths[0], depths[-1]}:
                for rounds in divisors(self.inner.steps, self.inner.most):
                    times.add(group.seconds(Choice(rounds, depth, self.inner.rank, self.inner.steps)))
        return sorted(times)

    def score_rate(self, groups: Sequence[GroupState], plan: Sequence[Choice]) -> float:
        """Return the score of all members together, a second of the round."""
        pairs = list(zip(groups, plan, strict=True))
        score = sum(len(group.members) * self.inner.score(group, choice) for group, choice in pairs)
        return score / max(group.seconds(choice) for group, choice in pairs)
