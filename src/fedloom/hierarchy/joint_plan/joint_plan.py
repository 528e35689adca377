"""The plan of the root of a hierarchy: a joint rule over all groups, as they are known, gives each edge its budget.

Source: HierFedLoRA, arXiv 2503.21213, 2025, whose server estimates and configures before each global round; as rebuilt in methods
4b.2. What is known is what edges told with their reports (`Fleet.groups`), the devices' profiles until then. So the plan has no
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
from fedloom.core.types import Budget, ClientId, GroupHistory, Profile, MemberWork, GroupStatistics
from fedloom.hierarchy.joint_plan.gradient_score import GradientScore
from fedloom.hierarchy.joint_plan.group_cost import Device, GroupState, Observed, Sizes
from fedloom.hierarchy.joint_plan.shared import Joint
from fedloom.plan.client_cost import GAIN, CostModel
from fedloom.plan.depth import FixedDepth, check_blocks

RANK = 8
"""Of a client before it was seen; it adds little to the time of a step."""


@dataclass(frozen=True, slots=True)
class JointPlan:
    """Rounds, steps, depth and rank of each edge's task by `rule`.

    `rounds` and `depth` take the place of what the rule chose (None: they do not), to see what each is worth. `batch_tokens` is the
    size of the batch that memory is reckoned with, and a step's time before any was seen.
    """

    rule: Joint = field(default_factory=GradientScore)
    rounds: int | None = None
    depth: int | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("rounds", "depth", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Refused(f"hierarchy.plan.{name}", getattr(self, name), "choose a whole number of at least 1")

    def __call__(self, profile: Profile, fleet: Fleet) -> Budget:
        """The budget of this edge's next task."""
        if profile.client not in fleet.groups:
            raise Refused("plan", "Planned", "it plans for edges; give it as Hierarchy(plan=Planned())")
        groups = {edge: group_state(log, fleet.shape, self.batch_tokens) for edge, log in fleet.groups.items()}
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
        for log in fleet.groups.values():
            if (rank := self(log.edge, fleet).rank) > top:
                remedy = f"the server's rank is {top:g}, the highest of the run's plan; choose at most that"
                raise Refused("hierarchy.plan.rule.rank", rank, remedy)


def group_state(log: GroupHistory, shape: Shape, batch_tokens: int) -> GroupState:
    """A group as its log tells it."""
    up, down = log.edge.up_bps, log.edge.down_bps
    sizes = Sizes(
        lambda depth, rank: shape.payload(rank, depth),
        lambda depth, rank: shape.payload(rank),
        lambda depth, rank: shape.train_memory(rank, batch_tokens, depth),
    )
    known = GroupState(tuple(member_device(one, log, shape, batch_tokens) for one in log.members), sizes, up, down)
    return replace(
        known,
        dispersion=math.sqrt(moving_average([told.spread for told in log.statistics])),
        mass=layer_mass(log, shape),
        energy=log.statistics[-1].energy if log.statistics else (),
        observed=tuple(rewards_between_tasks(log.statistics, shape)),
        barrier=moving_average([max(barrier_seconds(told), slow_link_seconds(told, known)) for told in log.statistics]),
        earned=tuple(rewards_within_tasks(log.statistics, shape)),
        tasks=len(log.statistics),
    )


def member_device(profile: Profile, log: GroupHistory, shape: Shape, batch_tokens: int) -> Device:
    """A member by what it did in its group's tasks, oldest first.

    Sizes are those of float32 without folds, in what is learnt and in what is told from it; so a codec counts as a faster link, a
    fold as a slower one.
    """
    spent = [one for one in member_history(log, profile.client) if one.train > 0]
    cost = CostModel.from_profile(profile, shape, spent[-1].rank if spent else RANK, batch_tokens)
    for one in spent:
        cost = _followed(cost, one, shape)
    seconds = tuple(cost.step_seconds(depth) for depth in range(1, shape.layers + 1))
    up, down = (8.0 / link if link > 0 else math.inf for link in (cost.up, cost.down))
    return Device(profile.client, seconds, up, down, profile.memory)


