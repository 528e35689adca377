"""Nobody waits: virtual time to a target accuracy, synchronous, semi-asynchronous and asynchronous, on real text.

    python experiments/fedfa_speed.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

50 clients, 20 at work at once, AG News and SST-2 with a small BERT, MRPC with MiniLM, of which LoRA of rank 8 adapts the top layer,
5 local steps of 16 texts a task. IID and label Dirichlet 0.1; three device models: mild and heavy delays in three classes (half of
the clients, a third, a sixth), and log-normal speeds. Every run ends after as many uploads, and is scored every 20 uploads. Cells
are METHOD/SPLIT/DEVICES, AG News where the split names no data. Each method's learning rate and its server's rate are the best of a
small grid on a seed of its own (`fedfa_rates.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any

from grid import SHARED, Grid, Line, main, start

from fedloom import (
    CA2FL,
    FADAS,
    IID,
    Averaged,
    Constant,
    FedAsync,
    FedBuff,
    FedFa,
    FedIT,
    FixedRank,
    Half,
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
from fedloom.train.demo_model import minilm

CLIENTS, IN_FLIGHT, UPLOADS, EVERY, STEADY = 50, 20, 400, 20, 4
"""A target counts as reached with the mean of `STEADY` scores: skewed labels make a single one swing by twenty points."""
OURS, FEDAVG, SEMI, STRONG, BEST = (
    "ours",
    "fedavg",
    "semi-async",
    "fedavg-over",
    ("fedbuff", "fedbuff-half", "fedasync"),
)
DEVICES: dict[str, Devices] = {
    "mild": DelayClasses((FAST, SLOWER, DelayClass("slow", 1.0, 5.0, 8.0)), concentration=None),
    "lognormal": Delays(sigma=1.0, jitter=0.3),
    "heavy": DelayClasses((FAST, SLOWER, DelayClass("slow", 1.0, 50.0, 80.0)), concentration=None),
}
FOLDER, TINY = SHARED / "data", str(SHARED / "models" / "bert-tiny-local")


@dataclass(frozen=True)
class Study:
    """Texts divided over clients, with the target accuracy, fixed before the runs on the tuning seed.

    `modules` are those of the top layer: what lies below is computed once a text and kept.
    """

    data: Table
    partition: Partition
    target: float
    model: str = TINY
    modules: str = r".*layer\.1\..*(query|value|dense)"
    length: int = 64
    rate: float | None = None
    """Of every method, where none has been tuned."""


AGNEWS = Table(
    FOLDER / "agnews" / "train_part.tsv.gz",
    FOLDER / "agnews" / "test.tsv.gz",
    text="text",
    test_text=("title", "description"),
)
SST2 = Table(FOLDER / "sst2" / "train.tsv.gz", FOLDER / "sst2" / "dev.tsv.gz", text="sentence")
MRPC = Table(FOLDER / "mrpc" / "train.tsv.gz", FOLDER / "mrpc" / "test.tsv.gz", text="sentence1", pair="sentence2")
UNIFORM, SKEWED = IID(CLIENTS), LabelDirichlet(CLIENTS, 0.1)
MINILM: dict[str, Any] = {
    "model": str(minilm()),
    "modules": r".*layer\.5\..*(query|value|dense)",
    "length": 96,
    "rate": 1e-3,
}
SPLITS: dict[str, Study] = {
    "iid": Study(AGNEWS, UNIFORM, 0.78),
    "dir0.1": Study(AGNEWS, SKEWED, 0.55),
    "sst2-iid": Study(SST2, UNIFORM, 0.60),
    "sst2-dir0.1": Study(SST2, SKEWED, 0.55),
    "mrpc-iid": Study(MRPC, UNIFORM, 0.70, **MINILM),
    "mrpc-dir0.1": Study(MRPC, SKEWED, 0.68, **MINILM),
}


@dataclass(frozen=True)
class Method:
    """A schedule and an aggregator, with the rate of local training by split, in their order; of AG News alone: its two for all."""

    schedule: Schedule
    aggregator: Aggregator = field(default_factory=FedIT)
    rates: tuple[float, ...] = (5e-3, 1e-2)

    def rate(self, split: str) -> float:
        """The rate of local training."""
        return SPLITS[split].rate or self.rates[[*SPLITS].index(split) % len(self.rates)]


METHODS: dict[str, Method] = {
    FEDAVG: Method(Rounds(IN_FLIGHT, weigh=uniform)),
    STRONG: Method(Rounds(IN_FLIGHT, over_selection=1.3, weigh=uniform)),
    SEMI: Method(FedBuff(IN_FLIGHT, waiting=True)),
    "fedbuff": Method(FedBuff(10), rates=(5e-3, 5e-3, 5e-3, 1e-2)),
    "fedbuff-half": Method(FedBuff(10, server_learning_rate=0.5)),
    "fedasync": Method(FedAsync(), rates=(5e-3, 1e-2, 5e-3, 5e-3)),
    "fedfa": Method(FedFa(10), rates=(1e-2, 1e-2, 5e-3, 1e-2)),
    OURS: Method(Immediate(0.4, discount=Polynomial(0.5)), Averaged(FedIT()), rates=(5e-3, 5e-3)),
}
"""Their rates are the best of `fedfa_rates.py`; both server rates of FedBuff are here, because each was best on one split."""

STEP = 1 / (IN_FLIGHT + (10 - 1) / 2)
"""What an answer moves the model by under FedFa-Param with a window of 10, in units of its change (law 11)."""

MORE: dict[str, Method] = {
    **{f"fedfa-{window}": Method(FedFa(window), rates=(1e-2, 1e-2)) for window in (3, 5, 20)},
    "fedfa-delta": Method(FedFa(10, delta_rate=0.1), rates=(5e-3, 5e-3)),
    "ca2fl": Method(FedBuff(10, discount=Constant()), CA2FL(FedIT(), CLIENTS), rates=(5e-3, 1e-2)),
    "fadas": Method(FedBuff(10, discount=Constant(), delay_threshold=1), FADAS(FedIT(), 1e-2), rates=(5e-3, 5e-3)),
    "ours-at-random": Method(
        Immediate(0.4, discount=Polynomial(0.5), choices=1), Averaged(FedIT()), rates=(5e-3, 5e-3)
    ),
    "ours-unaveraged": Method(Immediate(0.4, discount=Polynomial(0.5)), rates=(5e-3, 5e-3)),
    "fedfa-delta-step": Method(FedFa(10, delta_rate=STEP), rates=(1e-2, 1e-2)),
    "fedbuff-step": Method(FedBuff(10, server_learning_rate=10 * STEP, discount=Constant()), rates=(1e-2, 1e-2)),
    "immediate-step": Method(Immediate(STEP, choices=1), rates=(1e-2, 1e-2)),
}
"""Other windows and rules, what ours is without one of its parts, and three rules at the step and the local rate of `fedfa`."""


def per_version(schedule: Schedule) -> int:
    """Uploads that make a version."""
    if isinstance(schedule, Rounds):
        return schedule.cohort_size
    return schedule.buffer_size if isinstance(schedule, FedBuff) else 1


def cell(method: Method, split: str, devices: str, name: str, seed: int) -> Run:
    """One run."""
    uploads, study = per_version(method.schedule), SPLITS[split]
    return Run(
        name=name.replace("/", "-"),
        model=study.model,
        data=study.data,
        partition=study.partition,
        aggregator=method.aggregator,
        schedule=method.schedule,
        plan=Plan(FixedRank(8), 5),
        lora=LoRA(target_modules=study.modules, dropout=0.0),
        training=Training(learning_rate=method.rate(split), max_length=study.length, keep_moments=False),
        world=DEVICES[devices],
        limits=Limits(versions=UPLOADS // uploads, evaluate_every=EVERY // uploads),
        held_out=0.0,
        test_limit=1000,
        transfer=Half(),
        seed=seed,
    )


def cells() -> dict[str, partial[Run]]:
    """The whole grid by name."""
    names = {
        f"{name}/{split}/{devices}": (name, split, devices)
        for name, split, devices in product(METHODS | MORE, SPLITS, DEVICES)
    }
    return {
        cell_: partial(cell, (METHODS | MORE)[name], split, devices, cell_)
        for cell_, (name, split, devices) in names.items()
    }


def reached(line: Line) -> tuple[float, float] | None:
    """Virtual seconds and uploads to the target: the middle of the first `STEADY` scores whose mean is there; None if never."""
    goal, curve = SPLITS[line["cell"].split("/")[1]].target, line["curve"]
    each = line["uploads"] / curve[-1][0]
    for first in range(len(curve) - STEADY + 1):
        versions, times, scores = zip(*curve[first : first + STEADY], strict=True)
        if sum(scores) / STEADY >= goal:
            return sum(times) / STEADY, sum(versions) / STEADY * each
    return None


def final(line: Line) -> float:
    """The mean of the last three scores: one alone is noise."""
    return float(sum(accuracy for _, _, accuracy in line["curve"][-3:])) / 3


def seconds(lines: Iterable[Line]) -> float:
    """Median over seeds of the time to the target; infinite where half of the runs or more never got there."""
    times = [time[0] if (time := reached(line)) else math.inf for line in lines]
    return median(times) if times else math.nan


def speedups(found: Sequence[Line], ours: str, others: Sequence[str]) -> dict[str, float]:
    """Time of the best of `others` over ours, by split and devices; an other that never got there counts with its whole run's."""

    def time(method: str, place: str) -> float:
        lines = [line for line in found if line["cell"] == f"{method}/{place}"]
        took = seconds(lines)
        return took if math.isfinite(took) or not lines else median(line["curve"][-1][1] for line in lines)

    places = [f"{split}/{devices}" for split in SPLITS for devices in DEVICES]
    ratios = {}
    for place in places:
        mine = seconds(line for line in found if line["cell"] == f"{ours}/{place}")
        best = min((time(other, place) for other in others), default=math.nan)
        if not math.isnan(mine) and not math.isnan(best):
            ratios[place] = round(best / mine, 2)
    return ratios


