"""Where the seconds of one process go, phase by phase."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Clock:
    """CPU seconds of this process and wall seconds, each since the last mark. `begun` is the wall time of the first line."""

    begun: float
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    cpu: float = 0.0

    def mark(self, phase: str) -> None:
        """A phase ends here. The first one includes the start of the interpreter in its CPU seconds."""
        cpu, wall = time.process_time(), time.perf_counter()
        self.phases[phase] = {"cpu": round(cpu - self.cpu, 3), "wall": round(wall - self.begun, 3)}
        self.cpu, self.begun = cpu, wall
