"""A rule for groups that do not wait for each other: depth by how fast losses fell, steps and rounds by the gain per second.

Our own. What a layer weighs does not tell what it is worth: it may move far, and to and fro. So depths are tried, and compared by how
much the members' own losses fell a second between the inner rounds of one task (`GroupState.inner_rewards`), in which no other
group has a part. Losses are noisy: of the depths that earn about the most the shallowest is taken, as in the rule of one
standard error (Breiman et al., "Classification and Regression Trees", 1984, section 3.4.3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, variance

from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState
from fedloom.hierarchy.joint_plan.shared import check_counts, check_weight


@dataclass(frozen=True, slots=True)
class LossRate:
    """The depth that gains most per second, and of rounds f and steps p between two averages those that do most in that time.

    p steps of a member count as p (1 - drift delta^2 p^2 (1 + f^2 / n)). Members drift apart with the square of the steps between
    two averages. Groups of n near-IID members drift with the square of all their steps, and as their means n times less: the bound
    for hierarchical averaging, as in `GradientScore`. So about the cube root of (seconds on the link / seconds of a step) are best.
    Slow members do few steps, slow links let all do more, and there are as many inner rounds as make the report cheap.

    Depths are tried from the shallowest to the deepest that memory allows. All groups begin with the shallowest. A group that
    remembers enough tasks, and has not measured one of these depths, tries that next, in two rounds or more. The measurements of
    all groups decide.

    Fields:
        steps: largest number of local steps between two averages (p).
        most: largest number of inner rounds (f).
        rank: rank of every task.
        drift: weight of the loss by drift.
        cuts: number of depths that are tried.
        patience: tasks that a group remembers before it measures a depth anew.
    """

    steps: int = 20
    most: int = 5
    rank: int = 8
    drift: float = 2e-3
    cuts: int = 3
    patience: int = 4

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, most=self.most, rank=self.rank, cuts=self.cuts, patience=self.patience)
        check_weight("drift", self.drift)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """Return a choice for each group."""
        seen = rewards_by_depth(groups)
        return tuple(self._choose(group, seen) for group in groups)

    def depths(self, group: GroupState) -> tuple[int, ...]:
        """Return the depths that are tried, the shallowest first."""
        first, *_, last = 2 * group.depths(self.rank)
        return tuple(sorted({round(first + (last - first) * cut / max(1, self.cuts - 1)) for cut in range(self.cuts)}))

    def worth(self, group: GroupState, rounds: int, part: int) -> float:
        """Return what `rounds` times `part` steps are worth, in steps that do not drift; unknown members have nothing in common."""
        delta = group.dispersion if group.mass else 1.0
        lost = self.drift * (delta * part) ** 2 * (1.0 + rounds**2 / len(group.members))
        return rounds * part * max(0.0, 1.0 - lost)

    def _choose(self, group: GroupState, seen: Mapping[int, Sequence[float]]) -> Choice:
        depths, measured = self.depths(group), {one.depth for one in group.inner_rewards}
        untried = [depth for depth in reversed(depths) if depth not in measured]
        if len(depths) > 1 and untried and group.tasks >= self.patience:
            return self._best_pace(group, untried[0], f"depth {untried[0]} is measured anew; ", 2)
        depth = shallowest_of_best(depths, seen)
        why = f"depth {depth} earned {fmean(seen[depth]):.2g} of loss a second; " if depth in seen else ""
        return self._best_pace(group, depth, why, 1)

    def _best_pace(self, group: GroupState, depth: int, why: str, least: int) -> Choice:
        """Return the best choice at this depth, in `least` rounds or more."""
        pairs = product(range(least, max(self.most, least) + 1), range(1, self.steps + 1))
        every = [Choice(rounds, depth, self.rank, rounds * part) for rounds, part in pairs]

        def rate(one: Choice) -> float:
            return self.worth(group, one.rounds, one.steps // one.rounds) / group.seconds(one)

        best = max(every, key=rate)
        words = f"{best.rounds} rounds of {best.steps // best.rounds} steps take {group.seconds(best):.3g} s "
        words += f"and are worth {rate(best):.3g} steps a second, the most of {len(every)} pairs"
        return replace(best, why=why + words)


def rewards_by_depth(groups: Sequence[GroupState]) -> dict[int, list[float]]:
    """Return, by depth, by how much the losses of all groups fell a second."""
    seen = dict[int, list[float]]()
    for one in (one for group in groups for one in group.inner_rewards):
        seen.setdefault(one.depth, []).append(one.reward)
    return seen


def shallowest_of_best(depths: Sequence[int], seen: Mapping[int, Sequence[float]]) -> int:
    """Return the shallowest depth that is no worse than the best by more than one standard error of the difference."""
    measured = [depth for depth in depths if len(seen.get(depth, ())) > 1]
    if not measured:
        return depths[0]
    best = max(measured, key=lambda depth: fmean(seen[depth]))

    def keeps_up(depth: int) -> bool:
        error = math.sqrt(sum(variance(seen[one]) / len(seen[one]) for one in (depth, best)))
        return fmean(seen[depth]) >= fmean(seen[best]) - error

    return next(depth for depth in measured if keeps_up(depth))
