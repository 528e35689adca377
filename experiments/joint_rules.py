"""Rules of a joint plan that the experiments compare, and that are not for use: docs/groups.md and docs/hierarchy.md say why.

- `TimeAligned`: everybody is done when the fastest group is (closed form; ParallelSFL, arXiv 2410.01256, 2024, Eq. 17).
- `Bandit`: no gradient statistics; it learns from what its choices earned.
- `JointMemory`: rank and steps too, within every member's memory.

The first and the last follow the fastest group at its most rounds, which is ruinous on slow links. They are rules for
`JointPlan(rule)`, as those of `fedloom.hierarchy.joint_plan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

from fedloom.core.errors import Refused
from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState, leading_share, whole_number
from fedloom.hierarchy.joint_plan.shared import (
    check_counts,
    check_weight,
    drift_loss,
    explain_time,
    fastest_seconds,
    most_rounds,
)


@dataclass(frozen=True, slots=True)
class TimeAligned:
    """Every group ends with the fastest one, which does `most` inner rounds as deep as its memory allows.

    With `work_grows` an inner round has `steps` / `most` steps, and a group does as many as there is time for: the fast do more
    (ParallelSFL, Eq. 17). Without, all do `steps` and divide them over fewer or more rounds, so that only links can be aligned.
    Depth is the deepest that memory allows, and gives way where not even one inner round is done in time.
    """

    steps: int = 20
    most: int = 4
    rank: int = 8
    work_grows: bool = True

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, most=self.most, rank=self.rank)
        if self.steps % self.most:
            raise Refused("joint.most", self.most, f"choose a divisor of joint.steps, which is {self.steps}")

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """A choice for each group."""
        limit = fastest_seconds(groups, self.most, self.steps, self.rank)
        return tuple(self._of(group, limit) for group in groups)

    def _of(self, group: GroupState, limit: float) -> Choice:
        depths = group.depths(self.rank)
        timely = [(self._rounds(group, limit, depth), depth) for depth in depths]
        # late, but no later than need be, if not even one inner round at the least depth is done in time
        rounds, depth = max((point for point in timely if point[0]), key=itemgetter(1), default=(1, depths[0]))
        steps = rounds * self.steps // self.most if self.work_grows else self.steps
        return explain_time(group, Choice(rounds, depth, self.rank, steps), limit)

    def _rounds(self, group: GroupState, limit: float, depth: int) -> int:
        if not self.work_grows:
            return most_rounds(group, limit, Choice(self.most, depth, self.rank, self.steps))
        part, links = self.steps // self.most, group.link_seconds(depth, self.rank)
        slowest = max(part * step + link for step, link in zip(group.step_seconds(depth), links, strict=True))
        return min(self.most, whole_number((limit - group.edge_link_seconds(depth, self.rank)) / slowest))


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
        seen = [one for one in group.rewards if (one.rounds, one.depth) in arms]
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


@dataclass(frozen=True, slots=True)
class JointMemory:
    """Rounds, depth, rank and steps at once: the most progress in the time of the fastest group, within every member's memory.

    Progress of a global round is steps * (sqrt(G(d) E(r)) - drift * (steps / f)^2 * delta_g^2): every step is worth the share of the
    gradient that depth d and rank r can follow, E(r) being the energy of the first r directions, less the drift of
    `GradientScore`. The time is that of the fastest group at `most` rounds, `steps` steps, and the greatest depth and rank that
    its memory holds. Our own.
    """

    steps: int = 20
    most: int = 8
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    drift: float = 1e-3

    def __post_init__(self) -> None:
        check_counts(steps=self.steps, most=self.most, ranks=min(self.ranks, default=0))
        check_weight("drift", self.drift)

    def __call__(self, groups: Sequence[GroupState]) -> tuple[Choice, ...]:
        """A choice for each group."""
        limit = min(
            (fastest_seconds([group], self.most, self.steps, self._held(group)[-1]) for group in groups),
            default=math.inf,
        )
        return tuple(self._of(group, limit) for group in groups)

    def progress(self, group: GroupState, choice: Choice) -> float:
        """What is maximised."""
        return choice.steps * (self._worth(group, choice) - drift_loss(self.drift, group, choice))

    def _worth(self, group: GroupState, choice: Choice) -> float:
        return math.sqrt(group.covered_mass(choice.depth) * leading_share(group.energy, choice.rank, max(self.ranks)))

    def _held(self, group: GroupState) -> tuple[int, ...]:
        """Ranks at which one layer at least can be trained; raises Refused if there is none."""
        group.depths(min(self.ranks))
        least = min(member.memory for member in group.members)
        return tuple(rank for rank in sorted(set(self.ranks)) if group.sizes.memory(1, rank) <= least)

    def _of(self, group: GroupState, limit: float) -> Choice:
        every = [
            Choice(rounds, depth, rank, 1)
            for rank in self._held(group)
            for depth in group.depths(rank)
            for rounds in range(1, self.most + 1)
        ]
        timely = [replace(one, steps=one.rounds * part) for one in every for part in self._parts(group, limit, one)]
        curve = timely or every[:1]
        best = max(curve, key=lambda one: (self.progress(group, one), one.depth, one.rank, one.rounds))
        why = f"{best.steps} steps that follow {self._worth(group, best):.2f} of the gradient, less drift "
        why += f"{drift_loss(self.drift, group, best):.2g} each, are the most of {len(curve)} choices; "
        return explain_time(group, replace(best, why=why), limit)

    def _parts(self, group: GroupState, limit: float, one: Choice) -> set[int]:
        """Steps an inner round that can be best: as many as there is time for, or those about the peak of x (worth - price x^2)."""
        left = (limit - group.edge_link_seconds(one.depth, one.rank)) / one.rounds
        pairs = zip(group.step_seconds(one.depth), group.link_seconds(one.depth, one.rank), strict=True)
        longest = min(whole_number((left - link) / step) for step, link in pairs)
        price = 3.0 * self.drift * group.dispersion**2
        peak = whole_number(math.sqrt(self._worth(group, one) / price)) if price else longest
        return {min(longest, max(part, 1)) for part in (longest, peak, peak + 1)} - {0}
