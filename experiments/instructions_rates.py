"""The rates of the instructions experiment: FedIT and centralised training on a small grid, on a seed of their own.

    python experiments/instructions_rates.py [--summary] [--workers N]

Natural Instructions. What is chosen is the lowest perplexity at the end. The other federated methods have FedIT's rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from grid import Grid, Line, main
from instructions import METHODS, STUDIES, cell, shortened

from fedloom import Run

RATES, SEED = {"centralised": (2e-3, 5e-3, 1e-2), "fedit": (5e-3, 1e-2, 2e-2)}, 100


def tried(name: str, rate: float, seed: int) -> Run:
    """A method at a rate."""
    return cell(replace(METHODS[name], rate=rate), STUDIES["natural"], f"{name}/natural@{rate:g}", seed)


CELLS = {f"{name}/natural@{rate:g}": partial(tried, name, rate) for name, rates in RATES.items() for rate in rates}


def summary(found: Sequence[Line]) -> Line:
    """The perplexity at the end by method and rate."""
    return {line["cell"]: round(line["perplexities"][-1], 2) for line in found}


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell."""
    by = {line["cell"]: line["perplexities"] for line in found}
    rows = [
        [name.replace("/natural@", " | "), *(f"{by[name][at]:,.1f}" for at in (0, -1))] for name in names if name in by
    ]
    return "\n".join(
        ["| method | rate | base | end |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    )


GRID = Grid("instructions_rates", CELLS, (SEED,), 0.0, shortened, summary, table=shown)

if __name__ == "__main__":
    main(GRID)
