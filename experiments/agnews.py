"""AG News on a small encoder: does adding adapters of different rank exactly pay, and does the default keep its ranks?

    python experiments/agnews.py [--quick [--cell NAME]] [--summary] [--workers N]

20 clients, label Dirichlet 0.5, ranks 2/4/8 by device (10/6/4 clients), 10 clients a round. Every method runs at the
learning rate that was best for it on a seed of its own (`agnews_rates.py`). `hlora-balanced` is HLoRA with the default's split
of the singular values, so that the effect of the weights can be told from the effect of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from grid import SHARED, Grid, Line, main, rounds_to, table

from fedloom import (
    IID,
    FedIT,
    FixedRank,
    HLoRA,
    LabelDirichlet,
    Limits,
    Plan,
    ProductDelta,
    RaFLoRA,
    RankByCapability,
    Rounds,
    Run,
    Table,
    Training,
)

TARGET = 0.75
"""Fixed before the runs: what the first trials reached in about half of their rounds."""
VERSIONS, COHORT, STEPS = 8, 10, 15
BY_DEVICE = RankByCapability(ranks=(2, 4, 8), upload_seconds=0.06)


def federated(seed: int, name: str, rate: float, **settings: object) -> Run:
    """One federated cell."""
    return Run(
        name=name,
        model=str(SHARED / "models" / "bert-tiny-local"),
        data=Table(
            SHARED / "data" / "agnews" / "train_part.tsv.gz",
            SHARED / "data" / "agnews" / "test.tsv.gz",
            text="text",
            test_text=("title", "description"),
        ),
        schedule=Rounds(cohort_size=COHORT),
        training=Training(learning_rate=rate, max_length=64),
        limits=Limits(versions=VERSIONS, evaluate_every=2),
        test_limit=2000,
        seed=seed,
        **{"partition": LabelDirichlet(clients=20, alpha=0.5), "plan": Plan(BY_DEVICE, STEPS), **settings},  # type: ignore[arg-type]
    )


def centralised(seed: int, rate: float) -> Run:
    """All data in one place: as many optimiser steps as the whole federation makes."""
    plan = Plan(FixedRank(8), COHORT * STEPS)
    one = IID(clients=1)
    return federated(seed, "centralised", rate, partition=one, plan=plan, aggregator=FedIT())


METHODS: dict[str, Callable[[int, float], Run]] = {
    "centralised": centralised,
    "fedit-r8": lambda seed, rate: federated(
        seed, "fedit-r8", rate, aggregator=FedIT(), plan=Plan(FixedRank(8), STEPS)
    ),
    "fedit-padded": lambda seed, rate: federated(seed, "fedit-padded", rate, aggregator=FedIT()),
    "hlora-published": lambda seed, rate: federated(
        seed, "hlora-published", rate, aggregator=HLoRA(published_alpha=16.0)
    ),
    "hlora": lambda seed, rate: federated(seed, "hlora", rate, aggregator=HLoRA()),
    "hlora-balanced": lambda seed, rate: federated(seed, "hlora-balanced", rate, aggregator=HLoRA(balanced=True)),
    "product-delta": lambda seed, rate: federated(seed, "product-delta", rate, aggregator=ProductDelta()),
    "raflora": lambda seed, rate: federated(seed, "raflora", rate, aggregator=RaFLoRA()),
}
RATES = {
    "centralised": 1.25e-3,
    "fedit-r8": 1e-2,
    "fedit-padded": 1e-2,
    "hlora-published": 1e-2,
    "hlora": 1e-2,
    "hlora-balanced": 5e-3,
    "product-delta": 5e-3,
    "raflora": 1e-2,
}
"""The best of each on seed 100: `python experiments/agnews_rates.py --summary`."""
CELLS = {name: partial(lambda name, seed: METHODS[name](seed, RATES[name]), name) for name in METHODS}


def start(run: Run) -> Run:
    """Two versions, with their scores: 300 steps."""
    return replace(run, limits=replace(run.limits, versions=2))


def summary(found: Sequence[Line]) -> Line:
    """The table, and the figures of the last line: paired differences of the default to the others, in points."""
    print(table(found, [*CELLS], TARGET))
    by = {(line["cell"], line["seed"]): line for line in found}
    seeds = sorted({line["seed"] for line in found})

    def points(other: str) -> list[float]:
        pairs = [(by.get(("raflora", seed)), by.get((other, seed))) for seed in seeds]
        return [round(100 * (a["accuracy"] - b["accuracy"]), 2) for a, b in pairs if a and b]

    reached = [rounds_to(line, TARGET) for line in found if line["cell"] == "raflora"]
    return {
        "seeds": len(seeds),
        **{f"default_vs_{cell}_points": points(cell) for cell in CELLS if cell != "raflora"},
        "default_rounds_to_target": reached,
    }


if __name__ == "__main__":
    main(Grid("agnews", CELLS, seeds=(0, 1, 2), shorten=start, summary=summary))
