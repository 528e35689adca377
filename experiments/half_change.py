"""Sixteen bits of the values or of the change: does what float16 takes from an answer show in the model at the end of training?

    python experiments/half_change.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

AG News on two layers of all-MiniLM-L6, 20 clients, label Dirichlet 0.5, the default merge, ranks 2, 4 and 8 by device. Cells are
CODEC/SETTING: `exact` sends float32, `half` the values in float16, `half-change` the difference to the start in float16, in as many
bytes. `rounds` merges ten answers at a time; `window` is FedFa, where every answer makes a version and moves the model little;
`fast` has the learning rate at which this model has ended to learn after the same rounds. Per run also: what rounding took of what
answers had changed, in each third of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import mean

from cut import cut
from grid import SHARED, Grid, Line, interval, main, paired, start

from fedloom import (
    Exact,
    FedFa,
    Half,
    HalfChange,
    Job,
    LabelDirichlet,
    Limits,
    Plan,
    ProductDelta,
    RankByCapability,
    Rounds,
    Run,
    Table,
    Training,
)
from fedloom.core.codec import Codec
from fedloom.core.events import Command, Event, UpdateArrived
from fedloom.core.policies import Schedule

TARGET = 0.8
"""Fixed before the runs."""
COHORT, ROUNDS, STEPS = 10, 24, 10
CODECS: dict[str, Codec] = {"exact": Exact(), "half": Half(), "half-change": HalfChange()}
IN_ROUNDS: Schedule = Rounds(cohort_size=COHORT)
SETTINGS: dict[str, tuple[Schedule, int, float]] = {
    "rounds": (IN_ROUNDS, ROUNDS, 1e-3),
    "window": (FedFa(window=COHORT, max_in_flight=COHORT), COHORT * ROUNDS, 1e-3),
    "fast": (IN_ROUNDS, ROUNDS, 5e-3),
}
"""Schedule, versions and learning rate; all have as many tasks."""


def cell(seed: int, codec: str, setting: str) -> Run:
    """One run."""
    schedule, versions, rate = SETTINGS[setting]
    return Run(
        name=f"{codec}-{setting}",
        model=cut(2),
        data=Table(
            SHARED / "data" / "agnews" / "train_part.tsv.gz",
            SHARED / "data" / "agnews" / "test.tsv.gz",
            text="text",
            test_text=("title", "description"),
        ),
        partition=LabelDirichlet(clients=20, alpha=0.5),
        aggregator=ProductDelta(),
        schedule=schedule,
        plan=Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=0.5), STEPS),
        training=Training(learning_rate=rate, batch_size=8, max_length=48),
        limits=Limits(versions=versions, evaluate_every=versions // 3),
        held_out=0.0,
        test_limit=1000,
        transfer=CODECS[codec],
        seed=seed,
    )


class Rounding:
    """What rounding took of what each answer had changed, as the answers came."""

    def __init__(self, job: Job) -> None:
        """Begin with no answer."""
        self.shares = list[float]()

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Write an answer's figure down."""
        if isinstance(event, UpdateArrived):
            self.shares.append(event.result.metrics.get("rounding_change", 0.0))

    def figures(self) -> Line:
        """The root mean square in each third."""
        third = max(1, len(self.shares) // 3)
        parts = [self.shares[place * third : (place + 1) * third] for place in range(3)]
        return {"rounding_change": [math.sqrt(mean(share**2 for share in part)) for part in parts if part]}


CELLS: dict[str, Callable[[int], Run]] = {
    f"{codec}/{setting}": partial(cell, codec=codec, setting=setting) for setting in SETTINGS for codec in CODECS
}


def end_loss(line: Line) -> float:
    """Training loss of the last tenth of the versions: finer than an accuracy."""
    losses = [loss for loss in line["losses"] if loss is not None]
    return float(mean(losses[-max(1, len(losses) // 10) :]))


def summary(found: Sequence[Line]) -> Line:
    """By setting: points of accuracy of `half-change` above the others, seed by seed with 95 % intervals; losses and roundings."""
    told: Line = {"seeds": len({line["seed"] for line in found})}
    for setting in SETTINGS:
        ours = f"half-change/{setting}"
        for other in ("half", "exact"):
            points = paired(found, ours, f"{other}/{setting}")
            if points:
                told[f"half_change_vs_{other}_points_{setting}"] = [round(mean(points), 2), interval(points)]
        for codec in CODECS:
            own = [line for line in found if line["cell"] == f"{codec}/{setting}"]
            if own:
                told[f"{codec}_{setting}"] = {
                    "loss": round(mean(map(end_loss, own)), 4),
                    "rounding_change": [f"{mean(line['rounding_change'][k] for line in own):.1e}" for k in range(3)],
                    "bytes_up": round(mean(line["bytes_up"] for line in own)),
                }
    return told


USUAL = (
    "exact/fast",
    "half/fast",
    "half-change/fast",
    "exact/rounds",
    "half/rounds",
    "half-change/rounds",
)
"""What is run without `--only`, in this order."""
GRID = Grid("half_change", CELLS, (0, 1, 2), TARGET, start, summary, USUAL, probe=Rounding)

if __name__ == "__main__":
    main(GRID)
