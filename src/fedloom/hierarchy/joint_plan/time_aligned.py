"""(to be written)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

from fedloom.core.errors import Refused
from fedloom.hierarchy.joint_plan.group_cost import Choice, GroupState, whole_number
from fedloom.hierarchy.joint_plan.shared import check_counts, most_rounds, fastest_seconds, explain_time


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
        part, links = self.steps // self.most, group.links(depth, self.rank)
        slowest = max(part * step + link for step, link in zip(group.steps(depth), links, strict=True))
        return min(self.most, whole_number((limit - group.outer(depth, self.rank)) / slowest))
