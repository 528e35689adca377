"""The rates of the FedFa experiment: each method on the same small grid, on a seed and on texts that the experiment does not score.

    python experiments/fedfa_rates.py [--summary] [--workers N]

Log-normal devices, 300 uploads, scored on a fifth of the *training* texts, which nobody trains on here. Three local rates, and where
a method has a setting of its server, two values of it. What is chosen is the highest mean score over the run, of rates by split, of
settings over both. The synchronous methods learn alike, whatever their clocks say: they share FedAvg's rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import mean

from fedfa_speed import AGNEWS, FEDAVG, OVER_SELECTING, PARTITIONS, Method, cell, end
from grid import Grid, Line, main, start

from fedloom import Engine, FedAsync, FedBuff, FedFa, Immediate, Limits, Polynomial, Run
from fedloom.core.policies import Schedule

RATES, SEED, PART = (5e-3, 1e-2, 2e-2), 100, 0.75
SCHEDULES: dict[str, Schedule] = {
    "fedbuff": FedBuff(10),
    "fedbuff-0.5": FedBuff(10, server_learning_rate=0.5),
    "fedasync": FedAsync(),
    "fedasync-0.9": FedAsync(0.9),
    "fedfa": FedFa(10),
    "fedfa-20": FedFa(20),
}
ASYNCHRONOUS = {name: Method(schedule) for name, schedule in SCHEDULES.items()}
VARIANTS: dict[str, Method] = {
    "fedavg": FEDAVG,
    "fedavg-over+avg": OVER_SELECTING.averaged(),
    **ASYNCHRONOUS,
    **{f"{name}+avg": method.averaged() for name, method in ASYNCHRONOUS.items()},
    **{f"ours-{step}": Method(Immediate(step, discount=Polynomial(0.5))).averaged() for step in (0.2, 0.4)},
}


def tried(name: str, split: str, rate: float, seed: int) -> Run:
    """A variant at a rate, shorter than in the experiment."""
    run = cell(replace(VARIANTS[name], rates=(rate, rate)), split, "lognormal", f"{name}/{split}@{rate:g}", seed)
    limits = Limits(versions=int(run.limits.versions * PART), evaluate_every=run.limits.evaluate_every)
    return replace(
        run, data=replace(AGNEWS, test=None, test_text=None), limits=limits, test_limit=None, engine=Engine()
    )


CELLS = {
    f"{name}/{split}@{rate:g}": partial(tried, name, split, rate)
    for split, rate, name in product(PARTITIONS, RATES, VARIANTS)
}


def area(line: Line) -> float:
    """The mean score over the run, of what was trained."""
    return mean(float(accuracy) for _, _, accuracy in line["curve"][1:])


def method_of(variant: str) -> str:
    """The name of the experiment's method: variants that differ in their server's setting alone are of one method."""
    return re.sub(r"-[\d.]+", "", variant)


def summary(found: Sequence[Line]) -> Line:
    """Print the mean score and the end of each try; return the best setting and rates of each method, and the targets."""
    tries = {line["cell"]: line for line in found}
    best, scores = dict[str, tuple[str, ...]](), dict[str, float]()
    for name in VARIANTS:
        cells_of = [[f"{name}/{split}@{rate:g}" for rate in RATES] for split in PARTITIONS]
        if not all(cell_ in tries for cells_ in cells_of for cell_ in cells_):
            continue
        for cell_ in (cell_ for cells_ in cells_of for cell_ in cells_):
            print(f"{cell_:28s} {area(tries[cell_]):.4f}, ends {end(tries[cell_]):.1f} %")
        picked = tuple(max(cells_, key=lambda cell_: area(tries[cell_])) for cells_ in cells_of)
        score = sum(area(tries[cell_]) for cell_ in picked)
        if score > scores.get(method_of(name), 0.0):
            best[method_of(name)], scores[method_of(name)] = picked, score
    targets = {cell_.split("/")[1].split("@")[0]: round(end(tries[cell_]) - 2, 1) for cell_ in best.get("fedavg", ())}
    return {"best": best, "targets": targets}


GRID = Grid("fedfa_rates", CELLS, (SEED,), 0.0, start, summary)

if __name__ == "__main__":
    main(GRID)
