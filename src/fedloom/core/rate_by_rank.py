"""The learning rate of an adapter as a function of its rank: small ranks need larger steps.

At one scaling (alpha / r) the product B A is a sum over r directions. AdamW moves each by about the learning rate in a step, whatever
the rank, so an adapter of low rank moves its layer less. The sum grows with sqrt(r) where the steps of directions are independent
(as in Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", arXiv 2312.03732, 2023), and with r where they
agree. A learning rate in proportion to r ** -power, power between 0.5 and 1, makes up for it. A federation of mixed ranks at one rate
compares rates, not ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.core.errors import Refused

MOST_RANK, MOST_POWER = 2**20, 2.0


@dataclass(frozen=True, slots=True)
class RateByRank:
    """Learning rate of the factors of an adapter of rank r: the run's times (reference / r) ** power. A head keeps the run's.

    Fields:
        power: how fast the rate falls with the rank, from 0 (one rate for all ranks) to 2; 0.5 keeps the length of a step's sum over
            directions (default 0.5).
        reference: rank whose learning rate is the run's (default None: the largest rank of the plan).
    """

    power: float = 0.5
    reference: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.power <= MOST_POWER:
            raise Refused("plan.rate.power", self.power, "0 (one rate for all ranks) to 2; 0.5 is usual")
        if self.reference is not None and not 1 <= self.reference <= MOST_RANK:
            raise Refused(
                "plan.rate.reference", self.reference, "the rank that has the run's learning rate, at least 1"
            )

    def multiple(self, rank: int) -> float:
        """Return the learning rate at this rank as a multiple of the run's. Raises ValueError without a reference.

        >>> RateByRank(0.5, reference=8).multiple(2)
        2.0
        """
        if self.reference is None:
            raise ValueError("the reference is that of the plan: use the rule of a budget")
        return float((self.reference / rank) ** self.power)


def rate_bounds(rates: RateByRank | None, largest: int) -> tuple[float, float]:
    """Return the smallest and the largest multiple of the run's learning rate in adapters of rank 1 to `largest`, heads included."""
    if rates is None:
        return 1.0, 1.0
    return min(1.0, rates.multiple(largest)), max(1.0, rates.multiple(1))
