"""HLoRA's claims on a small encoder and on a language model: resources, speed, accuracy, and whether one small rank would do.

    python experiments/hlora_llm.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

20 clients with skewed labels; half of them afford rank 2, three tenths rank 4, a fifth rank 8. AG News with the top two blocks of
MiniLM and its head (`topics`), the same news told to SmolLM2-135M, which writes their topic (`told`: the top two of its 30
blocks), and two tasks of pairs with MiniLM (`mrpc`, `qqp`). Cells are METHOD/DATA. Every method runs at the learning rate that was
best for it on a seed and on rows of the training file that no cell scores, where the targets are fixed too (`hlora_llm_rates.py`).
The first figure is the mean test loss of all scored versions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import mean

from claims import Claim, paired
from grid import Grid, Line, main
from text_pools import (
    PARAPHRASES,
    PARAPHRASES_TUNING,
    QUESTIONS,
    QUESTIONS_TUNING,
    TOLD_LENGTH,
    TOPICS_CHOSEN,
    TOPICS_CHOSEN_TUNING,
    TOPICS_TOLD,
    TOPICS_TOLD_TUNING,
)

from fedloom import (
    Engine,
    FedIT,
    FixedDepth,
    FixedRank,
    Generation,
    HLoRA,
    LabelDirichlet,
    Limits,
    LoRA,
    Plan,
    ProductDelta,
    RandomRank,
    RankByCapability,
    RateByRank,
    Rounds,
    Run,
    Training,
)
from fedloom.core.policies import Aggregator
from fedloom.data.examples import Source
from fedloom.plan.rank import RankRule
from fedloom.train.demo_model import minilm, smollm2

MINILM, SMOLLM2 = cache(minilm), cache(smollm2)  # each checks its weights
CLIENTS, STEADY = 20, 3
"""A target counts as reached with the mean of `STEADY` scores, and a run's end is the mean of its last ones."""
ENGINE = Engine("onednn")
"""One kernel for every cell, so that they share kept activations; "fastest" measures anew for each run."""
MARGIN, MOST_BYTES = 0.05, 0.6
"""A mean test loss that is higher by less counts as no worse; the share of the bytes that counts as half. Fixed before the runs."""


@dataclass(frozen=True)
class Method:
    """How answers are added, the rank of a client (None: by its device), and how its learning rate follows it (None: not at all)."""

    aggregator: Aggregator
    rank: RankRule | None = None
    rate: RateByRank | None = None


METHODS = {
    "fedit-padded": Method(FedIT()),
    "fedit-r2": Method(FedIT(), FixedRank(2)),
    "fedit-r8": Method(FedIT(), FixedRank(8)),
    "hlora": Method(HLoRA()),
    "product-delta": Method(ProductDelta()),
    "hlora-random": Method(HLoRA(), RandomRank(2, 8)),
    "hlora-rates": Method(HLoRA(), rate=RateByRank()),
}


@dataclass(frozen=True)
class Study:
    """One data set with its model, and the size of a run.

    Fields:
        about: the data and the model in a few words.
        data, tuning: the examples, and the same ones scored on rows to tune on.
        seeds: how many seeds its cells are run with.
        model: the base model.
        lora: the layers that are adapted.
        depth: blocks that are trained.
        upload_seconds: longest upload of a client, which decides on the rank that it affords.
        alpha: skew of the labels.
        cohort, steps, versions: clients of a round, local steps of each, rounds.
        every: rounds from one score to the next.
        max_length: tokens of a text at most.
        generation: for a model that writes.
    """

    about: str
    data: Source
    tuning: Source
    seeds: int
    model: Callable[[], Path] = MINILM
    lora: LoRA = field(default_factory=lambda: LoRA(r".*layer\.(4|5)\..*(query|value)"))
    depth: int = 2
    upload_seconds: float = 0.16
    alpha: float = 0.5
    cohort: int = 10
    steps: int = 5
    versions: int = 10
    every: int = 1
    max_length: int = 128
    generation: Generation | None = None

    def run(self, method: Method, name: str, rate: float, seed: int) -> Run:
        """One run."""
        rank = method.rank or RankByCapability((2, 4, 8), self.upload_seconds)
        return Run(
            name=name.replace("/", "-"),
            model=str(self.model()),
            data=self.data,
            partition=LabelDirichlet(CLIENTS, self.alpha),
            aggregator=method.aggregator,
            schedule=Rounds(self.cohort),
            plan=Plan(rank, self.steps, FixedDepth(self.depth), method.rate),
            lora=self.lora,
            training=Training(learning_rate=rate, batch_size=8, max_length=self.max_length),
            limits=Limits(versions=self.versions, evaluate_every=self.every),
            held_out=0.0,  # clients' own models are no part of this study
            generation=self.generation,
            engine=ENGINE,
            seed=seed,
        )


