"""Nobody waits: virtual time to a target accuracy, synchronous, semi-asynchronous and asynchronous, on real text.

    python experiments/fedfa_speed.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

50 clients, 20 at work at once, AG News with a small BERT, of which LoRA of rank 8 adapts the top layer, 5 local steps of 16 texts a
task. IID and label Dirichlet 0.1; three device models: mild and heavy delays in three classes (half of the clients, a third, a
sixth), and log-normal speeds. Every run ends after as many uploads, and is scored every 20 uploads. Cells are
METHOD/SPLIT/DEVICES. Methods with `+avg` publish a running average of their versions (`Averaged`), as `ours` does. Each method's
learning rate and its server's rate are the best of a small grid on a seed of its own (`fedfa_rates.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import mean, median
from typing import TypeAlias

from claims import Claim, paired
from grid import SHARED, Grid, Line, main, start

from fedloom import (
    IID,
    Averaged,
    Engine,
    FedAsync,
    FedBuff,
    FedFa,
    FedIT,
    FixedRank,
    Immediate,
    LabelDirichlet,
    Limits,
    LoRA,
    Plan,
    Polynomial,
    Rounds,
    Run,
    Table,
    Training,
    uniform,
)
from fedloom.core.policies import Aggregator, Schedule
from fedloom.data.partition import Partition
from fedloom.simulate.delays import FAST, SLOWER, DelayClass, DelayClasses, Delays
from fedloom.simulate.devices import Devices

CLIENTS, IN_FLIGHT, UPLOADS, EVERY, STEADY = 50, 20, 400, 20, 4
"""A target counts as reached with the mean of `STEADY` scores: skewed labels make a single one swing by twenty points."""
TESTS = 2000
"""Test texts of a run, of 7,600, drawn by its seed: a standard error of 0.9 points of one score, and less of a difference."""
DEVICES: dict[str, Devices] = {
    "mild": DelayClasses((FAST, SLOWER, DelayClass("slow", 1.0, 5.0, 8.0)), concentration=None),
    "lognormal": Delays(sigma=1.0, jitter=0.3),
    "heavy": DelayClasses((FAST, SLOWER, DelayClass("slow", 1.0, 50.0, 80.0)), concentration=None),
}
FOLDER, TINY = SHARED / "data", str(SHARED / "models" / "bert-tiny-local")
TOP_LAYER = r".*layer\.1\..*(query|value|dense)"
"""What lies below is computed once a text and kept."""


ENGINE = Engine("onednn")
"""One kernel for every cell; "fastest" measures anew for each run, and the last digits follow it."""

Values: TypeAlias = tuple[float, ...]

AGNEWS = Table(
    FOLDER / "agnews" / "train_part.tsv.gz",
    FOLDER / "agnews" / "test.tsv.gz",
    text="text",
    test_text=("title", "description"),
)
PARTITIONS: dict[str, Partition] = {"iid": IID(CLIENTS), "dir0.1": LabelDirichlet(CLIENTS, 0.1)}
TARGETS = {"iid": 0.769, "dir0.1": 0.528}
"""What FedAvg at its best rate ends at on the tuning seed, on a part of the training texts, less two points (`fedfa_rates.py`)."""


@dataclass(frozen=True)
class Method:
    """A schedule and an aggregator, with the rate of local training by split, in the order of `PARTITIONS`."""

    schedule: Schedule
    aggregator: Aggregator = field(default_factory=FedIT)
    rates: tuple[float, ...] = ()

    def averaged(self, *rates: float) -> Method:
        """The same method with a running average of its versions published, at rates of its own."""
        return Method(self.schedule, Averaged(self.aggregator), rates)


FEDAVG = Method(Rounds(IN_FLIGHT, weigh=uniform), rates=(1e-2, 1e-2))
OVER_SELECTING = Method(Rounds(IN_FLIGHT, over_selection=1.3, weigh=uniform), rates=(1e-2, 1e-2))
METHODS: dict[str, Method] = {
    "fedavg": FEDAVG,
    "fedavg-over": OVER_SELECTING,
    "fedavg-over+avg": OVER_SELECTING.averaged(1e-2, 1e-2),
    "semi-async": Method(FedBuff(IN_FLIGHT, waiting=True), rates=(1e-2, 1e-2)),
    "fedbuff": Method(FedBuff(10, server_learning_rate=0.5), rates=(1e-2, 1e-2)),
    "fedbuff+avg": Method(FedBuff(10)).averaged(5e-3, 1e-2),
    "fedasync": Method(FedAsync(), rates=(5e-3, 5e-3)),
    "fedasync+avg": Method(FedAsync()).averaged(1e-2, 1e-2),
    "fedfa": Method(FedFa(20), rates=(5e-3, 1e-2)),
    "fedfa+avg": Method(FedFa(20)).averaged(1e-2, 2e-2),
    "ours": Method(Immediate(0.2, discount=Polynomial(0.5))).averaged(5e-3, 1e-2),
}
"""The rates, local and of the server, are the best of `fedfa_rates.py`; synchronous methods learn alike and share FedAvg's."""


