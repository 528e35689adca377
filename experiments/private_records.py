"""AG News on MiniLM at ten sites: what does it cost that each record is protected from everybody?

    python experiments/private_records.py [--quick [--cell NAME]] [--summary] [--workers N]

Ten sites of 480 texts each, labels Dirichlet 1.0, all in each of six versions; rank 4 in the top two layers and the head, one side
frozen (FFA): half the numbers to add noise to. `plain` trains as usual; `epsilon-8` and `epsilon-3` by DP-SGD, so that all answers
of a site together tell of a record at most that, at delta 1e-5. The noise follows from the accounting; `prepare` checks it. Clip and
learning rate are chosen on another seed and on a part of the training data (`private_records_rates.py`), without the test data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean

from grid import SHARED, Grid, Line, interval, main, paired

from fedloom import (
    FFA,
    ClientDirichlet,
    Engine,
    FixedDepth,
    FixedRank,
    Limits,
    Plan,
    Private,
    Rounds,
    Run,
    Table,
    Training,
    uniform,
)
from fedloom.train.demo_model import minilm

SITES, ROWS = 10, 480
BATCH, STEPS, VERSIONS = 120, 5, 6
"""Expected rows of a step (a quarter of a site's), steps of a task, tasks of a site."""
DELTA = 1e-5
MULTIPLIERS = {8.0: 1.13, 3.0: 2.202}
"""By epsilon: `multiplier_for(epsilon, DELTA, lambda z: [SampledGaussian(BATCH / ROWS, z, STEPS * VERSIONS)])`."""
CLIP = 0.5
RATES = {None: 1e-1, 8.0: 1e-1, 3.0: 1e-1}
"""Learning rate by epsilon (None: plain training)."""
TARGET = 0.8
"""Fixed before the runs: a linear model over the same sentence embeddings is not far above it."""
FOLDER = SHARED / "data" / "agnews"
DATA = Table(FOLDER / "train_part.tsv.gz", FOLDER / "test.tsv.gz", text="text", test_text=("title", "description"))


def private(epsilon: float, clip: float = CLIP) -> Private:
    """DP-SGD at this epsilon, over all tasks of a site."""
    return Private(clip, MULTIPLIERS[epsilon], VERSIONS, "record", (epsilon, DELTA))


def cell(name: str, epsilon: float | None, seed: int) -> Run:
    """One cell."""
    return Run(
        name=name,
        model=str(minilm()),
        data=DATA,
        partition=ClientDirichlet(SITES, 1.0, ROWS),
        aggregator=FFA(),
        schedule=Rounds(cohort_size=SITES, weigh=uniform),
        plan=Plan(FixedRank(4), STEPS, FixedDepth(2)),
        training=Training(learning_rate=RATES[epsilon], batch_size=BATCH, max_length=64),
        limits=Limits(versions=VERSIONS, evaluate_every=3),
        privacy=None if epsilon is None else private(epsilon),
        held_out=0.0,
        test_limit=2000,
        transfer=None,
        seed=seed,
        engine=Engine("onednn", together=1),
    )


CELLS: dict[str, Callable[[int], Run]] = {
    "plain": partial(cell, "plain", None),
    "epsilon-8": partial(cell, "epsilon-8", 8.0),
    "epsilon-3": partial(cell, "epsilon-3", 3.0),
}


def start(run: Run) -> Run:
    """Three versions, with their scores; the budget stays that of six."""
    return replace(run, limits=replace(run.limits, versions=3))


def summary(found: Sequence[Line]) -> Line:
    """What privacy costs, in points of accuracy, paired over seeds, with 95 % intervals."""
    lost = {name: paired(found, "plain", name) for name in CELLS if name != "plain"}
    return {
        "seeds": len({line["seed"] for line in found}),
        "delta": DELTA,
        **{f"{name}_points_lost": [round(mean(one), 2), interval(one)] for name, one in lost.items() if one},
    }


GRID = Grid("private_records", CELLS, (0, 1, 2), TARGET, start, summary)

if __name__ == "__main__":
    main(GRID)
