"""Rules for the number of blocks that a client trains, counted from the output.

A rule is a value that is called with (profile, fleet, budget). The budget has the rank and the steps of the task. Depth as in
HierFedLoRA (arXiv 2503.21213) and LEGEND (arXiv 2412.20004): what lies below the trained blocks runs, is not trained and is not sent
back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.policies import Fleet
from fedloom.core.types import Budget, Profile
from fedloom.plan.client_cost import CostModel


class DepthRule(Protocol):
    """Rule for the depth: (profile, fleet, budget) -> depth, within its `bounds`."""

    @property
    def bounds(self) -> tuple[int, int | None]:
        """The lowest and the highest depth (None: as high as the model allows) that the rule can give."""
        ...

    def __call__(self, profile: Profile, fleet: Fleet, budget: Budget) -> int:
        """Return the depth of this client's next task."""
        ...


@dataclass(frozen=True, slots=True)
class FixedDepth:
    """Constant depth for every client.

    Fields:
        depth: blocks to train.
    """

    depth: int = 1

    def __post_init__(self) -> None:
        _check("plan.depth.depth", self.depth)

    @property
    def bounds(self) -> tuple[int, int]:
        """The depth itself."""
        return self.depth, self.depth

    def __call__(self, profile: Profile, fleet: Fleet, budget: Budget) -> int:
        """Return the depth, the same for every client."""
        return self.depth


@dataclass(frozen=True, slots=True)
class DepthByMemory:
    """The largest depth at which training, at the rank of the task, fits the client's memory.

    Fields:
        batch_tokens: tokens of the batch for which memory is estimated.
        least: depth where none fits.
    """

    batch_tokens: int = 2048
    least: int = 1

    def __post_init__(self) -> None:
        _check("plan.depth.least", self.least)

    @property
    def bounds(self) -> tuple[int, None]:
        """Depths from `least` on."""
        return self.least, None

    def __call__(self, profile: Profile, fleet: Fleet, budget: Budget) -> int:
        """Return the largest depth that fits, else `least`."""

        def fits(depth: int) -> bool:
            return fleet.shape.train_memory(budget.rank, self.batch_tokens, depth) <= profile.memory

        return _deepest(fleet.shape, self.least, fits)


@dataclass(frozen=True, slots=True)
class DepthByCapability:
    """The largest depth that fits the client's memory and lets it answer in time.

    Source: after LEGEND (Liu et al., arXiv 2412.20004). The more capable a device, the deeper it trains, so that all answer at
    about the same time. The time is that of download, steps and upload in float32, by the client's profile.

    Fields:
        seconds: longest task (s).
        batch_tokens: tokens of the batch for which memory is estimated.
        least: depth where none fits.
    """

    seconds: float = 30.0
    batch_tokens: int = 2048
    least: int = 1

    def __post_init__(self) -> None:
        _check("plan.depth.least", self.least)
        if not self.seconds > 0:
            raise Refused("plan.depth.seconds", self.seconds, "give the positive seconds that a task may take")

    @property
    def bounds(self) -> tuple[int, None]:
        """Depths from `least` on."""
        return self.least, None

    def __call__(self, profile: Profile, fleet: Fleet, budget: Budget) -> int:
        """Return the largest depth that fits, else `least`."""
        shape, rank = fleet.shape, budget.rank
        cost = CostModel.from_profile(profile, shape, rank, self.batch_tokens)

        def fits(depth: int) -> bool:
            memory = shape.train_memory(rank, self.batch_tokens, depth)
            return memory <= profile.memory and cost.task_seconds(shape, rank, depth, budget.steps) <= self.seconds

        return _deepest(shape, self.least, fits)


def check_blocks(rule: DepthRule, shape: Shape, model: str = "the model") -> None:
    """Raise Refused for a depth that this model, an architecture of this name, does not have."""
    least, most = rule.bounds
    if not shape.depths:
        raise Refused("plan.depth", rule, f"{model} has no list of blocks, each passed once; leave plan.depth out")
    if max(least, most or 0) > shape.layers:
        raise Refused(
            "plan.depth", max(least, most or 0), f"the model has {shape.layers} blocks; choose at most that many"
        )
    if least < min(shape.depths.values()):
        raise Refused(
            "plan.depth",
            least,
            f"the top {least} blocks hold nothing adapted; choose at least {min(shape.depths.values())}",
        )


def _deepest(shape: Shape, least: int, fits: Callable[[int], bool]) -> int:
    return max((depth for depth in range(least, shape.layers + 1) if fits(depth)), default=least)


def _check(field: str, depth: int) -> None:
    if depth < 1:
        raise Refused(field, depth, "a depth is a whole number of at least 1, counted from the output")
