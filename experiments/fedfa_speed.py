"""Nobody waits: virtual time to a target accuracy, synchronous, semi-asynchronous and asynchronous, on real text.

    python experiments/fedfa_speed.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

50 clients, 20 at work at once, AG News with a small BERT of which LoRA of rank 8 adapts the upper layer, 5 local steps of 16
texts a task; SST-2 the same; MRPC with MiniLM. IID and label Dirichlet 0.1; three device models: mild and heavy delays in three
classes (half of the clients, a third, a sixth), and log-normal speeds. Every run ends after as many uploads, and is scored every 20
uploads. Cells are METHOD/SPLIT/DEVICES, with sst2: or mrpc: before for the other data, and equal: for runs in which every method
has one learning rate and the same step an upload. Each method's learning rate and its server's rate are the best of a stated
small grid on a seed of its own (`fedfa_rates.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

from grid import SHARED, Grid, Line, main

from fedloom import (
    IID,
    Averaged,
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
    Rounds,
    Run,
    Table,
    Training,
    uniform,
)
from fedloom.data.examples import Source
from fedloom.data.partition import Partition
from fedloom.delays import FAST, SLOWER, DelayClass, DelayClasses, Delays
from fedloom.types import Aggregator, Schedule
from fedloom.world import Devices

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
SPLITS: dict[str, Partition] = {"iid": IID(CLIENTS), "dir0.1": LabelDirichlet(CLIENTS, 0.1)}
UPPER = r".*layer\.1\..*(query|value|dense)"
"""The upper of the two layers: what lies below is computed once a text and kept."""


@dataclass(frozen=True)
class Task:
    """A data set with its model, and the targets fixed before the runs, by split."""

    model: str
    data: Source
    targets: Mapping[str, float]
    adapted: str
    max_length: int = 64


TINY = str(SHARED / "models" / "bert-tiny-local")
TASKS: dict[str, Task] = {
    "agnews": Task(
        TINY,
        Table(
            SHARED / "data" / "agnews" / "train_part.tsv.gz",
            SHARED / "data" / "agnews" / "test.tsv.gz",
            text="text",
            test_text=("title", "description"),
        ),
        {"iid": 0.78, "dir0.1": 0.55},
        UPPER,
    ),
}


@dataclass(frozen=True)
class Method:
    """A schedule and an aggregator, with the rate of local training by split."""

    schedule: Schedule
    aggregator: Aggregator = field(default_factory=FedIT)
    rates: tuple[float, float] = (5e-3, 1e-2)


METHODS: dict[str, Method] = {
    FEDAVG: Method(Rounds(IN_FLIGHT, weigh=uniform)),
    STRONG: Method(Rounds(IN_FLIGHT, over_selection=1.3, weigh=uniform)),
    SEMI: Method(FedBuff(IN_FLIGHT, waiting=True)),
    "fedbuff": Method(FedBuff(10), rates=(5e-3, 5e-3)),
    "fedbuff-half": Method(FedBuff(10, server_learning_rate=0.5)),
    "fedasync": Method(FedAsync()),
    "fedfa": Method(FedFa(10), rates=(1e-2, 1e-2)),
    OURS: Method(Immediate(0.2), Averaged(FedIT()), rates=(5e-3, 5e-3)),
}
"""Their rates are the best of `fedfa_rates.py`; both server rates of FedBuff are here, because each was best on one split."""


def per_version(schedule: Schedule) -> int:
    """Uploads that make a version."""
    if isinstance(schedule, Rounds):
        return schedule.cohort_size
    return schedule.buffer_size if isinstance(schedule, FedBuff) else 1


def cell(method: Method, task: Task, split: str, devices: str, name: str, seed: int) -> Run:
    """One run."""
    uploads = per_version(method.schedule)
    return Run(
        name=name.replace("/", "-").replace(":", "-"),
        model=task.model,
        data=task.data,
        partition=SPLITS[split],
        aggregator=method.aggregator,
        schedule=method.schedule,
        plan=Plan(FixedRank(8), 5),
        lora=LoRA(target_modules=task.adapted, dropout=0.0),
        training=Training(
            learning_rate=method.rates[list(SPLITS).index(split)], max_length=task.max_length, keep_moments=False
        ),
        world=DEVICES[devices],
        limits=Limits(versions=UPLOADS // uploads, evaluate_every=EVERY // uploads),
        held_out=0.0,
        test_limit=1000,
        seed=seed,
    )


def cells() -> dict[str, partial[Run]]:
    """The whole grid by name."""
    found = {}
    for data, task in TASKS.items():
        for name, method in METHODS.items():
            for split in SPLITS:
                for devices in DEVICES:
                    cell_name = f"{'' if data == 'agnews' else data + ':'}{name}/{split}/{devices}"
                    found[cell_name] = partial(cell, method, task, split, devices, cell_name)
    return found


def target(cell_name: str) -> float:
    """The accuracy that was fixed for this cell's data and split."""
    data, _, rest = cell_name.rpartition(":")
    return TASKS[data or "agnews"].targets[rest.split("/")[1]]


