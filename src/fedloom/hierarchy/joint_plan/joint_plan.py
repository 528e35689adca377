"""The plan of a root over edges: a joint rule over all groups, as they are known, gives each edge its budget.

Source: HierFedLoRA, arXiv 2503.21213, 2025, whose server estimates and configures before each global round; as rebuilt in methods
4b.2. What is known is what edges reported (`Fleet.groups`), the devices' profiles until then. So the plan has no
memory of its own, and a run that goes on or is replayed plans the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from fedloom.core.errors import Refused
from fedloom.core.lora import server_rank
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Fleet
from fedloom.core.types import Budget, ClientId, GroupHistory, GroupStatistics, MemberWork, Profile
from fedloom.hierarchy.joint_plan.gradient_score import GradientScore
from fedloom.hierarchy.joint_plan.group_cost import Device, GroupState, ObservedReward, Sizes
from fedloom.hierarchy.joint_plan.shared import JointRule
from fedloom.plan.client_cost import GAIN, CostModel
from fedloom.plan.depth import FixedDepth, check_blocks

RANK = 8
"""Rank for estimates of a client that has not answered yet; it adds little to the time of a step."""


@dataclass(frozen=True, slots=True)
class JointPlan:
    """Budget rule of the root: rounds, steps, depth and rank of each edge's task, chosen for all groups together.

    Fields:
        rule: chooses them from what is known of all groups.
        rounds: takes the place of the rounds that the rule chose, to see what they are worth (None: it does not).
        depth: takes the place of the depth that the rule chose (None: it does not).
        batch_tokens: tokens of the batch for estimates of memory, and of a step's time before any was measured.
    """

    rule: JointRule = field(default_factory=GradientScore)
    rounds: int | None = None
    depth: int | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("rounds", "depth", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Refused(f"hierarchy.plan.{name}", getattr(self, name), "choose a whole number of at least 1")

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """Return the budget of this edge's next task."""
        if profile.client not in fleet.groups:
            raise Refused("plan", "JointPlan", "it plans for edges; give it as Hierarchy(plan=JointPlan())")
        groups = {edge: group_state(one, fleet.shape, self.batch_tokens) for edge, one in fleet.groups.items()}
        chosen = dict(zip(groups, self.rule(tuple(groups.values())), strict=True))[profile.client]
        if self.rounds is not None:
            chosen = replace(chosen, rounds=min(self.rounds, chosen.steps), why=f"rounds are fixed; {chosen.why}")
        if self.depth is not None:
            chosen = replace(chosen, depth=self.depth, why=f"the depth is fixed; {chosen.why}")
        # every layer is also what is adapted below the blocks
        depth = chosen.depth if chosen.depth < fleet.shape.layers else None
        return Budget(chosen.rank, chosen.steps, depth, chosen.rounds, chosen.why)

    def check(self, fleet: Fleet) -> None:
        """Raise Refused for what this model, or the memory of a client, cannot have."""
        check_blocks(FixedDepth(1), fleet.shape)
        if self.depth is not None:
            check_blocks(FixedDepth(self.depth), fleet.shape)
        top = server_rank(fleet.first.adapter) if fleet.first else math.inf
        for history in fleet.groups.values():
            if (rank := self(history.edge, fleet).rank) > top:
                remedy = f"the server's rank is {top:g}, the highest of the run's plan; choose at most that"
                raise Refused("hierarchy.plan.rule.rank", rank, remedy)


def group_state(history: GroupHistory, shape: Shape, batch_tokens: int) -> GroupState:
    """Return a group before its next task, from what the root knows of it."""
    up, down, reports = history.edge.up_bps, history.edge.down_bps, history.statistics
    sizes = Sizes(
        lambda depth, rank: shape.payload(rank, depth),
        lambda depth, rank: shape.payload(rank),
        lambda depth, rank: shape.train_memory(rank, batch_tokens, depth),
    )
    members = tuple(member_device(profile, history, shape, batch_tokens) for profile in history.members)
    group = GroupState(members, sizes, up, down)
    return replace(
        group,
        dispersion=math.sqrt(moving_average([report.spread for report in reports])),
        mass=layer_mass(history, shape),
        energy=reports[-1].energy if reports else (),
        rewards=tuple(rewards_between_tasks(reports, shape)),
        barrier=moving_average([max(barrier_seconds(one), slow_link_seconds(one, group)) for one in reports]),
        inner_rewards=tuple(rewards_within_tasks(reports, shape)),
        tasks=len(reports),
    )


