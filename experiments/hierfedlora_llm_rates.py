"""Depths, rates and targets of the experiment with eighty devices: on a seed and on texts that it does not score.

    python experiments/hierfedlora_llm_rates.py [--summary] [--workers N] [--only PATTERN ...]

The split that is less skewed, one distant server, `PART` of a run, scored on training texts that nobody trains on. In this order:
of each method and depth the rate of the lowest mean loss over the scored versions; the target is what `fedit-over` ends at, at its
best, and `SLACK` more; of each method with one depth for all that which gets there first (or else ends lowest). What is
chosen holds for the other split too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf

from grid import Grid, Line, main, start
from hierfedlora_llm import COHORT, METHODS, UPLOADS, Method, cell, work_done
from loss_targets import between, curve, final, reached, times
from text_pools import TOPICS_TOLD_TUNING

from fedloom import FixedDepth, Run

SEED, PART, SLACK = 100, 6 * COHORT, 0.05
"""Tasks of a run here."""
RATES = {1: (4e-3, 8e-3), 4: (2e-3, 4e-3)}
"""By depth; those of 4 where depths are mixed."""
FLAT = ("fedit-over", "fedbuff", "ungrouped")
VARIANTS: dict[str, tuple[Method, int]] = {
    **{
        f"{name}/depth-{depth}": (replace(METHODS[name], depth=FixedDepth(depth)), depth)
        for name in FLAT
        for depth in RATES
    },
    **{name: (METHODS[name], 4) for name in ("legend", "hierfedlora", "ours")},
    **{f"ours-depth-{depth}": (METHODS[f"ours-depth-{depth}"], depth) for depth in RATES},
}


def tried(method: Method, rate: float, name: str, seed: int) -> Run:
    """A variant at a rate, on other texts and not as long."""
    run = cell(replace(method, rate=rate), "dir0.5", "far", name, seed)
    versions = max(1, run.limits.versions * PART // UPLOADS)
    return replace(run, data=TOPICS_TOLD_TUNING, limits=replace(run.limits, versions=versions))


CELLS = {
    f"{name}@{rate:g}": partial(tried, method, rate, f"{name}@{rate:g}")
    for name, (method, depth) in VARIANTS.items()
    for rate in RATES[depth]
}


def summary(found: Sequence[Line]) -> Line:
    """The best rate of each variant, the target, and the best depth of each method with one depth for all."""
    tries: dict[str, list[Line]] = {}
    for line in found:
        tries.setdefault(line["cell"].split("@")[0], []).append(line)
    best = {name: min(own, key=curve) for name, own in tries.items()}
    for name, own in tries.items():
        told = (f"{one['cell'].split('@')[1]}: {curve(one):.3f}, ends {final(one):.3f}" for one in own)
        print(f"{name:22s} {'; '.join(told)}")
    ends = [final(best[f"fedit-over/depth-{depth}"]) for depth in RATES if f"fedit-over/depth-{depth}" in best]
    if not ends:
        return {}
    target = round(min(ends) + SLACK, 2)

    def soonest(name: str) -> tuple[float, float]:
        at = reached(best[name], target)
        return inf if at is None else between(times(best[name]), at), final(best[name])

    known = {flat: [name for name in best if name.startswith(f"{flat}/")] for flat in FLAT}
    depths = {flat: min(names, key=soonest).split("-")[-1] for flat, names in known.items() if names}
    return {
        "rates": {name: line["cell"].split("@")[1] for name, line in best.items()},
        "target": target,
        "depths": depths,
    }


GRID = Grid("hierfedlora_llm_rates", CELLS, (SEED,), 0.0, start, summary, probe=work_done)

if __name__ == "__main__":
    main(GRID)