def summary(found: Sequence[Line]) -> Line:
    """The figures of the comparison, over AG News; every pair by split and devices, of all data, before that."""
    pairs = {
        "fedfa_vs_fedavg": speedups(found, "fedfa", [FEDAVG]),
        "fedfa_vs_semi_async": speedups(found, "fedfa", [SEMI]),
        "ours_vs_best_async": speedups(found, OURS, BEST),
        "ours_vs_overselect": speedups(found, OURS, [STRONG]),
    }
    for name, ratios in pairs.items():
        print(f"{name:20s}", "  ".join(f"{place}: {ratio:g}" for place, ratio in ratios.items()))
    found = [line for line in found if SPLITS[line["cell"].split("/")[1]].data is AGNEWS]
    pairs = {
        name: {place: ratio for place, ratio in ratios.items() if SPLITS[place.split("/")[0]].data is AGNEWS}
        for name, ratios in pairs.items()
    }
    heavy = {name: [r for place, r in ratios.items() if place.endswith("heavy")] for name, ratios in pairs.items()}
    gaps = [
        100 * (final(one) - final(other))
        for one in found
        for other in found
        if one["cell"].startswith("fedfa/") and other["cell"] == one["cell"].replace("fedfa", FEDAVG, 1)
        if one["seed"] == other["seed"]
    ]
    return {
        "seeds": len({line["seed"] for line in found}),
        "speedup_vs_fedavg": min(heavy["fedfa_vs_fedavg"], default=None),
        "speedup_vs_semi_async": min(heavy["fedfa_vs_semi_async"], default=None),
        "ours_vs_best_async_median": _median(pairs["ours_vs_best_async"].values()),
        "ours_vs_best_async_min": min(pairs["ours_vs_best_async"].values(), default=None),
        "ours_vs_overselect_median": _median(pairs["ours_vs_overselect"].values()),
        "ours_vs_overselect_min": min(pairs["ours_vs_overselect"].values(), default=None),
        "accuracy_gap_points": _median(gaps),
        "waiting_seconds": max((line["waiting"] for line in found if line["cell"].startswith("fedfa/")), default=None),
        "reached": round(sum(reached(line) is not None for line in found) / len(found), 3) if found else None,
    }