def per_version(schedule: Schedule) -> int:
    """Uploads that make a version."""
    if isinstance(schedule, Rounds):
        return schedule.cohort_size
    return schedule.buffer_size if isinstance(schedule, FedBuff) else 1


def cell(method: Method, split: str, devices: str, name: str, seed: int) -> Run:
    """One run."""
    uploads = per_version(method.schedule)
    return Run(
        name=name.replace("/", "-"),
        model=TINY,
        data=AGNEWS,
        partition=PARTITIONS[split],
        aggregator=method.aggregator,
        schedule=method.schedule,
        plan=Plan(FixedRank(8), 5),
        lora=LoRA(target_modules=TOP_LAYER),
        training=Training(learning_rate=method.rates[[*PARTITIONS].index(split)], max_length=64, keep_moments=False),
        world=DEVICES[devices],
        limits=Limits(versions=UPLOADS // uploads, evaluate_every=EVERY // uploads),
        held_out=0.0,
        test_limit=TESTS,
        engine=ENGINE,
        seed=seed,
    )


def cells() -> dict[str, partial[Run]]:
    """The whole grid by name."""
    names = {
        f"{name}/{split}/{devices}": (name, split, devices)
        for name, split, devices in product(METHODS, PARTITIONS, DEVICES)
    }
    return {
        cell_: partial(cell, METHODS[name], split, devices, cell_) for cell_, (name, split, devices) in names.items()
    }


def reached(line: Line) -> tuple[float, float] | None:
    """Virtual seconds and uploads to the target: the middle of the first `STEADY` scores whose mean is there; None if never."""
    goal, curve = TARGETS[line["cell"].split("/")[1]], line["curve"]
    each = line["uploads"] / curve[-1][0]
    for first in range(len(curve) - STEADY + 1):
        versions, times, scores = zip(*curve[first : first + STEADY], strict=True)
        if sum(scores) / STEADY >= goal:
            return sum(times) / STEADY, sum(versions) / STEADY * each
    return None


def seconds(line: Line) -> float:
    """Virtual seconds to the target; those of the whole run where it never got there, which are too few."""
    hit = reached(line)
    return hit[0] if hit else float(line["curve"][-1][1])


def end(line: Line) -> float:
    """The mean of the last three scores in percent: one alone is noise."""
    return 100 * mean(float(score) for *_, score in line["curve"][-3:])


def over_devices(found: Sequence[Line], figure: Callable[[Line], float], one: str, other: str, split: str) -> Values:
    """By how much a figure of one method is above that of another, by seed: the mean over the three device models."""
    by_device = [paired(found, figure, f"{one}/{split}/{name}", f"{other}/{split}/{name}") for name in DEVICES]
    return tuple(map(mean, zip(*by_device, strict=False)))


def log_seconds(line: Line) -> float:
    """The logarithm of the time to the target, whose differences are ratios."""
    return math.log(seconds(line))


def claims(found: Sequence[Line]) -> list[Claim]:
    """FedFa's claims, the same with a published average, and the rule of our own against baselines that publish one too."""
    return [
        claim for split, told in TOLD.items() for claim in (*_fedfa(found, split, told), *_ours(found, split, told))
    ]


TOLD = {"iid": "IID", "dir0.1": "skewed labels"}


def _fedfa(found: Sequence[Line], split: str, told: str) -> list[Claim]:
    heavy, tag = f"{split}/heavy", split.replace(".", "")

    def faster(name: str, slow: str, fast: str, least: float, says: str) -> Claim:
        values = paired(found, log_seconds, f"{slow}/{heavy}", f"{fast}/{heavy}")
        done = f"AG News, {told}, heavy delays"
        return Claim(f"fedfa-{name}-{tag}", "FedFa", says, done, values, f"fedfa {split}", math.log(least), times=True)

    def ends(name: str, method: str, says: str) -> Claim:
        values = over_devices(found, end, method, "fedavg", split)
        done = f"AG News, {told}, three device models"
        return Claim(f"fedfa-{name}-{tag}", "FedFa", says, done, values, f"fedfa {split}", -1.0)

    return [
        faster("vs-fedavg", "fedavg", "fedfa", 6, "FedFa reaches the target more than 6 times as fast as FedAvg."),
        faster("vs-waiting", "semi-async", "fedfa", 4, "FedFa is over 4 times as fast as waiting semi-asynchrony."),
        faster("vs-over", "fedavg-over", "fedfa", 1, "FedFa is faster than FedAvg with 30 % over-selection."),
        faster("vs-fedasync", "fedasync", "fedfa", 1, "The window of FedFa is faster than FedAsync."),
        faster("avg-vs-fedavg", "fedavg", "fedfa+avg", 10, "With a published average FedFa is over 10 times as fast."),
        ends("end", "fedfa", "FedFa ends no more than 1 point below FedAvg at as many uploads."),
        ends("avg-end", "fedfa+avg", "FedFa with a published average ends no more than 1 point below FedAvg."),
    ]


def _ours(found: Sequence[Line], split: str, told: str) -> list[Claim]:
    tag, done = split.replace(".", ""), f"AG News, {told}, three device models"

    def sooner(other: str) -> Claim:
        values = over_devices(found, log_seconds, other, "ours", split)
        says = f"`ours` reaches the target sooner than {other}."
        return Claim(f"ours-speed-vs-{other}-{tag}", "ours", says, done, values, f"ours speed {split}", times=True)

    def higher(other: str) -> Claim:
        values = over_devices(found, end, "ours", other, split)
        says = f"`ours` ends higher than {other}."
        return Claim(f"ours-end-vs-{other}-{tag}", "ours", says, done, values, f"ours end {split}")

    return [claim(other) for claim in (sooner, higher) for other in AVERAGED]


AVERAGED = ("fedasync+avg", "fedbuff+avg", "fedfa+avg", "fedavg-over+avg")
"""Baselines that publish an average too."""


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, split, devices | seeds | seconds to the target (range) | uploads to it | reached | accuracy at the end (range) "
        "| waiting (slot-seconds) | staleness |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(name: str, own: Sequence[Line]) -> str:
    got = [hit for line in own if (hit := reached(line))]
    took, ends = [seconds(line) for line in own], [end(line) for line in own]
    columns = (
        name.replace("/", ", "),
        str(len(own)),
        f"{median(took):,.1f} ({min(took):,.1f}–{max(took):,.1f})" if got else "never",
        f"{median(uploads for _, uploads in got):.0f}" if got else "–",
        f"{len(got)} of {len(own)}",
        f"{median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
        f"{median(line['waiting'] for line in own):,.0f}",
        f"{median(line['staleness'] for line in own):.1f}",
    )
    return f"| {' | '.join(columns)} |"


def summary(found: Sequence[Line]) -> Line:
    """How many seeds the cell with the fewest has."""
    return {"seeds": min(sum(line["cell"] == name for line in found) for name in CELLS)}


CELLS = cells()
GRID = Grid("fedfa_speed", CELLS, range(5), 0.0, start, summary, table=shown, claims=claims)

if __name__ == "__main__":
    main(GRID)
