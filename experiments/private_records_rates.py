"""Clip and learning rate of `private_records.py`, chosen on a seed that it does not use and on training data alone.

    python experiments/private_records_rates.py [--summary] [--workers N]

A fifth of the training texts is set aside and scored instead of the test data; sites have 380 texts and batches of 95, so that the
rate at which a text is drawn, and with it the noise, is the experiment's. What is chosen here is not in the accounting: who tunes on
the private data itself has to count each try (Papernot and Steinke, arXiv 2110.03620).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from grid import Grid, Line, main
from private_records import BATCH, CLIP, DATA, MULTIPLIERS, ROWS, SITES, TARGET, VERSIONS, cell, private, start

from fedloom import ClientDirichlet, Limits, Run

SEED = 100
RATES = (2e-2, 5e-2, 1e-1)
CLIPS = (0.1, 2.0)
"""Beside 0.5, at one rate and one epsilon: AdamW takes most of the scale out of the clip."""
TRAINED = 380


def tried(epsilon: float | None, rate: float, clip: float, seed: int) -> Run:
    """A cell of the experiment with other settings, on a part of the training data."""
    run = cell("tried", epsilon, seed)
    return replace(
        run,
        limits=Limits(versions=VERSIONS, evaluate_every=VERSIONS),
        data=replace(DATA, test=None, test_text=None, test_share=0.2),
        partition=ClientDirichlet(SITES, 1.0, TRAINED),
        training=replace(run.training, learning_rate=rate, batch_size=BATCH * TRAINED // ROWS),
        privacy=None if epsilon is None else private(epsilon, clip),
    )


CELLS: dict[str, Callable[[int], Run]] = {
    **{
        f"epsilon-{epsilon:g}@{rate:g}/{CLIP:g}": partial(tried, epsilon, rate, CLIP)
        for epsilon in MULTIPLIERS
        for rate in RATES
    },
    **{f"epsilon-8@0.05/{clip:g}": partial(tried, 8.0, 5e-2, clip) for clip in CLIPS},
    **{f"plain@{rate:g}": partial(tried, None, rate, 0.0) for rate in RATES},
}


def summary(found: Sequence[Line]) -> Line:
    """The best rate and clip of each."""
    accuracy = {line["cell"]: line["accuracy"] for line in found}
    for name, value in sorted(accuracy.items()):
        print(f"{name:22s} {100 * value:.1f} %")
    kinds = dict.fromkeys(name.partition("@")[0] for name in accuracy)
    return {kind: max((n for n in accuracy if n.startswith(f"{kind}@")), key=accuracy.__getitem__) for kind in kinds}


GRID = Grid("private_records_rates", CELLS, (SEED,), TARGET, start, summary)

if __name__ == "__main__":
    main(GRID)
