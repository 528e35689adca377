"""Device and link models: who the simulated clients are, and how many virtual seconds a task takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedloom import payload
from fedloom.cost import Shape
from fedloom.errors import Refused
from fedloom.seeds import rng
from fedloom.types import ClientId, Profile, Result, Task


@dataclass(frozen=True, slots=True)
class Tier:
    """A class of devices: `share` of the federation, sustained FLOP/s, bits/s up and down, bytes of memory."""

    name: str
    share: float
    flops: float
    up_bps: float
    down_bps: float
    memory: float

    def __post_init__(self) -> None:
        for field in ("share", "flops", "up_bps", "down_bps", "memory"):
            if not getattr(self, field) > 0:
                raise Refused(
                    f"world.tiers.{field}", getattr(self, field), f"tier {self.name!r} needs a positive number"
                )


PHONE = Tier("phone", 0.5, flops=5e9, up_bps=2e6, down_bps=1e7, memory=1e9)
LAPTOP = Tier("laptop", 0.3, flops=3e10, up_bps=4e6, down_bps=2e7, memory=8e9)
WORKSTATION = Tier("workstation", 0.2, flops=1e11, up_bps=1e8, down_bps=1e8, memory=3.2e10)


@dataclass(frozen=True, slots=True)
class Seconds:
    """The parts of a task's duration, in virtual seconds."""

    down: float
    train: float
    up: float

    @property
    def total(self) -> float:
        """From dispatch to arrival."""
        return self.down + self.train + self.up


@dataclass(frozen=True, slots=True)
class World:
    """Tiers of devices; `jitter` is the standard deviation of the log of each task's training time (0: none)."""

    tiers: tuple[Tier, ...] = (PHONE, LAPTOP, WORKSTATION)
    jitter: float = 0.2

    def __post_init__(self) -> None:
        if not self.tiers:
            raise Refused("world.tiers", self.tiers, "name at least one tier of devices")
        if not self.jitter >= 0:
            raise Refused("world.jitter", self.jitter, "0 means that a task always takes the same time")

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """A device for each client: tiers by their shares (largest remainder first), dealt in seeded random order."""
        clients = sorted(examples)
        tiers = self._dealt(len(clients))
        rng(seed, "tiers").shuffle(tiers)
        return tuple(
            Profile(client, examples[client], tier.flops, tier.up_bps, tier.down_bps, tier.memory, tier.name)
            for client, tier in zip(clients, tiers, strict=True)
        )

    def _dealt(self, clients: int) -> list[Tier]:
        whole = sum(tier.share for tier in self.tiers)
        exact = [clients * tier.share / whole for tier in self.tiers]
        counts = [int(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in by_remainder[: clients - sum(counts)]:
            counts[i] += 1
        return [tier for tier, count in zip(self.tiers, counts, strict=True) for _ in range(count)]

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int) -> Seconds:
        """Download, training and upload of one task: bytes over links, FLOP over speed."""
        slower = rng(seed, "seconds", task.client, task.id).lognormvariate(0.0, self.jitter) if self.jitter else 1.0
        train = slower * shape.train_flops(result.tokens, task.budget.rank) / profile.flops
        down, up = payload.down(task.start).total, payload.up(task, result).total
        return Seconds(8.0 * down / profile.down_bps, train, 8.0 * up / profile.up_bps)
