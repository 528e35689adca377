"""What a site draws in secret to protect its single records, and what that costs: the private part of DP-SGD.

Source: Abadi et al., "Deep Learning with Differential Privacy", arXiv 1607.00133, Alg. 1. In each step each record takes part by a
coin of its own (Poisson sampling); its gradient is cut to the norm `clip`; Gaussian noise of `multiplier` times `clip` is added to
the sum, which is divided by the expected size of a batch, never by that of the drawn one. An empty batch is a step too: noise alone.

Two data sets are neighbours if one has a record less, and a place where it was: the number of rows, and with it the rate, is known
(zero-out, as for clients in `private`). Coins and noise follow from a secret of the site, so the bound holds against everybody else,
the server too. All that is computed from noisy gradients costs nothing more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fedloom.privacy.accounting import SampledGaussian
from fedloom.privacy.private import Private
from fedloom.privacy.secret_noise import GRID, SecretNoise, add_noise, random_words

STATE_WORDS = 624
"""Words of 32 bits that torch's generator of the CPU holds: MT19937 (Matsumoto and Nishimura 1998)."""
COIN = 2**53
"""Values that a coin can take: as many as there are floats of equal distance from 0 to 1."""


def for_records(private: Private | None) -> Private | None:
    """Return what the sites of a run train with; None where not records but clients are protected, or nobody."""
    return private if private is not None and private.unit == "record" else None


def sampling_rate(rows: int, batch_size: int) -> float:
    """Return the probability that a row is in a step, so that `batch_size` rows are expected, or all where there are fewer."""
    return min(1.0, batch_size / rows)


def steps_cost(private: Private, rows: int, batch_size: int, steps: int) -> SampledGaussian:
    """Return what so many steps of training on so many rows tell of one of them."""
    return SampledGaussian(sampling_rate(rows, batch_size), private.multiplier, steps)


@dataclass(frozen=True, slots=True)
class RecordDraws:
    """Draws of one task at a site.

    Fields:
        secret: secret of the site.
        run: names the run, or the request where the number of the task came twice.
        task: number of the task.
    """

    secret: bytes = field(repr=False)
    run: str
    task: int

    def batch(self, step: int, rows: int, rate: float) -> list[int]:
        """Return who takes part in a step, as places among `rows`: each by its own coin, perhaps nobody."""
        coins = random_words(self.secret, "record batch", self.run, self.task, step, count=rows) & (COIN - 1)
        return [int(place) for place in (coins < int(rate * COIN)).nonzero()]

    def dropout_words(self, step: int) -> Tensor:
        """Return all words that a generator holds when this step and those after it begin, (624,) int64, of 32 bits each.

        Which of its numbers drop a part of a row depends on who else is in the batch. With masks that others know, one row more would
        change the gradients of all; with masks that they do not know, those of the others are as likely as without it. So the bound
        needs that masks are secret, and 32 bits of a seed could be tried one after the other.
        """
        return random_words(self.secret, "record dropout", self.run, self.task, step, count=STATE_WORDS) & (2**32 - 1)

    def noisy_mean(
        self, step: int, clipped: Mapping[str, Tensor], private: Private, expected: float
    ) -> dict[str, Tensor]:
        """Return a sum of clipped gradients with noise, rounded to the grid, over the expected size of a batch; in float64.

        The noise follows from the exact sum too: the same step gets the same noise, and no two sums share theirs.

        Args:
            step: number of the step in its task; no two steps have the same.
            clipped: the sum, by name of parameter, in float64.
            private: clip and multiplier.
            expected: expected size of a batch.
        """
        noise = SecretNoise(self.secret, ("record noise", self.run, self.task, step))
        deviation, grid = private.multiplier * private.clip, GRID * private.clip
        # a draw at two scales would tell what it was added to
        drawn = noise.normals(clipped, noise.digest(clipped, deviation.hex(), grid.hex()))
        return {name: noisy / expected for name, noisy in add_noise(clipped, drawn, deviation, grid).items()}