def member_device(profile: Profile, history: GroupHistory, shape: Shape, batch_tokens: int) -> Device:
    """Return a member as its work in its groups' tasks shows it.

    Sizes are those of float32 without folds, in what is learnt and in what is computed from it; so a codec counts as a faster link, a
    fold as a slower one.
    """
    past = [work for work in member_history(history, profile.client) if work.train > 0]
    cost = CostModel.from_profile(profile, shape, past[-1].rank if past else RANK, batch_tokens)
    for work in past:
        cost = _after_work(cost, work, shape)
    seconds = tuple(cost.step_seconds(depth) for depth in range(1, shape.layers + 1))
    up, down = (8.0 / link if link > 0 else math.inf for link in (cost.up, cost.down))
    return Device(profile.client, seconds, up, down, profile.memory)


def member_history(history: GroupHistory, client: ClientId) -> tuple[MemberWork, ...]:
    """Return the work of a member, oldest first: in other groups before, then in this one."""
    here = (work for report in history.statistics for work in report.work if work.client == client)
    return (*history.past.get(client, ()), *here)


def _after_work(cost: CostModel, work: MemberWork, shape: Shape) -> CostModel:
    cost = cost.after_training(min(work.depth or shape.layers, shape.layers), work.steps, work.train)
    cost = cost.after_upload(work.answers * shape.payload(work.rank, work.depth), work.up)
    return cost.after_download(work.answers * shape.payload(work.rank), work.down)


def layer_mass(history: GroupHistory, shape: Shape) -> tuple[float, ...]:
    """Return, by depth from the output down, what each layer was last seen to change; one never seen counts as their mean.

    The head is trained at any depth, and counts with the first.
    """
    latest = dict[str, float]()
    for report in history.statistics:
        latest |= report.mass
    if not latest:
        return ()
    seen: Mapping[int, float] = {
        depth: math.fsum(value for name, value in latest.items() if shape.depths.get(name) == depth)
        for depth in range(1, shape.layers + 1)
        if any(shape.depths.get(name) == depth for name in latest)
    }
    usual = math.fsum(seen.values()) / max(1, len(seen))
    with_layers, head = (
        set(shape.depths.values()),
        math.fsum(v for name, v in latest.items() if name not in shape.depths),
    )
    first, *lower = (seen.get(depth, usual if depth in with_layers else 0.0) for depth in range(1, shape.layers + 1))
    return (first + head, *lower)


def rewards_between_tasks(reports: tuple[GroupStatistics, ...], shape: Shape) -> Iterator[ObservedReward]:
    """Yield, for each choice, by how much the members' loss fell a second since the task before."""
    for before, after in pairwise(reports):
        if before.loss is not None and after.loss is not None and after.seconds > 0:
            depth = after.budget.depth or shape.layers
            yield ObservedReward(after.budget.rounds, depth, (before.loss - after.loss) / after.seconds)


def rewards_within_tasks(reports: tuple[GroupStatistics, ...], shape: Shape) -> Iterator[ObservedReward]:
    """Yield, for each choice, by how much members' own losses fell a second between rounds of its task: no other group has a part."""
    for report in reports:
        falls = [fall for fall in map(loss_fall, report.work) if fall is not None]
        if falls and report.seconds > 0:
            depth, rounds = report.budget.depth or shape.layers, report.budget.rounds
            yield ObservedReward(rounds, depth, math.fsum(falls) / len(falls) * rounds / report.seconds)


def loss_fall(work: MemberWork) -> float | None:
    """Return by how much a member's loss fell from one of its answers to the next; None: it answered once, or reported no loss."""
    if work.answers < 2 or work.first_loss is None or work.last_loss is None:
        return None
    return (work.first_loss - work.last_loss) / (work.answers - 1)


def barrier_seconds(report: GroupStatistics) -> float:
    """Return the seconds of an inner round in which even the busiest member waited."""
    busiest = max((work.down + work.train + work.up for work in report.work), default=0.0)
    return max(0.0, report.seconds - report.down - report.up - busiest) / report.budget.rounds


def slow_link_seconds(report: GroupStatistics, group: GroupState) -> float:
    """Return by how many seconds the slowest link of a task was slower than the slowest that is known (`group` has no barrier yet).

    It is nothing where links stay as they are. Where they are drawn anew each time some member has a slow one in every inner round,
    and an average does not tell. Links of members who have left since say nothing of the group.
    """
    links = [(work.down + work.up) / work.answers for work in report.work if work.client]
    if not links:
        return 0.0
    depth = report.budget.depth or group.layers
    return max(0.0, max(links) - max(group.link_seconds(depth, report.budget.rank)))


def moving_average(values: list[float]) -> float:
    """Return a moving average, x <- 0.8 x + 0.2 x_obs; 0 before anything was seen."""
    average = values[0] if values else 0.0
    for value in values[1:]:
        average += GAIN * (value - average)
    return average
