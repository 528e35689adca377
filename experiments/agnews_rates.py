"""The learning rates of the AG News experiment: each method on the same small grid, on a seed that the experiment does not use.

python experiments/agnews_rates.py [--summary] [--workers N]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from agnews import METHODS, start
from grid import Grid, Line, main

from fedloom import Limits, Run

RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
SEED = 100


def cell(name: str, rate: float, seed: int) -> Run:
    """A method at a rate, for three quarters of the experiment's versions."""
    return replace(METHODS[name](seed, rate), limits=Limits(versions=6, evaluate_every=2), test_limit=1000)


FIRST = (
    "centralised",
    "fedit-r8",
    "fedit-padded",
    "hlora-published",
    "hlora",
    "hlora-balanced",
    "product-delta",
    "raflora",
)
"""None of them but the centralised line was best at one of the two lowest rates: the methods that came later are spared those."""
AS = {"fedprox": "fedit-padded", "scaffold": "fedit-padded", "folded-delta-16": "folded-delta"}
"""Variants that run at the rate of what they vary."""
EDGES = {"lora-a2": (2.5e-3,), "folded-delta": (2.5e-3,), "ffa": (4e-2,), "fedit-r2": (4e-2,), "hetlora": (4e-2,)}
"""One step further for methods whose best rate was at the end of their range."""


def rates_of(name: str) -> tuple[float, ...]:
    """The rates that a method was tried at."""
    return tuple(sorted((*RATES[0 if name in FIRST else 2 :], *EDGES.get(name, ()))))


CELLS = {f"{name}@{rate:g}": partial(cell, name, rate) for name in METHODS if name not in AS for rate in rates_of(name)}


def summary(found: Sequence[Line]) -> Line:
    """The best rate of each method; of FedSA, which has no global model, by its clients."""
    accuracy = {c["cell"]: c["mean_client" if c["cell"].startswith("fedsa@") else "accuracy"] for c in found}
    tuned = [name for name in METHODS if name not in AS]
    rates = {n: {f"{r:g}": accuracy[f"{n}@{r:g}"] for r in rates_of(n) if f"{n}@{r:g}" in accuracy} for n in tuned}
    for name, own in rates.items():
        print(f"{name:16s}", "  ".join(f"{rate}: {100 * value:.1f} %" for rate, value in own.items()))
    return {name: max(own, key=lambda rate: own[rate]) for name, own in rates.items()}


GRID = Grid("agnews_rates", CELLS, (SEED,), 0.7, start, summary)

if __name__ == "__main__":
    main(GRID)