def member_history(log: GroupHistory, client: ClientId) -> tuple[MemberWork, ...]:
    """What a member did, oldest first: in other groups before, then in this one."""
    here = (one for told in log.statistics for one in told.work if one.client == client)
    return (*log.past.get(client, ()), *here)


def _followed(cost: CostModel, one: MemberWork, shape: Shape) -> CostModel:
    cost = cost.after_training(min(one.depth or shape.layers, shape.layers), one.steps, one.train)
    cost = cost.after_upload(one.answers * shape.payload(one.rank, one.depth), one.up)
    return cost.after_download(one.answers * shape.payload(one.rank), one.down)


def layer_mass(log: GroupHistory, shape: Shape) -> tuple[float, ...]:
    """By depth, from the output down, what each layer was last seen to change; one that was never seen counts as their mean.

    The head is trained at any depth, and counts with the first.
    """
    latest = dict[str, float]()
    for told in log.statistics:
        latest |= told.mass
    if not latest:
        return ()
    seen: Mapping[int, float] = {
        depth: math.fsum(value for name, value in latest.items() if shape.depths.get(name) == depth)
        for depth in range(1, shape.layers + 1)
        if any(shape.depths.get(name) == depth for name in latest)
    }
    usual = math.fsum(seen.values()) / max(1, len(seen))
    holds, head = set(shape.depths.values()), math.fsum(v for name, v in latest.items() if name not in shape.depths)
    first, *lower = (seen.get(depth, usual if depth in holds else 0.0) for depth in range(1, shape.layers + 1))
    return (first + head, *lower)


def rewards_between_tasks(told: tuple[GroupStatistics, ...], shape: Shape) -> Iterator[Observed]:
    """What earlier choices earned: by how much the members' loss fell since the task before, a second."""
    for before, after in pairwise(told):
        if before.loss is not None and after.loss is not None and after.seconds > 0:
            depth = after.budget.depth or shape.layers
            yield Observed(after.budget.rounds, depth, (before.loss - after.loss) / after.seconds)


def rewards_within_tasks(told: tuple[GroupStatistics, ...], shape: Shape) -> Iterator[Observed]:
    """What choices earned without other groups: by how much members' own losses fell between rounds of one task, a second."""
    for one in told:
        falls = [fall for fall in map(loss_fall, one.work) if fall is not None]
        if falls and one.seconds > 0:
            depth = one.budget.depth or shape.layers
            yield Observed(one.budget.rounds, depth, math.fsum(falls) / len(falls) * one.budget.rounds / one.seconds)


def loss_fall(spent: MemberWork) -> float | None:
    """By how much a member's loss fell from one of its answers to the next; None: it answered once, or told no loss."""
    if spent.answers < 2 or spent.first_loss is None or spent.last_loss is None:
        return None
    return (spent.first_loss - spent.last_loss) / (spent.answers - 1)


def barrier_seconds(told: GroupStatistics) -> float:
    """Seconds of an inner round in which even the busiest member waited."""
    own = max((one.down + one.train + one.up for one in told.work), default=0.0)
    return max(0.0, told.seconds - told.down - told.up - own) / told.budget.rounds


def slow_link_seconds(told: GroupStatistics, known: GroupState) -> float:
    """Seconds by which the slowest links of a task were slower than the slowest that is known (`known` has no barrier yet).

    Those of members who have left since say nothing of the group.
    It is nothing where links stay as they are. Where they are drawn anew each time some member has a slow one in every inner round,
    and an average does not tell.
    """
    links = [(one.down + one.up) / one.answers for one in told.work if one.client]
    if not links:
        return 0.0
    slowest = max(links)
    depth = told.budget.depth or known.layers
    return max(0.0, slowest - max(known.links(depth, told.budget.rank)))


def moving_average(values: list[float]) -> float:
    """A moving average, x <- 0.8 x + 0.2 x_obs; 0 before anything was seen."""
    average = values[0] if values else 0.0
    for value in values[1:]:
        average += GAIN * (value - average)
    return average