EVERY_LINEAR = LoRA(r".*layers\.(28|29)\..*_proj")
"""Of a model that writes, as docs/generation.md advises."""
PAIRS = Study("MRPC, MiniLM", PARAPHRASES, PARAPHRASES_TUNING, 5, alpha=5.0, cohort=5, steps=16, versions=12, every=2)
STUDIES = {
    "topics": Study("AG News, MiniLM", TOPICS_CHOSEN, TOPICS_CHOSEN_TUNING, 6, max_length=64),
    "told": Study(
        "AG News as an instruction, SmolLM2",
        TOPICS_TOLD,
        TOPICS_TOLD_TUNING,
        4,
        SMOLLM2,
        EVERY_LINEAR,
        upload_seconds=1.0,
        every=2,  # a score takes as long as six tasks
        max_length=TOLD_LENGTH,
        generation=Generation(examples=0),
    ),
    "mrpc": PAIRS,
    "qqp": replace(PAIRS, about="QQP, MiniLM", data=QUESTIONS, tuning=QUESTIONS_TUNING),
}
TUNED = [name for name in METHODS if name != "hlora-random"]
"""Methods with a rate of their own; random ranks have HLoRA's."""
RATES = {
    "topics": dict.fromkeys(TUNED, 1.6e-2) | {"fedit-padded": 3.2e-2, "fedit-r2": 3.2e-2},
    "told": {"fedit-padded": 8e-3, "fedit-r2": 8e-3, "fedit-r8": 4e-3, "hlora": 4e-3, "product-delta": 4e-3},
}
TARGETS = {"topics": 0.5, "told": 0.74}
"""The last line of `hlora_llm_rates.py`: learning rates, and the test losses that are to be reached. A method has no cells on data
for which it has no rate."""
SHARED_RATE = {"hlora-random": "hlora"}


def cell(name: str, data: str, seed: int) -> Run:
    """A method on a data set at its rate."""
    rate = RATES[data][SHARED_RATE.get(name, name)]
    return STUDIES[data].run(METHODS[name], f"{name}/{data}", rate, seed)


CELLS = {
    f"{name}/{data}": partial(cell, name, data)
    for data, name in product(RATES, METHODS)
    if SHARED_RATE.get(name, name) in RATES[data]
}


def target(line: Line) -> float:
    """The test loss that a run is to reach; 0 where none is fixed yet."""
    return TARGETS.get(line["cell"].split("/")[1].split("@")[0], 0.0)


def curve(line: Line) -> float:
    """The mean test loss of all versions that were trained."""
    return mean(float(score["loss"]) for score in line["scores"][1:])


