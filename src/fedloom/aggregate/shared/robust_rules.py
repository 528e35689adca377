"""Rules that weigh the clients of a merge by how alike their changes are, without being told how many of them lie.

Each is a value with `weigh(likeness, memory) -> (weights, memory)`: a weight for each client, together at most 1, and what it wants
to know at the next merge. They see cosines and lengths alone (`likeness`), so they go with every method and every mixture of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from fedloom.aggregate.shared.likeness import Likeness
from fedloom.core.errors import Refused
from fedloom.core.types import ClientId

Memory: TypeAlias = Mapping[str, Tensor]
"""What a rule knows of earlier merges: by name, two sums, (2,) in float64."""

FEWEST = 5
"""Clients below which nobody can be left out: with four, two of them are half."""
LENGTH = 0.05
"""How much the logarithm of a length above the median takes off a cosine."""
LONGEST = 1.5
"""Times the median that a change may count; a longer one weighs less, as if it were shortened."""
STEPS = 32
"""Steps towards the geometric median; each of them cuts the error to less than half."""
USUAL = "usual cosine"


class Rule(Protocol):
    """How clients are weighed.

    Fields:
        fewest: clients that it has to see in a merge; a schedule whose merges hold fewer answers is refused.
        client: the trusted client (None: it needs none).
        exempt: laws that weighing by this rule breaks by design, by number, with the reason.
    """

    fewest: ClassVar[int]
    exempt: ClassVar[Mapping[int, str]]

    @property
    def client(self) -> ClientId | None:
        """The trusted client."""
        ...

    def weigh(self, likeness: Likeness, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the weights of the clients, (K,), and what to remember."""
        ...


