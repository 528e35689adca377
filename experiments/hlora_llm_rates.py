"""The rates and targets of the HLoRA study: each method on the same small grid, on a seed and on texts that no cell scores.

    python experiments/hlora_llm_rates.py [--summary] [--workers N] [--only PATTERN ...]

Each cell is METHOD/DATA@RATE: six tenths of a run's rounds, each scored on rows of the training file that nobody trains on. First
the three rates of `FIRST` are run; `to_run` of the last line names those that are needed besides. The rules, fixed before the first
of these runs:

- the rate of a method is the one with the lowest mean test loss over the run, the figure that the study judges first;
- while the best is the lowest or highest that was tried, the next one beyond is tried too, as far as `EVERY` goes;
- the target of a data set is the loss at which padded FedIT, at its best rate, ends here (mean of its last three scores) and a tenth
  more, rounded up to two digits;
- random ranks run at HLoRA's rate: they are the same method with another plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import mean

from grid import Grid, Line, main
from hlora_llm import METHODS, STEADY, STUDIES, TUNED, curve, shown, start

from fedloom import Run

EVERY = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
FIRST = {"topics": EVERY[2:5], "told": EVERY[1:4], "mrpc": EVERY[:3], "qqp": EVERY[:3]}
SEED, PART = 100, 0.6


def tried(name: str, data: str, rate: float, seed: int) -> Run:
    """A method at a rate, scored on rows to tune on."""
    whole = STUDIES[data]
    study = replace(whole, data=whole.tuning, versions=int(PART * whole.versions), every=1)
    return study.run(METHODS[name], f"{name}/{data}@{rate:g}", rate, seed)


CELLS = {
    f"{name}/{data}@{rate:g}": partial(tried, name, data, rate) for data, name, rate in product(STUDIES, TUNED, EVERY)
}
USUAL = [f"{name}/{data}@{rate:g}" for data, name in product(STUDIES, TUNED) for rate in FIRST[data]]


def best(tries: Mapping[float, Line]) -> float:
    """The rate with the lowest mean loss; a run that diverged is worse than any."""
    means = {rate: curve(line) for rate, line in tries.items()}
    return min(means, key=lambda rate: math.inf if math.isnan(means[rate]) else means[rate])


def beyond(tries: Mapping[float, Line]) -> float | None:
    """The next rate to try where the best is the last one in a direction; None where it is not, or at an end of `EVERY`."""
    place = EVERY.index(best(tries))
    around = [EVERY[other] for other in (place - 1, place + 1) if 0 <= other < len(EVERY)]
    return next((rate for rate in around if rate not in tries), None)


def summary(found: Sequence[Line]) -> Line:
    """The best rates, the targets, and the cells that the rules still ask for."""
    rates, targets, to_run = dict[str, dict[str, float]](), dict[str, float](), list[str]()
    for data, name in product(STUDIES, TUNED):
        start_of = f"{name}/{data}@"
        tries = {float(line["cell"].split("@")[1]): line for line in found if line["cell"].startswith(start_of)}
        if not tries:
            continue
        rates.setdefault(data, {})[name] = best(tries)
        if (more := beyond(tries)) is not None:
            to_run.append(f"{start_of}{more:g}")
        if name == "fedit-padded":
            ends = mean(score["loss"] for score in tries[best(tries)]["scores"][-STEADY:])
            targets[data] = math.ceil(110 * ends) / 100
    return {"rates": rates, "targets": targets, "to_run": to_run}


GRID = Grid("hlora_llm_rates", CELLS, (SEED,), 0.0, start, summary, USUAL, table=shown)

if __name__ == "__main__":
    main(GRID)
