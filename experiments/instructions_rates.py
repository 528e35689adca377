"""The rates of the instructions experiment: FedIT and centralised training on the same small grid, on a seed of their own.

    python experiments/instructions_rates.py [--summary] [--workers N]

Natural Instructions. What is chosen is the lowest perplexity at the end. The other federated methods have FedIT's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from grid import Grid, Line, main
from instructions import METHODS, STUDIES, cell, shortened, shown

from fedloom import Run

RATES, TUNED, SEED = (5e-3, 1e-2), ("centralised", "fedit"), 100


def tried(name: str, rate: float, seed: int) -> Run:
    """A method at a rate."""
    return cell(replace(METHODS[name], rate=rate), STUDIES["natural"], f"{name}/natural@{rate:g}", seed)


CELLS = {f"{name}/natural@{rate:g}": partial(tried, name, rate) for name in TUNED for rate in RATES}


def summary(found: Sequence[Line]) -> Line:
    """The perplexity at the end by method and rate."""
    return {line["cell"]: round(line["perplexities"][-1], 2) for line in found}


GRID = Grid("instructions_rates", CELLS, (SEED,), 0.0, shortened, summary, table=shown)

if __name__ == "__main__":
    main(GRID)
