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
    """Log-normal delays: `median` seconds times exp(`sigma` z), z drawn once a client, times exp(`jitter` z), z drawn for each task.

    The share of the clients that is slower than x medians is Phi(-ln(x) / sigma): with sigma 1 a tenth takes more than 3.6 medians.

    Fields:
        median: the time of a task at the median client (virtual seconds; 1).
        sigma: spread over clients (1; 0: all are alike).
        jitter: spread over the tasks of a client (0: they all take the same time).
    """

    median: float = 1.0
    sigma: float = 1.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_positive("world", "a delay", median=self.median)
        for name in ("sigma", "jitter"):
            _spread(name, getattr(self, name))

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return profiles that differ in their speed alone."""
        return tuple(
            Profile(client, examples[client], flops=USUAL / self._slowness(client, seed)) for client in sorted(examples)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return the client's time, with this task's jitter."""
        drawn = rng(seed, "delay", task.client, task.id).lognormvariate(0.0, self.jitter) if self.jitter else 1.0
        return Seconds(0.0, self.median * self._slowness(task.client, seed) * drawn, 0.0)

    def _slowness(self, client: ClientId, seed: int) -> float:
        return rng(seed, "speed", client).lognormvariate(0.0, self.sigma) if self.sigma else 1.0


@dataclass(frozen=True, slots=True)
class ExponentialDelays:
    """Exponential delays: t = `scale` * Exp(rate of the client) seconds, with rate ~ LogNormal(0, `sigma`^2).

    The mean time of a client is `scale` / rate.

    Fields:
        scale: mean time at rate 1 (virtual seconds; 1).
        sigma: spread of the rates over clients (1; 0: all are alike, and only chance makes them late).
    """

    scale: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        check_positive("world", "a delay", scale=self.scale)
        _spread("sigma", self.sigma)

    def profiles(self, examples: Mapping[ClientId, int], seed: int) -> tuple[Profile, ...]:
        """Return profiles that differ in their rate alone."""
        return tuple(
            Profile(client, examples[client], flops=USUAL * self._rate(client, seed)) for client in sorted(examples)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return an exponential draw at the client's rate."""
        drawn = rng(seed, "delay", task.client, task.id).expovariate(self._rate(task.client, seed))
        return Seconds(0.0, self.scale * drawn, 0.0)

    def _rate(self, client: ClientId, seed: int) -> float:
        return rng(seed, "speed", client).lognormvariate(0.0, self.sigma) if self.sigma else 1.0


@dataclass(frozen=True, slots=True)
class DelayClass:
    """Clients whose tasks take a uniform time between two bounds.

    Fields:
        name: the class, which becomes the `tier` of its clients.
        share: of the clients, relative to the other classes.
        low, high: the bounds (virtual seconds).
    """

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
    """Classes of clients whose shares are drawn once a run from a Dirichlet distribution around the given ones.

    Source: FADAS, Wang et al. 2024, official simulation: Dirichlet(3, 2, 1), U(1, 2), U(3, 5), and U(5, 8) for mild or U(50, 80) for
    large delays (`LARGE_DELAYS`).

    Fields:
        classes: the classes (FADAS with mild delays).
        concentration: the distribution's parameters are this times the shares: larger is nearer to them (1; None: just the shares).
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
        """Return profiles of classes by their drawn shares (largest remainder first), dealt in seeded random order."""
        clients = sorted(examples)
        classes = apportion(self._drawn(seed), len(clients))
        rng(seed, "classes").shuffle(classes)
        return tuple(
            Profile(client, examples[client], flops=2 * USUAL / (own.low + own.high), tier=own.name)
            for client, own in zip(clients, classes, strict=True)
        )

    def seconds(self, task: Task, result: Result, profile: Profile, shape: Shape, seed: int, turn: int = 0) -> Seconds:
        """Return a uniform draw between the bounds of the client's class."""
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