def _median(values: Iterable[float]) -> float | None:
    known = [*values]
    return round(median(known), 2) if known else None


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, split, devices | seeds | seconds to the target | uploads to it | reached | accuracy at the end (range) "
        "| waiting (slot-seconds) | staleness |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if own := [line for line in found if line["cell"] == name]:
            rows.append(_row(name, own))
    return "\n".join(rows)


def _row(name: str, own: Sequence[Line]) -> str:
    got = [hit for line in own if (hit := reached(line))]
    took = seconds(own)
    ends = [100 * final(line) for line in own]
    columns = (
        name.replace("/", ", "),
        str(len(own)),
        f"{took:,.1f}" if math.isfinite(took) else "never",
        f"{median(uploads for _, uploads in got):.0f}" if math.isfinite(took) else "–",
        f"{len(got)} of {len(own)}",
        f"{median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
        f"{median(line['waiting'] for line in own):,.0f}",
        f"{median(line['staleness'] for line in own):.1f}",
    )
    return f"| {' | '.join(columns)} |"


CELLS = cells()
USUAL = tuple(name for name in CELLS if name.split("/")[0] in METHODS)
GRID = Grid("fedfa_speed", CELLS, (0, 1, 2, 3, 4), 0.0, start, summary, USUAL, table=shown)

if __name__ == "__main__":
    main(GRID)
