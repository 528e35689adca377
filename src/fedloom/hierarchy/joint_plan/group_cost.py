"""Cost of a global round for a group, by how often it averages inside, how deep it trains, at which rank and for how many steps.

Source: HierFedLoRA, arXiv 2503.21213, 2025, and ParallelSFL, arXiv 2410.01256, 2024, Eq. 17. In each of `rounds` inner rounds every
member receives the adapter, does its share of the `steps`, and answers; the edge waits for the slowest of them, and at both ends for
its own link to the server:

    T = max over members of (steps * t_i(depth) + rounds * (link_i + barrier)) + link of the edge.

The barrier is our own: where links and speeds change all the time another member is the last in each inner round, and the sum of
these maxima is more than the largest sum. It is what was seen to be missing, 0 until then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from fedloom.core.errors import Refused
from fedloom.core.types import ClientId

Bytes: TypeAlias = Callable[[int, int], float]
"""(depth, rank) -> bytes."""

SLACK = 1e-9  # relative; what rounding may add to a time that just fits


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes by (depth, rank).

    Fields:
        up: of an answer.
        down: of what a member receives.
        memory: of memory while training.

    With a `Shape`: `Sizes(lambda d, r: shape.payload(r, d), lambda d, r: shape.payload(r), lambda d, r: shape.train_memory(r,
    batch_tokens, d))`, because the layers below travel down whatever the depth.
    """

    up: Bytes
    down: Bytes
    memory: Bytes


@dataclass(frozen=True, slots=True)
class Device:
    """A member as it was measured.

    Fields:
        client: name of the member.
        seconds: seconds of a local step at depth 1, 2, ... of the model.
        up_bps: its link to the edge (bits per second; default no limit).
        down_bps: its link from the edge (bits per second; default no limit).
        memory: memory for training (bytes; default no limit).
    """

    client: ClientId
    seconds: tuple[float, ...]
    up_bps: float = math.inf
    down_bps: float = math.inf
    memory: float = math.inf

    def __post_init__(self) -> None:
        if not self.seconds or not all(0 < one < math.inf for one in self.seconds):
            raise Refused("device.seconds", self.seconds, f"client {self.client} has positive seconds for each depth")
        _positive("device", up_bps=self.up_bps, down_bps=self.down_bps, memory=self.memory)


@dataclass(frozen=True, slots=True)
class Choice:
    """Work of a group in a global round.

    Fields:
        rounds: inner aggregations.
        depth: depth at which members train, as in the budget of an edge's task.
        rank: rank at which they train.
        steps: steps of each member, shared out over the rounds.
        why: one sentence with the numbers that decided.
    """

    rounds: int
    depth: int
    rank: int
    steps: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class ObservedReward:
    """Worth of an earlier choice: by how much the loss fell, per second of the round."""

    rounds: int
    depth: int
    reward: float


@dataclass(frozen=True, slots=True)
class GroupState:
    """A group before a global round.

    Fields:
        members: its members as they were measured.
        sizes: bytes of messages and of memory.
        up_bps: link from the edge to the server (bits per second; default no limit).
        down_bps: link from the server to the edge (bits per second; default no limit).
        dispersion: delta_g, the distance of the members' updates from their mean, per local step and unit of learning rate.
        mass: squared norm of the gradients in each layer, from the output down; empty: nothing is known yet, all count alike.
        energy: share of each direction of the update, largest first; empty: as for `mass`.
        rewards: choices that were tried, oldest first, by the loss from task to task.
        barrier: seconds that an inner round was seen to take beyond the members' own.
        inner_rewards: choices of two rounds or more, by the loss inside a task.
        tasks: tasks that are remembered.
    """

    members: tuple[Device, ...]
    sizes: Sizes
    up_bps: float = math.inf
    down_bps: float = math.inf
    dispersion: float = 0.0
    mass: tuple[float, ...] = ()
    energy: tuple[float, ...] = ()
    rewards: tuple[ObservedReward, ...] = field(default=())
    barrier: float = 0.0
    inner_rewards: tuple[ObservedReward, ...] = field(default=())
    tasks: int = 0

    def __post_init__(self) -> None:
        depths = {len(member.seconds) for member in self.members}
        if len(depths) != 1:
            raise Refused("group.members", len(self.members), "at least one, with step seconds for the same depths")
        if self.mass and {len(self.mass)} != depths:
            raise Refused("group.mass", self.mass, f"one number per layer, of which there are {self.layers}")
        if not all(0 <= value < math.inf for value in (self.dispersion, *self.mass, *self.energy)):
            raise Refused("group.mass", self.mass, "mass, energy and dispersion are finite, 0 or more")
        _positive("group", up_bps=self.up_bps, down_bps=self.down_bps)

    @property
    def layers(self) -> int:
        """Layers of the model, the greatest depth."""
        return len(self.members[0].seconds)

    def link_seconds(self, depth: int, rank: int) -> tuple[float, ...]:
        """Return the seconds that each member spends on its link, and at the barrier, in one inner round."""
        up, down = 8.0 * self.sizes.up(depth, rank), 8.0 * self.sizes.down(depth, rank)
        return tuple(up / member.up_bps + down / member.down_bps + self.barrier for member in self.members)

    def edge_link_seconds(self, depth: int, rank: int) -> float:
        """Return the seconds that the edge spends on its link in a global round."""
        return 8.0 * self.sizes.up(depth, rank) / self.up_bps + 8.0 * self.sizes.down(depth, rank) / self.down_bps

    def step_seconds(self, depth: int) -> tuple[float, ...]:
        """Return the seconds of a local step of each member."""
        return tuple(member.seconds[depth - 1] for member in self.members)

    def seconds(self, choice: Choice) -> float:
        """Return T: how long a global round lasts for this group."""
        work = zip(self.step_seconds(choice.depth), self.link_seconds(choice.depth, choice.rank), strict=True)
        longest = max(choice.steps * step + choice.rounds * link for step, link in work)
        return longest + self.edge_link_seconds(choice.depth, choice.rank)

    def depths(self, rank: int) -> tuple[int, ...]:
        """Return the depths at which every member can train within its memory. Raises Refused where there is none."""
        poorest = min(self.members, key=lambda member: member.memory)
        fit = tuple(depth for depth in range(1, self.layers + 1) if self.sizes.memory(depth, rank) <= poorest.memory)
        if not fit:
            remedy = f"client {poorest.client} cannot train one layer at rank {rank}; lower the rank or leave it out"
            raise Refused("device.memory", poorest.memory, remedy)
        return fit

    def covered_mass(self, depth: int) -> float:
        """Return G(d): the share of the gradients' mass in the top `depth` layers."""
        return leading_share(self.mass, depth, self.layers)


def leading_share(values: tuple[float, ...], count: int, among: int) -> float:
    """Return what the first `count` hold of all `values`; of `among` alike ones, if nothing is known."""
    total = math.fsum(values)
    return math.fsum(values[:count]) / total if total > 0 else min(count / among, 1.0)


def whole_number(ratio: float) -> int:
    """Return the largest whole number of at most `ratio`, rounding forgiven; never below 0 nor above a million."""
    return int(min(max(ratio * (1.0 + SLACK), 0.0), 1e6))


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise Refused(f"{owner}.{name}", value, "a positive number; math.inf is no limit")
