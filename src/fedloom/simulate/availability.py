"""When simulated clients can be reached: windows drawn at random, or read from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.core.errors import Refused
from fedloom.core.seeds import rng
from fedloom.core.types import ClientId


class Stays(Protocol):
    """Periods of each client in turn: available, away, available, ..."""

    def stay(self, client: ClientId, period: int) -> float:
        """Return the seconds of this period, which may be 0 or inf; even ones are available, odd ones away."""
        ...


class Windows(Protocol):
    """Rule that says when which client is available (`Run.availability`)."""

    def of(self, clients: Sequence[ClientId], seed: int) -> Stays:
        """Return the periods of these clients. Raises Refused."""
        ...


@dataclass(frozen=True, slots=True)
class Availability:
    """Each client is online and offline by turns, independently of the others.

    The process is stationary: at the start a client is online with probability online / (online + offline).

    Fields:
        online: mean time that a client is available (virtual seconds; 3,600; exponential).
        offline: mean time that it is away (virtual seconds; 3,600; exponential).
        regular: all times are just so long, each client at its own phase, such as a phone that charges for eight hours a day (False).
    """

    online: float = 3600.0
    offline: float = 3600.0
    regular: bool = False

    def __post_init__(self) -> None:
        for name in ("online", "offline"):
            if not 0 < getattr(self, name) < math.inf:
                raise Refused(f"availability.{name}", getattr(self, name), "positive seconds; None for always there")

    def of(self, clients: Sequence[ClientId], seed: int) -> Stays:
        """Return the periods, by one rule for all clients."""
        return _Drawn(self, seed)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Period 0 is what is left of the window that is open at the start, or 0; period 1, then, what is left of the absence."""

    rule: Availability
    seed: int

    def stay(self, client: ClientId, period: int) -> float:
        length = self.rule.offline if period % 2 else self.rule.online
        if self.rule.regular:
            left = self._left(client)
            return left[period] if period < 2 else length
        if period == 0 and self._phase(client) >= self.rule.online:
            return 0.0
        return rng(self.seed, "stay", client, period).expovariate(1 / length)

    def _phase(self, client: ClientId) -> float:
        """A moment in the cycle, which begins with the window."""
        return rng(self.seed, "phase", client).uniform(0.0, self.rule.online + self.rule.offline)

    def _left(self, client: ClientId) -> tuple[float, float]:
        phase, online = self._phase(client), self.rule.online
        return (online - phase, self.rule.offline) if phase < online else (0.0, online + self.rule.offline - phase)


@dataclass(frozen=True, slots=True)
class Traced:
    """Periods that repeat: `cycles` has an even number of them for each client, of which at least one is positive."""

    cycles: Mapping[ClientId, tuple[float, ...]]

    def stay(self, client: ClientId, period: int) -> float:
        """Return the period of the cycle."""
        cycle = self.cycles[client]
        return cycle[period % len(cycle)]


def cycle(windows: Sequence[tuple[float, float]], length: float) -> tuple[float, ...]:
    """Convert windows (from, to), in order and within `length` seconds, to periods. Never, or always, is a period without an end.

    >>> cycle([(2.0, 5.0), (6.0, 10.0)], 10.0)
    (0.0, 2.0, 3.0, 1.0, 4.0, 0.0)
    """
    open_ = sum(end - start for start, end in windows)
    if not 0 < open_ < length:
        return (math.inf, 0.0) if open_ else (0.0, math.inf)
    periods, now = list[float](), 0.0
    for start, end in windows:
        if start > now and not periods:
            periods.append(0.0)
        if periods:
            periods.append(start - now)
        periods.append(end - start)
        now = end
    return (*periods, length - now)
