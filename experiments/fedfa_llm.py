"""Nobody waits, on a language model: virtual time to a target loss, synchronous and asynchronous, with heavy delays.

    python experiments/fedfa_llm.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

SmolLM2-135M writes the topic of news (AG News); LoRA of rank 8 is on the linear layers of its top block. 50 clients of 48 texts, 20
at work at once, 3 local steps of 4 texts a task; IID and label Dirichlet 0.1; heavy delays in three classes, as in `fedfa_speed.py`,
where settings of the servers come from. Every run ends after as many uploads. Cells are METHOD/SPLIT; `+avg` publishes a running
average of its versions (`Averaged`), as `ours` does. Local rates and targets are from `fedfa_llm_rates.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import log
from statistics import median

from claims import Claim, paired
from fedfa_speed import DEVICES, METHODS, PARTITIONS, TOLD, per_version
from grid import Grid, Line, main
from loss_targets import accuracy, curve, final, reached, times, until
from text_pools import TOLD_LENGTH, TOPICS_TOLD

from fedloom import (
    Engine,
    FixedDepth,
    FixedRank,
    Generation,
    Limits,
    LoRA,
    Plan,
    Run,
    Training,
)
from fedloom.train.demo_model import smollm2

UPLOADS, EVERY, STEPS, BATCH = 240, 20, 3, 4
TESTS = 250
"""Test texts of a run, of the pool's 500, drawn by its seed."""
USED = ("fedavg", "fedavg-over+avg", "fedbuff+avg", "fedasync+avg", "fedfa", "fedfa+avg", "ours")
RATES = {split: dict.fromkeys(USED, 4e-3) for split in PARTITIONS}
TARGETS = dict.fromkeys(PARTITIONS, 0.5)
"""The last line of `fedfa_llm_rates.py`: learning rates, and the test losses that are to be reached."""
FASTER, AVERAGED_FASTER, POINTS = 6.0, 10.0, 1.0
"""FedFa's claim over FedAvg, what is wanted of it with a published average, and the points that it may end below."""


def cell(name: str, split: str, seed: int, rate: float | None = None) -> Run:
    """One run, at its own rate if no other is given."""
    method = METHODS[name]
    uploads = per_version(method.schedule)
    return Run(
        name=f"{name}-{split}",
        model=str(smollm2()),
        data=TOPICS_TOLD,
        partition=PARTITIONS[split],
        aggregator=method.aggregator,
        schedule=method.schedule,
        plan=Plan(FixedRank(8), STEPS, FixedDepth(1)),
        lora=LoRA(target_modules=r".*layers\.29\..*_proj"),
        training=Training(
            learning_rate=rate or RATES[split][name], batch_size=BATCH, max_length=TOLD_LENGTH, keep_moments=False
        ),
        world=DEVICES["heavy"],
        limits=Limits(versions=UPLOADS // uploads, evaluate_every=EVERY // uploads),
        held_out=0.0,
        test_limit=TESTS,
        engine=Engine("onednn"),
        generation=Generation(examples=0),
        seed=seed,
    )


CELLS = {f"{name}/{split}": partial(cell, name, split) for split, name in product(PARTITIONS, USED)}


def seconds(line: Line) -> float:
    """Virtual seconds to the target; those of the whole run where it never got there, which are too few."""
    return until(line, times(line), TARGETS[line["cell"].split("/")[1]])


def claims(found: Sequence[Line]) -> list[Claim]:
    """FedFa's claims on a language model, fixed before the runs."""
    return [claim for split in PARTITIONS for claim in _claims(found, split)]


def _claims(found: Sequence[Line], split: str) -> list[Claim]:
    done, tag = f"SmolLM2, news told, {TOLD[split]}, heavy delays", split.replace(".", "")

    def faster(name: str, slow: str, fast: str, least: float, says: str) -> Claim:
        values = paired(found, lambda line: log(seconds(line)), f"{slow}/{split}", f"{fast}/{split}")
        title, paper = f"fedfa-llm-{name}-{tag}", "ours" if fast == "ours" else "FedFa"
        return Claim(title, paper, says, done, values, f"fedfa llm {split}", log(least), times=True)

    def ends(name: str, method: str, says: str) -> Claim:
        values = paired(found, accuracy, f"{method}/{split}", f"fedavg/{split}")
        return Claim(f"fedfa-llm-{name}-{tag}", "FedFa", says, done, values, f"fedfa llm {split}", -POINTS)

    return [
        faster("vs-fedavg", "fedavg", "fedfa", FASTER, "FedFa reaches the target more than 6 times as fast as FedAvg."),
        faster(
            "avg-vs-fedavg",
            "fedavg",
            "fedfa+avg",
            AVERAGED_FASTER,
            "With a published average FedFa is over 10 times as fast.",
        ),
        ends("end", "fedfa", "FedFa ends no more than 1 point below FedAvg at as many uploads."),
        ends("avg-end", "fedfa+avg", "FedFa with a published average ends no more than 1 point below FedAvg."),
        faster("ours", "fedfa+avg", "ours", 1.0, "`ours` reaches the target sooner than FedFa with an average."),
    ]


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, split | seeds | seconds to the target (range) | reached | mean test loss of the curve | loss at the end "
        "| accuracy at the end (range) | waiting (slot-seconds) | staleness |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(name: str, own: Sequence[Line]) -> str:
    took, ends = [seconds(line) for line in own], [accuracy(line) for line in own]
    hits = sum(reached(line, TARGETS[name.split("/")[1]]) is not None for line in own)
    columns = (
        name.replace("/", ", "),
        str(len(own)),
        f"{median(took):,.0f} ({min(took):,.0f}–{max(took):,.0f})",
        f"{hits} of {len(own)}",
        f"{median(curve(line) for line in own):.3f}",
        f"{median(final(line) for line in own):.3f}",
        f"{median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
        f"{median(line['waiting'] for line in own):,.0f}",
        f"{median(line['staleness'] for line in own):.1f}",
    )
    return f"| {' | '.join(columns)} |"


def shortened(run: Run) -> Run:
    """One version of a server that waits, up to ten of one that does not; scored on a few texts."""
    return replace(run, limits=replace(run.limits, versions=min(10, run.limits.evaluate_every)), test_limit=32)


def summary(found: Sequence[Line]) -> Line:
    """Nothing but the claims."""
    return {}


GRID = Grid("fedfa_llm", CELLS, (0, 1, 2), 0.0, shortened, summary, table=shown, claims=claims)

if __name__ == "__main__":
    main(GRID)
