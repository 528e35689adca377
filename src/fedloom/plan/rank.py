"""Rules for the LoRA rank of a client. A rule is a value that is called with (profile, fleet) and knows its largest rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedloom.core.errors import Refused
from fedloom.core.policies import Fleet
from fedloom.core.seeds import rng
from fedloom.core.types import Profile


class RankRule(Protocol):
    """Rule for the rank: (profile, fleet) -> rank. Its `largest` is the server's rank."""

    @property
    def largest(self) -> int:
        """The highest rank that the rule can give."""
        ...

    def __call__(self, profile: Profile, fleet: Fleet) -> int:
        """Return the rank of this client's next task."""
        ...


@dataclass(frozen=True, slots=True)
class FixedRank:
    """Constant rank for every client, as in FedIT.

    Fields:
        rank: the rank.
    """

    rank: int = 8

    def __post_init__(self) -> None:
        _check("plan.rank.rank", self.rank)

    @property
    def largest(self) -> int:
        """The rank itself."""
        return self.rank

    def __call__(self, profile: Profile, fleet: Fleet) -> int:
        """Return the rank, the same for every client."""
        return self.rank


@dataclass(frozen=True, slots=True)
class RandomRank:
    """A uniform random rank, drawn anew for each task (HLoRA prototype, its first policy).

    Fields:
        low: lowest rank.
        high: highest rank.
    """

    low: int = 2
    high: int = 8

    def __post_init__(self) -> None:
        _check("plan.rank.low", self.low)
        if self.high < self.low:
            raise Refused("plan.rank.high", self.high, f"choose at least plan.rank.low, which is {self.low}")

    @property
    def largest(self) -> int:
        """`high`."""
        return self.high

    def __call__(self, profile: Profile, fleet: Fleet) -> int:
        """Return a draw that depends on the run's seed, the client and how many tasks it had, and on nothing else."""
        turn = fleet.dispatched.get(profile.client, 0)
        return rng(fleet.seed, "rank", profile.client, turn).randint(self.low, self.high)


@dataclass(frozen=True, slots=True)
class RankByData:
    """Rank by the percentile of the client's data size among the clients seen so far (HLoRA prototype, its final policy).

    r_k = max(1, floor(r_max * #{j seen : n_j <= n_k} / #seen)); a client not seen yet gets r_max.

    Fields:
        rank_max: highest rank (r_max).
    """

    rank_max: int = 8

    def __post_init__(self) -> None:
        _check("plan.rank.rank_max", self.rank_max)

    @property
    def largest(self) -> int:
        """`rank_max`."""
        return self.rank_max

    def __call__(self, profile: Profile, fleet: Fleet) -> int:
        """Apply the percentile rule to `fleet.reported_examples`."""
        mine = fleet.reported_examples.get(profile.client)
        if mine is None:
            return self.rank_max
        below = sum(examples <= mine for examples in fleet.reported_examples.values())
        return max(1, self.rank_max * below // len(fleet.reported_examples))


@dataclass(frozen=True, slots=True)
class RankByCapability:
    """The largest of `ranks` that fits the client: training within its memory, upload (of float32) within `upload_seconds`.

    A client that fits none gets the smallest: it takes part slowly rather than not at all.

    Fields:
        ranks: ranks to choose from.
        upload_seconds: longest upload (s).
        batch_tokens: tokens of the batch for which memory is estimated.
    """

    ranks: tuple[int, ...] = (2, 4, 8)
    upload_seconds: float = 10.0
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if not self.ranks:
            raise Refused("plan.rank.ranks", self.ranks, "name at least one rank, for instance (2, 4, 8)")
        for rank in self.ranks:
            _check("plan.rank.ranks", rank)
        if not self.upload_seconds > 0:
            raise Refused("plan.rank.upload_seconds", self.upload_seconds, "give positive seconds")

    @property
    def largest(self) -> int:
        """The highest of `ranks`."""
        return max(self.ranks)

    def __call__(self, profile: Profile, fleet: Fleet) -> int:
        """Return the largest rank that fits, else the smallest."""

        def fits(rank: int) -> bool:
            upload = 8 * fleet.shape.payload(rank) / profile.up_bps
            memory = fleet.shape.train_memory(rank, self.batch_tokens)
            return upload <= self.upload_seconds and memory <= profile.memory

        return max((rank for rank in self.ranks if fits(rank)), default=min(self.ranks))


def _check(field: str, rank: int) -> None:
    if rank < 1:
        raise Refused(field, rank, "a LoRA rank is a whole number of at least 1")
