"""Noise: Gaussian noise on the mean of clipped changes, as central differential privacy asks.

Source: McMahan et al., arXiv 1710.06963, 2018, Alg. 1: standard deviation z S max_k p_k, with S the clipping norm, p_k the
weight of client k (in an asynchronous buffer that of all its answers together) and z the noise multiplier, which is what a privacy
accountant takes. Where one factor is frozen (FFA-LoRA) noise is not multiplied by noise, which is why that method was made. The
calibration holds where each entry is a mean with the schedule's weights (`plain_mean`), not where norms or the holders of a
direction decide on weights (HetLoRA, Fed-PLoRA, FedSA) or a memory lets a change live on (Momentum). The sensitivity is that of
one client's change taken away, its weight and the others' unchanged: weigh with `uniform`, because weights by examples are data
themselves. The draws follow `seed`: for real privacy it must be secret, and drawn for this run alone. Cost: one pass over the
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from fedloom.aggregate.clip import Clip
from fedloom.aggregate.shared.wrapper import Wrapper, require_factors, trained_sides
from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, map_tensors, take_sides
from fedloom.core.policies import Aggregator, Merge
from fedloom.core.seeds import derive
from fedloom.core.types import ClientId, Model

COUNT = "noise"


@dataclass(frozen=True, slots=True)
class Noise(Wrapper):
    """A clipped method, with noise in proportion to what one client can change.

    Fields:
        inner: a `Clip` around a method that takes plain means.
        multiplier: standard deviation of the noise relative to the largest change by one client (z).
        seed: seed of the noise; for real privacy it must be secret, and drawn for this run alone.
    """

    inner: Aggregator = field(default_factory=Clip)
    multiplier: float = 1.0
    seed: int = 0
    wrapper_exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            1: "noise is added to the model",
            2: "noise is added to the mean",
            5: "noise adds energy to every direction",
            8: "noise moves also what nobody trained",
        }
    )
    adds_noise: ClassVar[bool] = True
    each_once: ClassVar[str] = "one client's change would be in several versions, and the noise is made for one"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Clip):
            name, remedy = type(self.inner).__name__, "noise is measured by what one client can change: wrap Clip(...)"
            raise Refused("aggregator (Noise).inner", name, remedy)
        require_factors("Noise", self.inner.inner, "noise is calibrated where factors are what is averaged")
        if not getattr(self.inner.inner, "plain_mean", False):
            name = type(self.inner.inner).__name__
            remedy = (
                "one client can change more than its weight times the norm there; wrap FedIT, FFA, RoLoRA or LoRAA2"
            )
            raise Refused("aggregator (Noise).inner.inner", name, remedy)
        if not self.multiplier > 0:
            raise Refused("aggregator.multiplier", self.multiplier, "the noise multiplier is positive; 1.0 is usual")

    def merge(self, model: Model, merge: Merge) -> Model:
        """Add N(0, (z S step max_k p_k)^2) to every entry that clients trained, after the wrapped merge."""
        after = self.inner.merge(model, merge)
        assert isinstance(self.inner, Clip)
        deviation = self.multiplier * self.inner.norm * merge.step * largest_share(merge)
        count = int(model.memory[COUNT].dense["count"]) if COUNT in model.memory else 0
        generator = torch.Generator().manual_seed(derive(self.seed, "noise", count))

        def noisy(tensor: Tensor) -> Tensor:
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
            return (tensor.double() + deviation * drawn).to(tensor.dtype)

        adapter = take_sides(trained_sides(merge), map_tensors(noisy, after.adapter), after.adapter)
        memory = {**after.memory, COUNT: Adapter({}, {"count": torch.tensor(count + 1)})}
        return replace(after, adapter=adapter, memory=memory)


def largest_share(merge: Merge) -> float:
    """Return the largest weight of one client, all its answers in this merge together."""
    shares = dict[ClientId, float]()
    for weight, update in merge.weighted_updates:
        shares[update.task.client] = shares.get(update.task.client, 0.0) + weight
    return max(shares.values())