def rounds_to(line: Line, goal: float) -> float | None:
    """The round in the middle of the first `STEADY` scores whose mean loss is at most the goal; None if there are none."""
    losses = [score["loss"] for score in line["scores"]]
    windows = range(1, len(losses) - STEADY + 1)
    hit = next((first for first in windows if mean(losses[first : first + STEADY]) <= goal), None)
    return None if hit is None else float(line["curve"][hit + STEADY // 2][0])


def rounds_or_all(line: Line, goal: float) -> float:
    """The rounds to the goal; those of the whole run where it never got there, which are too few."""
    return rounds_to(line, goal) or float(line["curve"][-1][0])


def end(line: Line) -> float:
    """The share of labels that are right at the end, in percent; of a model that writes them, among the words that are allowed."""
    return 100 * mean(float(score.get("label_accuracy", score["accuracy"])) for score in line["scores"][-STEADY:])


@dataclass(frozen=True)
class Question:
    """A claim that is judged on each data set: a figure of one method against that of another."""

    name: str
    says: str
    figure: Callable[[Line], float]
    one: str
    other: str
    margin: float = 0.0
    below: bool = True
    times: bool = False
    unit: str = "loss"


def log_rounds(line: Line) -> float:
    """The logarithm of the rounds to the target: differences of it are ratios."""
    return math.log(rounds_or_all(line, target(line)))


def log_bytes(line: Line) -> float:
    """The logarithm of the bytes that all clients sent, heads included."""
    return math.log(line["bytes_up"])


JUDGED = (
    Question(
        "bytes",
        f"mixed ranks send at most {MOST_BYTES} of the bytes of rank 8 everywhere",
        log_bytes,
        "hlora",
        "fedit-r8",
        margin=math.log(MOST_BYTES),
        times=True,
    ),
    Question("resources", "mixed ranks learn as fast as rank 8 everywhere", curve, "hlora", "fedit-r8", margin=MARGIN),
    Question("speed", "exact addition of mixed ranks learns faster than padding", curve, "hlora", "fedit-padded"),
    Question(
        "rounds", "it is at the target in fewer rounds than padding", log_rounds, "hlora", "fedit-padded", times=True
    ),
    Question(
        "accuracy", "it ends more accurate than padding", end, "hlora", "fedit-padded", below=False, unit="points"
    ),
    Question("small-rank", "rank 2 everywhere, at its own rate, is as good", curve, "fedit-r2", "hlora", margin=MARGIN),
)


def claims(found: Sequence[Line]) -> list[Claim]:
    """The claims on each data set that was run; those of one are corrected together."""
    run = [data for data in STUDIES if any(line["cell"].endswith(f"/{data}") for line in found)]
    return [_claim(found, data, question) for data, question in product(run, JUDGED)]


def _claim(found: Sequence[Line], data: str, asked: Question) -> Claim:
    return Claim(
        name=f"hlora-{asked.name}-{data}",
        paper="HLoRA",
        says=asked.says,
        done=f"{asked.one} against {asked.other} on {STUDIES[data].about}",
        values=paired(found, asked.figure, f"{asked.one}/{data}", f"{asked.other}/{data}"),
        family=f"hlora-{data}",
        margin=asked.margin,
        below=asked.below,
        times=asked.times,
        unit=asked.unit,
    )


def start(run: Run) -> Run:
    """Two rounds: in the second the clients begin from what the method has merged. A model that writes is hardly scored."""
    limits = replace(run.limits, versions=2, evaluate_every=1)
    return replace(run, limits=limits, test_limit=run.test_limit if run.generation is None else 32)


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, means over seeds."""
    rows = [
        "| method, data | seeds | mean test loss of the curve (range) | rounds to the target | reached "
        "| accuracy at the end (range) | MB up (head) | MB down |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(name: str, own: Sequence[Line]) -> str:
    curves, ends = [curve(line) for line in own], [end(line) for line in own]
    reached = sum(rounds_to(line, target(line)) is not None for line in own)
    columns = (
        name.replace("/", ", "),
        str(len(own)),
        f"{mean(curves):.3f} ({min(curves):.3f}–{max(curves):.3f})",
        f"{mean(rounds_or_all(line, target(line)) for line in own):.1f}",
        f"{reached} of {len(own)}",
        f"{mean(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
        f"{mean(line['bytes_up'] for line in own) / 1e6:.2f} ({mean(line['bytes_up_dense'] for line in own) / 1e6:.2f})",
        f"{mean(line['bytes_down'] for line in own) / 1e6:.2f}",
    )
    return f"| {' | '.join(columns)} |"


def seeds_of(name: str) -> int:
    """How many seeds a cell is run with."""
    return STUDIES[name.split("/")[1]].seeds


def summary(found: Sequence[Line]) -> Line:
    """How many runs there are."""
    return {"runs": len(found)}


QUICK = [name for name in CELLS if not name.endswith("/told")]
"""Without kept activations two rounds of SmolLM2 take four minutes; name such a cell with `--cell`."""
GRID = Grid(
    "hlora_llm", CELLS, range(6), 0.0, start, summary, table=shown, claims=claims, seeds_of=seeds_of, quick=QUICK
)

if __name__ == "__main__":
    main(GRID)
