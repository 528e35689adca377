"""Estimate of the seconds that a task takes one client, by depth: from its reports, and from its profile until then.

Source: the estimates of HierFedLoRA (arXiv 2503.21213, as rebuilt in methods 4b.2): a step costs t(d) = a + b d seconds, forward
through all blocks and backward through the top d, and what is known of a client follows what is seen by x <- 0.8 x + 0.2 x_obs. The
line through depths is least squares under the same weights, so a client that became slower is followed at every depth. Where one
depth alone was seen the slope is that of the model's FLOP; with kept activations, where it is steeper, a second depth tells. Links
are averaged as seconds per byte, not bytes per second: of a bandwidth that changes all the time, that is what predicts the time.

Sizes need no learning: bytes up are `Shape.payload(rank, depth)`, bytes down `Shape.payload(rank)` at any depth (the layers below
travel in the fold), memory is `Shape.train_memory(rank, batch_tokens, depth)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fedloom.core.model_shape import Shape
from fedloom.core.types import Profile

GAIN = 0.2
"""Share of the latest observation (MergeSFL, arXiv 2311.13348, has 0.2); the first few count alike."""

TRUST = 0.02
"""Weight of the slope that follows from FLOP, against a variance of the depths seen of 1."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """Estimate for one client. Begin with `from_profile`, go on with `after_training`, `after_upload`, `after_download`: each a new
    value.

    Fields:
        rise: estimate of b / a from FLOP, for as long as one depth alone was seen.
        seconds: mean seconds of a step.
        up: seconds per byte of its uplink.
        down: seconds per byte of its downlink.
        depth: mean depth of the tasks seen.
        variance: variance of these depths.
        covariance: covariance of depths and step seconds.
        seen: tasks seen.
        uploads: uploads seen.
        downloads: downloads seen.
    """

    rise: float
    seconds: float
    up: float
    down: float
    depth: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0
    seen: int = 0
    uploads: int = 0
    downloads: int = 0

    @classmethod
    def from_profile(cls, profile: Profile, shape: Shape, rank: int, batch_tokens: int) -> CostModel:
        """Return the estimate before anything was observed: FLOP over the profile's speed, and its links."""
        still, whole = (shape.train_flops(batch_tokens, rank, depth) for depth in (0, None))
        rise = (whole - still) / shape.layers / still
        return cls(rise, still / profile.flops, 8.0 / profile.up_bps, 8.0 / profile.down_bps)

    def after_training(self, depth: int, steps: int, seconds: float) -> CostModel:
        """Return the estimate after a task of so many steps at this depth, which took so long to train."""
        if not self.seen:
            return replace(self, depth=float(depth), seconds=seconds / steps, seen=1)
        gain = _gain(self.seen)
        deeper, longer = depth - self.depth, seconds / steps - self.seconds
        return replace(
            self,
            depth=self.depth + gain * deeper,
            seconds=self.seconds + gain * longer,
            variance=(1 - gain) * (self.variance + gain * deeper * deeper),
            covariance=(1 - gain) * (self.covariance + gain * deeper * longer),
            seen=self.seen + 1,
        )

    def after_upload(self, size: int, seconds: float) -> CostModel:
        """Return the estimate after an upload of `size` bytes."""
        return replace(self, up=_updated_mean(self.up, seconds / size, self.uploads), uploads=self.uploads + 1)

    def after_download(self, size: int, seconds: float) -> CostModel:
        """Return the estimate after a download of `size` bytes."""
        return replace(
            self, down=_updated_mean(self.down, seconds / size, self.downloads), downloads=self.downloads + 1
        )

    @property
    def slope(self) -> float:
        """Return b, the seconds per step of one more trained block; a may be below 0, where the top block costs less than others."""
        guess = self.rise * self.seconds / (1.0 + self.rise * self.depth)
        return max(0.0, (self.covariance + TRUST * guess) / (self.variance + TRUST))

    def step_seconds(self, depth: int) -> float:
        """Return t(d) = a + b d, never below a hundredth of the mean seen: a step takes some time."""
        return max(self.seconds / 100.0, self.seconds + self.slope * (depth - self.depth))

    def upload_seconds(self, size: int) -> float:
        """Return the seconds to upload so many bytes."""
        return size * self.up

    def download_seconds(self, size: int) -> float:
        """Return the seconds to download so many bytes."""
        return size * self.down

    def task_seconds(self, shape: Shape, rank: int, depth: int, steps: int) -> float:
        """Return the seconds from dispatch to arrival, in float32 and with nothing in the fold but the layers below."""
        links = self.download_seconds(shape.payload(rank)) + self.upload_seconds(shape.payload(rank, depth))
        return links + steps * self.step_seconds(depth)


def moving_mean(values: Iterable[float]) -> float:
    """Return the moving mean of these values, oldest first: a plain mean of the first few; 0 of none."""
    mean = 0.0
    for seen, value in enumerate(values):
        mean = _updated_mean(mean, value, seen)
    return mean


def _gain(seen: int) -> float:
    """Return the weight of the latest observation: a plain mean at first, then a moving one."""
    return max(GAIN, 1.0 / (seen + 1))


def _updated_mean(mean: float, latest: float, seen: int) -> float:
    return latest if not seen else mean + _gain(seen) * (latest - mean)
