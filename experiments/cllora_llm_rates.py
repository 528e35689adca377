"""The rate of the context experiment, and whether the model learns anything from these texts: on a seed and rows of their own.

    python experiments/cllora_llm_rates.py [--summary] [--workers N]

Clients who are alike, scored on rows that nobody trains on here and that the experiment does not score. What is chosen is the lowest
mean loss over the curve. `learns`: at that rate the loss at the end is at least `FALL` below that of the base; else the experiment
would say nothing of lengths, and is not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import log
from statistics import mean

from cllora_llm import PASSAGES_TUNING, PLAIN, cell
from grid import Grid, Line, main, start

from fedloom import Run

RATES, SEED, FALL = (2e-4, 5e-4, 1e-3), 100, 0.1


def tried(rate: float, seed: int) -> Run:
    """The experiment at a rate."""
    return replace(cell("iid", 0.0, PLAIN, seed, rate), data=PASSAGES_TUNING)


CELLS = {f"iid@{rate:g}": partial(tried, rate) for rate in RATES}


def summary(found: Sequence[Line]) -> Line:
    """The losses of base and end by rate, the best rate, and whether there is anything to see at it."""
    losses = {line["cell"]: [log(value) for value in line["perplexities"]] for line in found}
    if not losses:
        return {"best": None, "learns": None}
    best = min(losses, key=lambda name: mean(losses[name][1:]))
    told = {name: [round(value, 3) for value in own] for name, own in losses.items()}
    return {"losses": told, "best": best, "learns": losses[best][0] - losses[best][-1] >= FALL}


GRID = Grid("cllora_llm_rates", CELLS, (SEED,), 0.0, start, summary)

if __name__ == "__main__":
    main(GRID)
