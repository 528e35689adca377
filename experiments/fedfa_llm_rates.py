"""The rates and targets of FedFa on a language model: on a seed and on texts that the experiment does not score.

    python experiments/fedfa_llm_rates.py [--summary] [--workers N] [--only PATTERN ...]

Three local rates for each method and split, half of a run, scored on training texts that nobody trains on. What is chosen is the
lowest mean loss over the scored versions. The target is what FedAvg ends at here, at its best rate, and a tenth more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import ceil

from fedfa_llm import USED, cell
from fedfa_speed import PARTITIONS
from grid import Grid, Line, main, start
from loss_targets import curve, final
from text_pools import TOPICS_TOLD_TUNING

from fedloom import Run

TRIED, SEED, PART = (4e-3, 8e-3, 1.6e-2), 100, 2


def tried(name: str, split: str, rate: float, seed: int) -> Run:
    """A method at a rate, on other texts and not as long."""
    run = cell(name, split, seed, rate)
    return replace(
        run, data=TOPICS_TOLD_TUNING, limits=replace(run.limits, versions=run.limits.versions // PART), name="rates"
    )


CELLS = {
    f"{name}/{split}@{rate:g}": partial(tried, name, split, rate)
    for split, name, rate in product(PARTITIONS, USED, TRIED)
}


def summary(found: Sequence[Line]) -> Line:
    """Print each try; return the best rates and the targets."""
    tries = {line["cell"]: line for line in found}
    rates: dict[str, dict[str, float]] = {split: {} for split in PARTITIONS}
    targets = dict[str, float]()
    for split, name in product(PARTITIONS, USED):
        own = {rate: tries[at] for rate in TRIED if (at := f"{name}/{split}@{rate:g}") in tries}
        if not own:
            continue
        print(
            f"{name + '/' + split:24s} {'; '.join(f'{r:g}: {curve(x):.3f}, ends {final(x):.3f}' for r, x in own.items())}"
        )
        rates[split][name] = best = min(own, key=lambda rate: curve(own[rate]))
        if name == "fedavg":
            targets[split] = ceil(110 * final(own[best])) / 100
    return {"rates": rates, "targets": targets}


GRID = Grid("fedfa_llm_rates", CELLS, (SEED,), 0.0, start, summary)

if __name__ == "__main__":
    main(GRID)
