"""Does a frozen base need its own dropout, and do frozen layers in bfloat16 train as well as in float32?

    python experiments/base_dropout.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

All-MiniLM-L6-v2 on AG News and on MRPC, 20 clients, label Dirichlet 1, FedIT at rank 8, LoRA's own dropout 0.05;
and the small Llama on Natural Instructions, all linear layers. Cells are WAY/DATA: `plain` has the dropout that the model came with
and float32, `no-dropout` none in the base, `bfloat16` frozen layers in bfloat16, `both` the two together. Not told apart: the 95 %
interval of the paired differences holds 0, and their mean is within a point (a hundredth of the loss, where text is written).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

from generation_data import MODEL, natural_instructions
from grid import SHARED, Grid, Line, interval, main, paired, start

from fedloom import (
    ByClient,
    Engine,
    FedIT,
    FixedRank,
    Generation,
    Half,
    LabelDirichlet,
    Limits,
    LoRA,
    Plan,
    Rounds,
    Run,
    Table,
    Training,
)
from fedloom.data.examples import Source
from fedloom.data.partition import Partition
from fedloom.train.demo_model import minilm

TARGET = 0.7
CLIENTS, COHORT, ROUNDS = 20, 5, 8
DATA = SHARED / "data"


@dataclass(frozen=True)
class Study:
    """A data set with the model, the adapted layers and the size of its runs; `steps` of `batch` make a task."""

    model: Callable[[], object]
    data: Source
    partition: Partition
    lora: LoRA
    rate: float
    steps: int
    batch: int
    length: int
    tested: int


AGNEWS = Table(
    DATA / "agnews" / "train_part.tsv.gz",
    DATA / "agnews" / "test.tsv.gz",
    text="text",
    test_text=("title", "description"),
)
MRPC = Table(DATA / "mrpc" / "train.tsv.gz", DATA / "mrpc" / "test.tsv.gz", text="sentence1", pair="sentence2")
BY_LABEL = LabelDirichlet(clients=CLIENTS, alpha=1.0)
STUDIES = {
    "agnews": Study(minilm, AGNEWS, BY_LABEL, LoRA(), 1e-3, 6, 16, 64, 1000),
    "mrpc": Study(minilm, MRPC, BY_LABEL, LoRA(), 1e-3, 10, 8, 96, 800),
    "natural": Study(
        lambda: MODEL, replace(natural_instructions(), limit=1200), ByClient(), LoRA("all-linear"), 1e-2, 4, 4, 128, 200
    ),
}
WAYS: dict[str, tuple[bool | None, bool]] = {
    "plain": (True, False),
    "no-dropout": (False, False),
    "bfloat16": (True, True),
    "both": (False, True),
}
"""Dropout in the base, and bfloat16."""


def cell(seed: int, way: str, name: str) -> Run:
    """One run."""
    (dropout, half), study = WAYS[way], STUDIES[name]
    return Run(
        name=f"{way}-{name}",
        model=str(study.model()),
        data=study.data,
        partition=study.partition,
        aggregator=FedIT(),
        schedule=Rounds(cohort_size=COHORT),
        plan=Plan(FixedRank(8), study.steps),
        lora=study.lora,
        training=Training(
            learning_rate=study.rate, batch_size=study.batch, max_length=study.length, base_dropout=dropout
        ),
        limits=Limits(versions=ROUNDS, evaluate_every=ROUNDS // 2),
        held_out=0.0,
        test_limit=study.tested,
        generation=Generation(examples=0) if name == "natural" else None,
        engine=Engine(kernel="torch", bfloat16=half),
        transfer=Half(),
        seed=seed,
    )


CELLS = {f"{way}/{name}": partial(cell, way=way, name=name) for name in STUDIES for way in WAYS}


def figure(line: Line) -> float:
    """The last version's accuracy; where text is written, minus its mean loss."""
    return -math.log(line["perplexities"][-1]) if "perplexities" in line else float(line["accuracy"])


def summary(found: Sequence[Line]) -> Line:
    """By cell: points above `plain`, seed by seed, with their 95 % interval, and whether the two are told apart."""
    judged = [line | {"accuracy": figure(line)} for line in found]
    told: Line = {"seeds": len({line["seed"] for line in found})}
    for name in STUDIES:
        for way in WAYS:
            points = paired(judged, f"{way}/{name}", f"plain/{name}") if way != "plain" else []
            bounds = interval(points)
            if bounds:
                apart = not bounds[0] <= 0 <= bounds[1] or abs(mean(points)) > 1
                told[f"{way}/{name}"] = {"points": round(mean(points), 2), "interval": bounds, "told_apart": apart}
    return told


USUAL = tuple(f"{way}/{name}" for name in ("agnews", "mrpc") for way in WAYS)
"""The small Llama has no dropout of its own; `plain/natural` and `bfloat16/natural` need `small_llama.py` to have made it."""
GRID = Grid("base_dropout", CELLS, (0, 1, 2), TARGET, start, summary, USUAL)

if __name__ == "__main__":
    main(GRID)
