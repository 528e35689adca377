"""Claims and their verdicts: one paired figure a seed decides, by Student's t test, corrected by Holm within a family of claims.

A claim "holds" where the corrected interval of the mean lies wholly on its side of the margin. It "does not hold" where that lies
wholly on the other side, and is "not decided" otherwise. The plain 95 % interval, which is narrower, is printed beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtr, stdtrit

LEVEL = 0.05
"""Of a family of claims: how probable it is at most that one of them is decided by chance."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim with the figures that decide it.

    Fields:
        name: short name, unique among all experiments.
        paper: whose claim it is.
        says: the claim, one sentence.
        done: what was done to judge it, in a few words.
        values: one paired figure a seed: a difference, or with `times` the natural logarithm of a ratio.
        family: claims of an experiment that are corrected together.
        margin: the claim says that the mean lies above this; with `times` it is a logarithm too.
        below: it says that the mean lies below instead.
        times: figures are told as ratios.
        unit: of a difference.
    """

    name: str
    paper: str
    says: str
    done: str
    values: tuple[float, ...]
    family: str
    margin: float = 0.0
    below: bool = False
    times: bool = False
    unit: str = "points"

    @property
    def seeds(self) -> int:
        """How many seeds it stands on."""
        return len(self.values)

    def probability(self) -> float:
        """The two-sided probability of figures as far from the margin as these, if the mean were the margin; 1 for one seed."""
        if self.seeds < 2:
            return 1.0
        gap, error = mean(self.values) - self.margin, stdev(self.values) / math.sqrt(self.seeds)
        return 2 * float(stdtr(self.seeds - 1, -abs(gap) / error)) if error else float(gap == 0)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """The interval of the mean at confidence 1 - `level`, by Student's t; None for fewer than two seeds."""
        if self.seeds < 2:
            return None
        width = -float(stdtrit(self.seeds - 1, level / 2)) * stdev(self.values) / math.sqrt(self.seeds)
        return mean(self.values) - width, mean(self.values) + width

    def verdict(self, level: float) -> str:
        """What the interval at this level says of the claim."""
        low, high = self.interval(level) or (-math.inf, math.inf)
        if not low <= self.margin <= high:
            return HOLDS if (high < self.margin) == self.below else FAILS
        return OPEN

    def shown(self, value: float) -> float:
        """A value as it is printed: a ratio with `times`, to four digits."""
        return float(f"{math.exp(value) if self.times else value:.4g}")


def levels(claims: Iterable[Claim]) -> dict[str, float]:
    """Return by name the level at which each claim is tested, corrected by Holm (1979) within its family.

    The smallest probability of m is tested at `LEVEL` / m, the next at `LEVEL` / (m - 1) and so on. All that come after the first
    that fails have its level. They fail there too, so a claim is decided just where its interval at its level leaves the margin out.
    """
    families, found = dict[str, list[Claim]](), dict[str, float]()
    for claim in claims:
        families.setdefault(claim.family, []).append(claim)
    for members in families.values():
        left, failed = len(members), False
        for claim in sorted(members, key=Claim.probability):
            found[claim.name] = level = LEVEL / left
            failed = failed or claim.probability() > level
            left -= not failed
    return found


def judged(claims: Sequence[Claim]) -> list[Line]:
    """Return the last line's entry of each claim: its mean, its 95 % interval, the corrected one, and the verdict."""
    tested = levels(claims)
    return [_entry(claim, tested[claim.name]) for claim in claims]


def _entry(claim: Claim, level: float) -> Line:
    low, high = claim.interval() or (None, None)
    ends: Line = {"low": low, "high": high, "estimate": mean(claim.values) if claim.values else None}
    shown = {name: None if end is None else claim.shown(end) for name, end in ends.items()}
    corrected = claim.interval(level)
    return {
        "name": claim.name,
        "estimate": shown["estimate"],
        "low": shown["low"],
        "high": shown["high"],
        "corrected": corrected and [claim.shown(end) for end in corrected],
        "seeds": claim.seeds,
        "verdict": claim.verdict(level),
    }


def paired(found: Sequence[Line], figure: Callable[[Line], float], one: str, other: str) -> tuple[float, ...]:
    """Return by how much a figure of one cell is above that of another, for each seed that both have."""
    by = {(line["cell"], line["seed"]): line for line in found}
    pairs = [(by.get((one, seed)), by.get((other, seed))) for seed in sorted({line["seed"] for line in found})]
    return tuple(figure(mine) - figure(theirs) for mine, theirs in pairs if mine and theirs)