def reached(line: Line) -> tuple[float, float] | None:
    """Virtual seconds and uploads to the target: the middle of the first `STEADY` scores whose mean is there; None if never."""
    goal, curve = target(line["cell"]), line["curve"]
    each = line["uploads"] / curve[-1][0]
    for first in range(len(curve) - STEADY + 1):
        versions, times, scores = zip(*curve[first : first + STEADY], strict=True)
        if sum(scores) / STEADY >= goal:
            return sum(times) / STEADY, sum(versions) / STEADY * each
    return None


def at(line: Line, seconds: float) -> float:
    """The accuracy of the last version scored by then."""
    return float([accuracy for _, time, accuracy in line["curve"] if time <= seconds][-1])


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
    """The figures of the comparison, over AG News; every pair by split and devices before that."""
    pairs = {
        "fedfa_vs_fedavg": speedups(found, "fedfa", [FEDAVG]),
        "fedfa_vs_semi_async": speedups(found, "fedfa", [SEMI]),
        "ours_vs_best_async": speedups(found, OURS, BEST),
        "ours_vs_overselect": speedups(found, OURS, [STRONG]),
    }
    for name, ratios in pairs.items():
        print(f"{name:20s}", "  ".join(f"{place}: {ratio:g}" for place, ratio in ratios.items()))
    heavy = {name: [r for place, r in ratios.items() if place.endswith("heavy")] for name, ratios in pairs.items()}
    plain = [line for line in found if ":" not in line["cell"]]
    gaps = [
        100 * (final(one) - final(other))
        for one in plain
        for other in plain
        if one["cell"].startswith("fedfa/") and other["cell"] == one["cell"].replace("fedfa", FEDAVG, 1)
        if one["seed"] == other["seed"]
    ]
    return {
        "seeds": len({line["seed"] for line in plain}),
        "speedup_vs_fedavg": min(heavy["fedfa_vs_fedavg"], default=None),
        "speedup_vs_semi_async": min(heavy["fedfa_vs_semi_async"], default=None),
        "ours_vs_best_async_median": _median(pairs["ours_vs_best_async"].values()),
        "ours_vs_best_async_min": min(pairs["ours_vs_best_async"].values(), default=None),
        "ours_vs_overselect_median": _median(pairs["ours_vs_overselect"].values()),
        "ours_vs_overselect_min": min(pairs["ours_vs_overselect"].values(), default=None),
        "accuracy_gap_points": _median(gaps),
        "waiting_seconds": max((line["waiting"] for line in plain if line["cell"].startswith("fedfa/")), default=None),
        "reached": round(sum(reached(line) is not None for line in plain) / len(plain), 3) if plain else None,
    }


def _median(values: Iterable[float]) -> float | None:
    known = [*values]
    return round(median(known), 2) if known else None


def start(run: Run) -> Run:
    """Until the first scored version."""
    return replace(run, limits=replace(run.limits, versions=run.limits.evaluate_every))


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, split, devices | seeds | seconds to the target | uploads to it | reached | accuracy at the end (range) "
        "| waiting (place-seconds) | staleness |",
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
GRID = Grid("fedfa_speed", CELLS, (0, 1, 2, 3, 4), 0.0, start, summary, table=shown)

if __name__ == "__main__":
    main(GRID)
