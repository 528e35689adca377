"""The rates and the target of all four at once: on a seed and on texts that the experiment does not score.

    python experiments/all_four_rates.py [--summary] [--workers N] [--only PATTERN ...]

Two rates for each method, by its depth, `PART` of a run, scored on training texts that nobody trains on. What is chosen is the lowest
mean loss over the scored versions. The target is what FedIT ends at here, at its best rate, and `SLACK` more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from all_four import METHODS, TOP, cell
from grid import Grid, Line, main, start
from hierfedlora_llm import UPLOADS, work_done
from hierfedlora_llm_rates import PART, RATES, SEED, SLACK
from loss_targets import curve, final
from text_pools import TOPICS_DAMAGED_TUNING

from fedloom import Run


def tried(name: str, rate: float, seed: int) -> Run:
    """A method at a rate, on other texts and not as long."""
    run = cell(name, seed, rate)
    versions = max(1, run.limits.versions * PART // UPLOADS)
    return replace(run, data=TOPICS_DAMAGED_TUNING, limits=replace(run.limits, versions=versions))


CELLS = {
    f"{name}@{rate:g}": partial(tried, name, rate)
    for name, what in METHODS.items()
    for rate in RATES[1 if what.method.depth == TOP else 4]
}


def summary(found: Sequence[Line]) -> Line:
    """Print each try; return the best rate of each method, and the target."""
    tries: dict[str, list[Line]] = {}
    for line in found:
        tries.setdefault(line["cell"].split("@")[0], []).append(line)
    for name, own in tries.items():
        told = (f"{one['cell'].split('@')[1]}: {curve(one):.3f}, ends {final(one):.3f}" for one in own)
        print(f"{name:16s} {'; '.join(told)}")
    best = {name: min(own, key=curve) for name, own in tries.items()}
    rates = {name: line["cell"].split("@")[1] for name, line in best.items()}
    return {"rates": rates} | ({"target": round(final(best["fedit"]) + SLACK, 2)} if "fedit" in best else {})


GRID = Grid("all_four_rates", CELLS, (SEED,), 0.0, start, summary, probe=work_done)

if __name__ == "__main__":
    main(GRID)
