"""When a run ends, how often its model is scored, and how far an answer may move it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedloom.core.errors import Refused


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a run: when it ends, and how often its model is evaluated.

    Fields:
        versions: global versions after which the run ends (at least 1; default 10).
        seconds: time at which it ends, if that is earlier (s; default None: no limit).
        failures: consecutive failed or lost tasks after which the run ends (default 100), or answers that a canary set aside without
            a version in between. Where every answer is refused, for instance because training diverged, more time does not help.
        evaluate_every: evaluate version 0, every n-th version and the last (default 1; 0: only the last).
        norm_ratio: times the median of what others of the run sent that an answer may move (default 5; None: not compared).
        step_ratio: times what an optimiser can do in the task's steps that an answer may move it (default 3). None: not judged, for
            sites that add noise to their answers.
    """

    versions: int = 10
    seconds: float | None = None
    failures: int = 100
    evaluate_every: int = 1
    norm_ratio: float | None = 5.0
    step_ratio: float | None = 3.0

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise Refused("limits.versions", self.versions, "a run makes at least 1 global version")
        if self.seconds is not None and not self.seconds > 0:
            raise Refused("limits.seconds", self.seconds, "give positive seconds, or None for no limit")
        if self.failures < 1:
            raise Refused("limits.failures", self.failures, "how many tasks may fail in a row: at least 1")
        if self.evaluate_every < 0:
            raise Refused("limits.evaluate_every", self.evaluate_every, "score every 1, 2, ... versions; 0: the last")
        for name in ("norm_ratio", "step_ratio"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < math.inf:
                raise Refused(f"limits.{name}", value, "1 or more times what is usual, 5 is a start; None: no limit")

    def scores(self, version: int) -> bool:
        """Return whether this version is evaluated."""
        return version % (self.evaluate_every or self.versions) == 0 or version == self.versions
