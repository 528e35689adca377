"""(to be written)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState, leading_share, whole_number
from fedloom.hierarchy.joint_plan.shared import check_counts, check_weight, drift_loss, fastest_seconds, explain_time


@dataclass(frozen=True, slots=True)
class JointMemory:
    """Rounds, depth, rank and steps at once: the most progress in the time of the fastest group, within every member's memory.

    Progress of a global round is steps * (sqrt(G(d) E(r)) - drift * (steps / f)^2 * delta_g^2): every step is worth the share of the
    gradient that depth d and rank r can follow, E(r) being the energy of the first r directions, less the drift of `Scored`. The time
    is that of the fastest group at `most` rounds, `steps` steps, and the greatest depth and rank that its memory holds. Our own.
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
        limit = min((fastest_seconds([group], self.most, self.steps, self._held(group)[-1]) for group in groups), default=math.inf)
        return tuple(self._of(group, limit) for group in groups)

    def progress(self, group: GroupState, choice: Choice) -> float:
        """What is maximised."""
        return choice.steps * (self._worth(group, choice) - drift_loss(self.drift, group, choice))

    def _worth(self, group: GroupState, choice: Choice) -> float:
        return math.sqrt(group.covered(choice.depth) * leading_share(group.energy, choice.rank, max(self.ranks)))

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
        left = (limit - group.outer(one.depth, one.rank)) / one.rounds
        pairs = zip(group.steps(one.depth), group.links(one.depth, one.rank), strict=True)
        longest = min(whole_number((left - link) / step) for step, link in pairs)
        price = 3.0 * self.drift * group.dispersion**2
        peak = whole_number(math.sqrt(self._worth(group, one) / price)) if price else longest
        return {min(longest, max(part, 1)) for part in (longest, peak, peak + 1)} - {0}
