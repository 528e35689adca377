"""Devices whose steps take what they were measured to take at each depth, not what their FLOP say.

A device that keeps what its frozen blocks made of its texts trains the top block ten times as fast as all of them, while by FLOP a
forward pass through the whole model costs the same at every depth. Where others have trained deeper than a client does, what they
changed lies below it, and the blocks in between are computed again in each task. The first pass over a client's texts is made when
it joins, before the clock starts: it is the same for every method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedloom.core.model_shape import Shape
from fedloom.core.types import ClientId, Profile, Result, Task
from fedloom.simulate.devices import Devices, Seconds


@dataclass(frozen=True, slots=True)
class MeasuredDevices:
    """The devices of `inner`, with the seconds of a step as they were measured on one that has `flops` at full power.

    Fields:
        inner: the speeds, modes and links of the devices.
        flops: speed of the device of the measurements, as `inner` counts it.
        tokens: tokens of a step there.
        steps: seconds of a step at depth 1, 2, ... there; no deeper one is asked for.
        between: seconds of a block's forward pass in a step there, below the trained blocks and above the lowest one that changed.
    """

    inner: Devices
    flops: float
    tokens: int
    steps: tuple[float, ...]
    between: float

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return the devices of `inner`."""
        return self.inner.profiles(examples, seed)

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return the seconds of `inner`, those of training as they were measured."""
        by_flop = self.inner.seconds(task, result, profile, shape, seed, turn)
        depth = task.budget.depth or len(self.steps)
        changed = max((shape.depths[name] for name in task.start.fold.factors), default=0) if task.start.fold else 0
        measured = self.steps[depth - 1] + self.between * max(0, changed - depth)
        said = shape.train_flops(self.tokens, task.budget.rank, task.budget.depth) / self.flops
        return replace(by_flop, train=by_flop.train * measured / said)

    def train_seconds(self, profile: Profile, steps: int, depth: int) -> float:
        """Return the seconds of so many steps at full power, where nothing below has changed."""
        return steps * self.steps[depth - 1] * self.flops / profile.flops
