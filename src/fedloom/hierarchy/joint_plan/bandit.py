"""(to be written)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedloom.core.errors import Refused
from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState
from fedloom.hierarchy.joint_plan.shared import check_counts, check_weight


@dataclass(frozen=True, slots=True)
class Bandit:
    """Discounted UCB1 over (f, d): what has earned most per second, and what has not been tried for long.

    Arms are the `frequencies` with `cuts` depths, evenly spaced up to the deepest that memory allows. What was seen k rounds ago
    counts `discount`^k, because a model that has learnt more earns less (Garivier and Moulines 2011, "On upper-confidence bound
    policies for switching bandit problems"); rewards are scaled to the range seen. `explore` weighs the bonus for what is unknown.
    """

    steps: int = 20
    frequencies: tuple[int, ...] = (1, 4)
    cuts: int = 3
    rank: int = 8
    discount: float = 0.9
    explore: float = 0.05

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, cuts=self.cuts, rank=self.rank)
        if not self.frequencies or any(f < 1 or self.steps % f for f in self.frequencies):
            raise Refused("joint.frequencies", self.frequencies, f"one or more divisors of {self.steps}, joint.steps")
        if not 0 < self.discount <= 1:
            raise Refused("joint.discount", self.discount, "above 0 and at most 1, which forgets nothing")
        check_weight("explore", self.explore)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """A choice for each group."""
        return tuple(self._of(group) for group in groups)

    def arms(self, group: GroupState) -> tuple[tuple[int, int], ...]:
        """(rounds, depth) that can be chosen, the deepest and most frequent first."""
        deepest = group.depths(self.rank)[-1]
        depths = {max(1, round(deepest * cut / self.cuts)) for cut in range(1, self.cuts + 1)}
        fit = sorted(depths & set(group.depths(self.rank)), reverse=True)
        return tuple((f, depth) for depth in fit for f in sorted(set(self.frequencies), reverse=True))

    def _of(self, group: GroupState) -> Choice:
        arms = self.arms(group)
        seen = [one for one in group.observed if (one.rounds, one.depth) in arms]
        tries, sums = dict.fromkeys(arms, 0.0), dict.fromkeys(arms, 0.0)
        low = min((one.reward for one in seen), default=0.0)
        span = max((one.reward for one in seen), default=0.0) - low or 1.0
        for age, one in enumerate(reversed(seen)):
            tries[one.rounds, one.depth] += self.discount**age
            sums[one.rounds, one.depth] += self.discount**age * (one.reward - low) / span
        untried = [arm for arm in arms if not tries[arm]]
        if untried:
            why = f"{len(untried)} of {len(arms)} pairs of rounds and depth are untried, this is the first of them"
            return Choice(*untried[0], self.rank, self.steps, why)
        bonus = self.explore * math.log(max(sum(tries.values()), 1.0))
        means = {arm: sums[arm] / tries[arm] for arm in arms}
        best = max(arms, key=lambda arm: means[arm] + math.sqrt(bonus / tries[arm]))
        earned = low + span * means[best]
        why = f"earned {earned:.3g} of loss a second over {tries[best]:.1f} recent rounds, with a bonus of "
        why += f"{span * math.sqrt(bonus / tries[best]):.2g} the most of {len(arms)} pairs of rounds and depth"
        return Choice(*best, self.rank, self.steps, why)
