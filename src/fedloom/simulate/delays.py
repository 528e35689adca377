"""Delay models of the asynchronous literature: the time of a task by a law alone, whatever its bytes and FLOP.

They say who is fast and who is slow, and nothing else, so that results can be compared with papers that simulate in this way.
Times are drawn by (seed, client, task id); the profile's `flops` is the client's speed, relative to 1e10 for a usual one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedloom.core.errors import Refused
from fedloom.core.model_shape import Shape
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId, Profile, Result, Task
from fedloom.simulate.devices import Seconds, apportion, check_positive

USUAL = 1e10
"""FLOP/s that a client of relative speed 1 is said to have."""


@dataclass(frozen=True, slots=True)
class Delays:
    """Log-normal: `median` seconds, times exp(`sigma` z) with z the client's for ever, times exp(`jitter` z) with z the task's.

    With both 0 every task takes `median` seconds. The share of the clients that is slower than x medians is Phi(-ln(x) / sigma):
    with sigma 1 a tenth takes more than 3.6 times the median.
    """

    median: float = 1.0
    sigma: float = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_positive("world", "a delay", median=self.median)
        for name in ("sigma", "jitter"):
            _spread(name, getattr(self, name))

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Alike but for their speed."""
        return tuple(
            Profile(client, examples[client], flops=USUAL / self._slowness(client, seed)) for client in sorted(examples)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """The client's time, with this task's jitter."""
        drawn = rng(seed, "delay", task.client, task.id).lognormvariate(0.0, self.jitter) if self.jitter else 1.0
        return Seconds(0.0, self.median * self._slowness(task.client, seed) * drawn, 0.0)

    def _slowness(self, client: ClientId, seed: int) -> float:
        return rng(seed, "speed", client).lognormvariate(0.0, self.sigma) if self.sigma else 1.0


@dataclass(frozen=True, slots=True)
class ExponentialDelays:
    """t = `scale` * Exp(rate of the client) seconds, the rates log-normal: rate ~ LogNormal(0, `sigma`^2).

    The mean time of a client is `scale` / rate. With sigma 0 all clients are alike and only chance makes them late.
    """

    scale: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_positive("world", "a delay", scale=self.scale)
        _spread("sigma", self.sigma)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Alike but for their rate."""
        return tuple(
            Profile(client, examples[client], flops=USUAL * self._rate(client, seed)) for client in sorted(examples)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """An exponential draw at the client's rate."""
        drawn = rng(seed, "delay", task.client, task.id).expovariate(self._rate(task.client, seed))
        return Seconds(0.0, self.scale * drawn, 0.0)

    def _rate(self, client: ClientId, seed: int) -> float:
        return rng(seed, "speed", client).lognormvariate(0.0, self.sigma) if self.sigma else 1.0


@dataclass(frozen=True, slots=True)
class DelayClass:
    """Clients whose tasks take a uniform time between `low` and `high` seconds; `share` is relative to the other classes'."""

    name: str
    share: float
    low: float
    high: float

    def __post_init__(self) -> None:
        check_positive("world.classes", f"class {self.name}", share=self.share, high=self.high)
        if not 0 <= self.low <= self.high:
            raise Refused("world.classes.low", self.low, f"between 0 and high, which is {self.high:g}")


FAST, SLOWER = DelayClass("fast", 3.0, 1.0, 2.0), DelayClass("slower", 2.0, 3.0, 5.0)


@dataclass(frozen=True, slots=True)
class DelayClasses:
    """Classes of clients. Their shares are drawn once a run from a Dirichlet distribution around the given ones.

    Its parameters are `concentration` times the shares: larger is nearer to them, None is just them. Source: FADAS, Wang et al.
    2024, official simulation: Dirichlet(3, 2, 1), U(1, 2), U(3, 5), and U(5, 8) for mild or U(50, 80) for large delays
    (`LARGE_DELAYS`).
    """

    classes: tuple[DelayClass, ...] = (FAST, SLOWER, DelayClass("slow", 1.0, 5.0, 8.0))
    concentration: float | None = 1.0

    def __post_init__(self) -> None:
        names = [one.name for one in self.classes]
        if not names or len(set(names)) < len(names):
            raise Refused("world.classes", names, "name at least one class, each with a name of its own")
        if self.concentration is not None:
            check_positive("world", "the Dirichlet distribution", concentration=self.concentration)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Classes by their drawn shares (largest remainder first), dealt in seeded random order; named by `tier`."""
        clients = sorted(examples)
        classes = apportion(self._drawn(seed), len(clients))
        rng(seed, "classes").shuffle(classes)
        return tuple(
            Profile(client, examples[client], flops=2 * USUAL / (own.low + own.high), tier=own.name)
            for client, own in zip(clients, classes, strict=True)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Uniform between the bounds of the client's class."""
        (own,) = (one for one in self.classes if one.name == profile.tier)
        return Seconds(0.0, rng(seed, "delay", task.client, task.id).uniform(own.low, own.high), 0.0)

    def _drawn(self, seed: int) -> list[DelayClass]:
        if self.concentration is None:
            return list(self.classes)
        draw = rng(seed, "shares")
        shares = [draw.gammavariate(self.concentration * one.share, 1.0) for one in self.classes]
        return [replace(one, share=max(share, 1e-300)) for one, share in zip(self.classes, shares, strict=True)]


LARGE_DELAYS = DelayClasses((FAST, SLOWER, DelayClass("slow", 1.0, 50.0, 80.0)))
"""FADAS with large delays."""


def _spread(name: str, value: float) -> None:
    if not 0 <= value <= 10:
        raise Refused(
            f"world.{name}", value, "the standard deviation of a logarithm: 0 is none, 1 is wide, 10 the most"
        )
