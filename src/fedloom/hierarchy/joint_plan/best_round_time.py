"""How long a global round is to last: the time that pays best, not that of the fastest group at its most frequent.

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
    """

    inner: GradientScore = field(default_factory=GradientScore)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """A choice for each group."""
        plans = [tuple(self.inner.within(group, limit) for group in groups) for limit in self.limits(groups)]
        return max(plans, key=lambda plan: self.earned(groups, plan), default=())

    def limits(self, groups: Sequence[GroupState]) -> list[float]:
        """Times to try, the shortest first."""
        found = set[float]()
        for group in groups:
            depths = group.depths(self.inner.rank)
            for depth in {depths[0], depths[-1]}:
                for rounds in divisors(self.inner.steps, self.inner.most):
                    found.add(group.seconds(Choice(rounds, depth, self.inner.rank, self.inner.steps)))
        return sorted(found)

    def earned(self, groups: Sequence[GroupState], plan: Sequence[Choice]) -> float:
        """Score a second."""
        pairs = list(zip(groups, plan, strict=True))
        score = sum(len(group.members) * self.inner.score(group, choice) for group, choice in pairs)
        return score / max(group.seconds(choice) for group, choice in pairs)
