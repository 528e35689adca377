"""Federated fine-tuning of a causal language model on clients as they are: does it lower perplexity, and how near to central is it?

    python experiments/instructions.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

The small Llama of `small_llama.py` (6.2 million parameters), LoRA on all linear layers. `natural`: 60 clients of Natural
Instructions with one task each, none of which the model has seen. `dolly`: Dolly-15k as its nine clients have it. Cells are
METHOD/DATA. `centralised` has all data in one place and makes as many steps as all clients together. The rates were tried on a seed
of their own (`instructions_rates.py`). Another model: `fedloom run experiments/instructions.py --set model=NAME`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

from generation_data import MODEL, SHARED, natural_instructions
from grid import Grid, Line, main, start

from fedloom import (
    IID,
    ByClient,
    FedFa,
    FedIT,
    FixedDepth,
    FixedRank,
    Generation,
    Half,
    Instructions,
    Limits,
    LoRA,
    Plan,
    ProductDelta,
    RankByCapability,
    Rounds,
    Run,
    Training,
)
from fedloom.core.policies import Aggregator, Schedule
from fedloom.data.partition import Partition

ROUNDS, STEPS = 6, 4
"""Rounds of a run that has a study's cohort in each, and local steps of a task."""
DEFAULT, BOUND = "product-delta/natural", "centralised/natural"
BY_DEVICE = Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=1.5), STEPS)
"""Rank 2 on a phone, 4 on a laptop, 8 on a workstation: half, three tenths and a fifth of the clients."""


@dataclass(frozen=True)
class Study:
    """Requests with answers of real clients, and how many of them are at work at once."""

    data: Instructions
    cohort: int


STUDIES = {
    "natural": Study(replace(natural_instructions(), limit=2400), 10),
    "dolly": Study(
        Instructions(
            SHARED / "dolly" / "clients.jsonl.gz",
            context="context",
            answer="response",
            client="client",
            kind="category",
            test_share=0.05,
            limit=1800,
        ),
        6,
    ),
}


@dataclass(frozen=True)
class Method:
    """How answers are added, what each client does, and into how many rounds the same tasks are divided (None: nobody waits)."""

    aggregator: Aggregator
    plan: Plan
    rounds: int | None = ROUNDS
    rate: float = 1e-2
    central: bool = False


RANK8 = Plan(FixedRank(8), STEPS)
METHODS = {
    "centralised": Method(FedIT(), RANK8, rate=2e-3, central=True),
    "fedit": Method(FedIT(), RANK8),
    "product-delta": Method(ProductDelta(), BY_DEVICE),
    "fedfa": Method(FedIT(), RANK8, rounds=None),
    "fedit-often": Method(FedIT(), RANK8, rounds=2 * ROUNDS),
    "depth": Method(FedIT(), replace(RANK8, depth=FixedDepth(3))),
}
"""`fedit-often` is FedIT with half of the clients in twice as many rounds; `depth` trains the upper three of six layers."""


def cell(method: Method, study: Study, name: str, seed: int) -> Run:
    """One run."""
    tasks, plan = ROUNDS * study.cohort, method.plan
    partition: Partition = ByClient()
    versions = method.rounds or tasks
    schedule: Schedule = Rounds(tasks // versions) if method.rounds else FedFa(window=5, max_in_flight=study.cohort)
    if method.central:
        partition, schedule, plan = IID(1), Rounds(1), replace(plan, local_steps=STEPS * study.cohort)
    return Run(
        name=name.replace("/", "-"),
        model=str(MODEL),
        data=study.data,
        partition=partition,
        aggregator=method.aggregator,
        schedule=schedule,
        plan=plan,
        lora=LoRA(target_modules="all-linear"),
        training=Training(learning_rate=method.rate, batch_size=4, max_length=128),
        limits=Limits(versions=versions, evaluate_every=versions // 2),
        held_out=0.0,
        test_limit=200,
        generation=Generation(examples=60, max_new_tokens=32),
        transfer=Half(),
        seed=seed,
    )


CELLS = {
    f"{name}/{data}": partial(cell, method, study, f"{name}/{data}")
    for data, study in STUDIES.items()
    for name, method in METHODS.items()
}


def loss(line: Line, place: int = -1) -> float:
    """Mean cross-entropy of a test answer's token: of the last version, or of the base (0)."""
    return math.log(line["perplexities"][place])


def closed(found: Sequence[Line], name: str) -> float | None:
    """By how much of what central training lowers the test loss this cell lowers it: the mean over seeds that have both."""
    bound = f"centralised/{name.split('/')[1]}"
    by = {(line["cell"], line["seed"]): line for line in found}
    pairs = [(line, by[bound, seed]) for (one, seed), line in by.items() if one == name and (bound, seed) in by]
    shares = [(loss(own, 0) - loss(own)) / (loss(best, 0) - loss(best)) for own, best in pairs]
    return round(mean(shares), 3) if shares else None


def summary(found: Sequence[Line]) -> Line:
    """The figures of the bar, means over seeds: those of the package's default method, and of all the share of the gap closed."""
    own, best = ([line for line in found if line["cell"] == name] for name in (DEFAULT, BOUND))

    def perplexity(lines: Sequence[Line], place: int) -> float | None:
        return round(mean(line["perplexities"][place] for line in lines), 2) if lines else None

    return {
        "seeds": len(own),
        "perplexity_base": perplexity(own, 0),
        "perplexity_federated": perplexity(own, -1),
        "perplexity_centralised": perplexity(best, -1),
        "gap_closed": closed(found, DEFAULT),
        "gaps_closed": {name: share for name in CELLS if (share := closed(found, name)) is not None},
    }


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, means over seeds."""
    rows = [
        "| method, data | seeds | perplexity: base, end (range) | gap closed | token accuracy: base, end "
        "| ROUGE-L: base, end | exact match: base, end | MB up | virtual seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(found, name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(found: Sequence[Line], name: str, own: Sequence[Line]) -> str:
    ends, share = [line["perplexities"][-1] for line in own], closed(found, name)

    def written(figure: str) -> str:
        return ", ".join(f"{mean(line['written'][key] for line in own):.3f}" for key in (f"base_{figure}", figure))

    columns = (
        name.replace("/", ", "),
        str(len(own)),
        f"{mean(line['perplexities'][0] for line in own):.1f}, {mean(ends):.1f} ({min(ends):.1f}–{max(ends):.1f})",
        f"{100 * share:.0f} %" if share is not None else "–",
        ", ".join(f"{100 * mean(line['curve'][place][2] for line in own):.1f} %" for place in (0, -1)),
        written("rouge_l"),
        written("exact_match"),
        f"{mean(line['bytes_up'] for line in own) / 1e6:.1f}",
        f"{mean(line['virtual_seconds'] for line in own):,.0f}",
    )
    return f"| {' | '.join(columns)} |"


def shortened(run: Run) -> Run:
    """Until the middle of the run, without answers."""
    return replace(start(run), generation=Generation(examples=0))


GRID = Grid("instructions", CELLS, (0, 1, 2), 0.0, shortened, summary, table=shown)
run = CELLS[DEFAULT](0)

if __name__ == "__main__":
    main(GRID)