@dataclass(frozen=True, slots=True)
class MultiKrum:
    """Clients that agree with their nearest others are averaged; those that do not are left out, at most an assumed share.

    Source: Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017 (arXiv 1703.02757), section 4, multi-Krum: of K
    clients the K - f nearest to their K - f - 2 neighbours are averaged. Here f is at most `share` of K, and three choices are ours.
    Directions are compared, by a client's mean cosine with its K - f - 2 nearest, since lengths differ with rank and steps. A length
    above the median lowers it a little, and counts as at most 1.5 medians. Sums over earlier merges are compared, because one merge
    of skewed clients shows too little (Karimireddy et al., arXiv 2012.10333). Only a client that agrees less than `least` times as
    well as the median is left out, so that none is where none lies. With fewer than 5 clients in a merge all count as the schedule
    says.

    Fields:
        share: largest share of the clients that is left out (above 0, below 0.5).
        least: agreement below which a client may be left out, times that of the median (above 0, at most 1; 1: the share always is).
        memory: how much of a client's earlier agreement counts at its next one (0: each merge is judged by itself; below 1).
    """

    share: float = 0.3
    least: float = 0.4
    memory: float = 0.9
    client: ClassVar[None] = None
    fewest: ClassVar[int] = FEWEST
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType({})

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            remedy = "the largest share of liars: above 0, below one half; 0.3 is usual"
            raise Refused("aggregator.rule.share", self.share, remedy)
        if not 0 < self.least <= 1:
            remedy = "how well a client agrees at least, times the median: above 0, at most 1; 0.4 is usual"
            raise Refused("aggregator.rule.least", self.least, remedy)
        if not 0 <= self.memory < 1:
            remedy = "what is left of earlier agreement: 0 or more, below 1"
            raise Refused("aggregator.rule.memory", self.memory, remedy)

    def weigh(self, likeness: Likeness, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the weights of those who agree, less where they are long."""
        count = len(likeness.clients)
        if count < FEWEST:
            return likeness.shares, memory
        most = min(math.floor(self.share * count + 1e-9), (count - 3) // 2)
        agreement = agreement_with_nearest(likeness, count - most - 2)
        sums = torch.stack([memory.get(client, torch.zeros(2, dtype=torch.float64)) for client in likeness.clients])
        sums = self.memory * sums + torch.stack([agreement, agreement.quantile(0.5).expand(count)], 1)
        # where even the median agrees with nobody, nothing can be told
        above = torch.where(sums[:, 1] > 0, sums[:, 0] - self.least * sums[:, 1], 0.0)
        worst = sorted(range(count), key=lambda k: float(above[k]))[:most]
        shares = limited_shares(likeness.shares)
        shares[[k for k in worst if above[k] < 0]] = 0.0
        weights = shares / shares.sum() * (LONGEST / likeness.lengths.clamp_min(LONGEST))
        return weights, {**memory, **dict(zip(likeness.clients, sums, strict=True))}


@dataclass(frozen=True, slots=True)
class Trust:
    """A client counts by how far it goes where a trusted one goes, and moves the model no further than that one.

    Source: Cao et al., "FLTrust", NDSS 2021 (arXiv 2012.13995), section 4: weight max(0, cosine with the trusted change), each change
    as long as that one. Here the trusted change is the latest of a client of the federation, remembered where it is not in the
    merge. It counts as much as the best of the others, and shorter changes are not made longer. Under a schedule without a buffer a
    single answer counts by its cosine over the usual one, at most fully. That is a filter, as AFLGuard's (arXiv 2212.06325) and
    Zeno++'s (arXiv 1903.07020). Until the trusted client has answered, the model stays as it is.

    Fields:
        client: name of the trusted client, whose data are clean and whose machine is the server owner's own.
        longest: times the length of the trusted change that an answer may count.
    """

    client: ClientId
    longest: float = 1.0
    fewest: ClassVar[int] = 1
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            2: "clients weigh by their agreement with the trusted one",
            8: "as law 2",
        }
    )

    def __post_init__(self) -> None:
        if not self.client:
            raise Refused(
                "aggregator.rule.client", self.client, "the name of a client of the federation whom you trust"
            )
        if not 0 < self.longest < math.inf:
            raise Refused(
                "aggregator.rule.longest", self.longest, "times the length of the trusted change; 1.0 is usual"
            )

    def weigh(self, likeness: Likeness, memory: Memory) -> tuple[Tensor, Memory]:
        """Return weights by agreement with the trusted change; all 0 without one, or where nobody agrees."""
        if likeness.trusted is None or likeness.reach is None:
            return torch.zeros_like(likeness.shares), memory
        trust, shares = likeness.trusted.clamp_min(0.0), limited_shares(likeness.shares)
        others = torch.tensor([client != self.client for client in likeness.clients])
        usual, memory = self._usual(trust[others], memory)
        trust[~others] = max([usual or 1.0, *trust[others].tolist()])
        if len(trust) == 1:
            weights = (trust / usual).clamp_max(1.0) if usual else (~others).double()
        else:
            total = float((shares * trust).sum())
            weights = shares * trust / total if total > 0 else torch.zeros_like(shares)
        return weights * (self.longest / likeness.reach.clamp_min(self.longest)), memory

    def _usual(self, trust: Tensor, memory: Memory) -> tuple[float, Memory]:
        """Return the running mean of the cosines of those who agree at all (0: nobody has so far), and the memory with it."""
        known, agree = memory.get(USUAL, torch.zeros(2, dtype=torch.float64)), trust[trust > 0]
        if len(agree):
            known = 0.9 * known + torch.stack([agree.mean(), torch.ones((), dtype=torch.float64)])
            memory = {**memory, USUAL: known}
        return (float(known[0] / known[1]) if float(known[1]) > 0 else 0.0), memory


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """The point whose distances to all changes have the smallest sum, as a weighted mean of them.

    Source: Pillutla et al., "Robust Aggregation for Federated Learning" (RFA), arXiv 1912.13445, section 3: smoothed Weiszfeld steps.
    Under half of the weight cannot move it arbitrarily far. Within that every client moves it, so it resists long changes better than
    turned ones.
    """

    client: ClassVar[None] = None
    fewest: ClassVar[int] = 3
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {2: "a median is no mean", 8: "as law 2: who changed nothing pulls the median"}
    )

    def weigh(self, likeness: Likeness, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the weights of the geometric median; they sum to 1."""
        shares, inner = limited_shares(likeness.shares), likeness.inner
        weights = shares
        for _ in range(STEPS):
            weights = shares / distances(inner, weights).clamp_min(1e-6)
            weights = weights / weights.sum()
        return weights, memory


@dataclass(frozen=True, slots=True)
class CentredClipping:
    """Each change counts as far as the median distance from the centre; the centre is found in a few steps from no change.

    Source: Karimireddy et al., "Learning from History for Byzantine Robust Optimization", arXiv 2012.10333, Alg. 2, with the
    median of the distances as the radius.

    Fields:
        steps: steps of the centre (1 is a bound of the length at the median).
    """

    steps: int = 3
    client: ClassVar[None] = None
    fewest: ClassVar[int] = 3
    exempt: ClassVar[Mapping[int, str]] = MappingProxyType(
        {2: "a change farther from the centre than the median is shortened", 8: "as law 2"}
    )

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Refused("aggregator.rule.steps", self.steps, "at least 1; 3 is usual")

    def weigh(self, likeness: Likeness, memory: Memory) -> tuple[Tensor, Memory]:
        """Return the weights of the centre; they sum to at most 1."""
        shares, inner = limited_shares(likeness.shares), likeness.inner
        centre = torch.zeros_like(shares)
        for _ in range(self.steps):
            far = distances(inner, centre)
            counted = shares * (far.quantile(0.5) / far.clamp_min(1e-300)).clamp_max(1.0)
            centre = centre * (1.0 - counted.sum()) + counted
        return centre, memory


def agreement_with_nearest(likeness: Likeness, near: int) -> Tensor:
    """Return each client's mean cosine with its `near` nearest, and a little less for a length above the median, (K,)."""
    cosines = likeness.cosines.clone().fill_diagonal_(-math.inf)
    nearest: Tensor = cosines.sort(1, descending=True).values[:, :near].mean(1)
    return nearest - LENGTH * likeness.lengths.clamp_min(1.0).log()


def distances(inner: Tensor, weights: Tensor) -> Tensor:
    """Return the distance of each change to the combination of all with these weights, from inner products, (K,)."""
    squares: Tensor = inner.diagonal() - 2.0 * inner @ weights + weights @ inner @ weights
    return squares.clamp_min(0.0).sqrt()


def limited_shares(shares: Tensor) -> Tensor:
    """Return shares of which none is more than twice the median: many examples or answers are no licence to lie."""
    limited = torch.minimum(shares, 2.0 * shares.quantile(0.5))
    return limited / limited.sum()
