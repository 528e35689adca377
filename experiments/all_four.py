"""All four at once: FedFa across HierFedLoRA's groups, ranks added exactly, texts that differ in label, length and quality.

    python experiments/all_four.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

The 80 devices of `hierfedlora_80.py` with an edge near each group. Every client's texts differ in label, length and quality from
the others' (CLLoRA's axes; a fifth of the words of half of the texts are gone and a tenth of their labels are wrong). Each method
alone, in pairs, and all together, against FedIT of rank 8 (FedAvg-LoRA). Cells are METHOD/DATA.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median

from grid import Grid, Line, interval, main, start
from hierfedlora_80 import (
    AT_ONCE,
    CLIENTS,
    EARNED,
    EDGES,
    ENDLESS,
    GROUPS,
    SCORED,
    SECONDS,
    STUDIES,
    RankOfClass,
    Study,
    final,
    ratio,
    reaches,
    told,
)

from fedloom import (
    Averaged,
    Corrupted,
    DeltaInt8,
    FedFa,
    FedIT,
    FixedRank,
    Hierarchy,
    Limits,
    Link,
    LoRA,
    Mixture,
    NearIID,
    Plan,
    ProductDelta,
    Rounds,
    Run,
    Skew,
    Training,
    by_examples,
    by_tokens,
    by_work,
)
from fedloom.data.context import labels, quality, words
from fedloom.types import Schedule

H, ROUNDS_ = 10, 8
"""Local steps of a task, and tasks of each client in a run that does not choose its steps."""
AXES = Mixture(CLIENTS, (Skew(labels, 0.3, None), Skew(words, 0.5, 5), Skew(quality, 0.5, 5)))
TARGET = {"agnews": 0.65}
"""Fixed before the runs, on the tuning seed."""
FEDAVG, ALL = "fedavg-lora", "at-once-int8"
SINGLES = ("hlora", "fedfa", "hierfedlora", "cllora")


@dataclass(frozen=True)
class Method:
    """Which of the four a run has: exact sums over mixed ranks, no waiting, planned groups, weights by what is in the texts.

    `at_once` is our own way to do the second and the third: each answer is a step, an average of the versions is published, groups
    are planned by what training earned (`hierfedlora_80.EARNED`); an answer is not weighed, so texts of all lengths are in each
    batch in the place of weights by tokens. With `int8` answers travel as differences in eight bits.
    """

    hlora: bool = False
    fedfa: bool = False
    groups: bool = False
    context: bool = False
    at_once: bool = False
    int8: bool = False


METHODS = {
    FEDAVG: Method(),
    "hlora": Method(hlora=True),
    "fedfa": Method(fedfa=True),
    "hierfedlora": Method(groups=True),
    "cllora": Method(context=True),
    "hlora+fedfa": Method(hlora=True, fedfa=True),
    "hlora+groups": Method(hlora=True, groups=True),
    "fedfa+groups": Method(fedfa=True, groups=True),
    "without-context": Method(hlora=True, fedfa=True, groups=True),
    "all-four": Method(True, True, True, True),
    "at-once": Method(True, True, True, True, at_once=True),
    ALL: Method(True, True, True, True, at_once=True, int8=True),
}


def cell(name: str, seed: int) -> Run:
    """One run."""
    which, data = name.split("/")
    method, study = METHODS[which], STUDIES[data]
    weigh = by_tokens if method.context else by_work if method.groups else by_examples
    each = 1 if not method.fedfa else GROUPS if method.groups else CLIENTS
    schedule: Schedule = Rounds(GROUPS if method.groups else CLIENTS, weigh=weigh)
    if method.fedfa:
        schedule = FedFa(GROUPS // 2, GROUPS, weigh=weigh) if method.groups else FedFa(20, CLIENTS, weigh=weigh)
    limits = Limits(versions=each * ROUNDS_, evaluate_every=each)
    if method.at_once:
        schedule, limits = AT_ONCE, Limits(ENDLESS, SECONDS["near"], evaluate_every=GROUPS)
    exact = ProductDelta() if method.hlora else FedIT()
    return Run(
        name=name.replace("/", "-"),
        model=study.model,
        data=Corrupted(study.data, 0.5, delete=0.2, swap=0.1),
        partition=AXES,
        aggregator=Averaged(exact) if method.at_once else exact,
        schedule=schedule,
        plan=Plan(RankOfClass() if method.hlora else FixedRank(8), H),
        lora=LoRA(target_modules=study.modules, dropout=0.0),
        training=Training(
            learning_rate=study.rate,
            batch_size=study.batch,
            max_length=study.length,
            keep_moments=False,
            stratified=method.at_once and method.context,
        ),
        world=study.world,
        hierarchy=groups(study, EARNED if method.at_once else Hierarchy(plan=SCORED)) if method.groups else None,
        limits=limits,
        transfer=DeltaInt8() if method.int8 else None,
        held_out=0.1,
        test_limit=500,
        seed=seed,
    )


def groups(study: Study, planned: Hierarchy) -> Hierarchy:
    """Near-IID groups with an edge near their clients."""
    link = Link(1e8 * study.small, 1e8 * study.small)
    return replace(planned, groups=NearIID(GROUPS), link=link, inner_speedup=EDGES["near"])


def reached(line: Line) -> float:
    """Virtual seconds to the target; infinite: never."""
    return reaches(line, TARGET[line["cell"].split("/")[1]])


def seconds(found: Iterable[Line], cell_: str) -> float:
    """Median over seeds of the time to the target; a run that never got there counts as endless."""
    times = [reached(line) for line in found if line["cell"] == cell_]
    return median(times) if times else math.nan


def summary(found: Sequence[Line]) -> Line:
    """The claim's figures, on AG News."""
    data = "agnews"
    ours = seconds(found, f"{ALL}/{data}")
    single = min((seconds(found, f"{name}/{data}") for name in SINGLES), default=math.nan)
    ends = {(line["cell"], line["seed"]): line for line in found}
    pairs = [(line, ends[f"{FEDAVG}/{data}", seed]) for (name, seed), line in ends.items() if name == f"{ALL}/{data}"]
    gains = [100 * (final(one) - final(other)) for one, other in pairs]
    return {
        "seeds": len(pairs),
        "speedup_vs_fedavg_lora": ratio(seconds(found, f"{FEDAVG}/{data}"), ours),
        "speedup_vs_best_single": ratio(single, ours),
        "accuracy_gain_points": round(mean(gains), 2) if gains else None,
        "interval": interval(gains),
        "traffic_ratio": round(mean(traffic(one) / traffic(other) for one, other in pairs), 3) if pairs else None,
        "traffic_to_target_ratio": _ratio_to_target(found, f"{ALL}/{data}", f"{FEDAVG}/{data}"),
    }


def _ratio_to_target(found: Sequence[Line], one: str, other: str) -> float | None:
    """Medians of the bytes until the target, a run that never got there with all of its own; bytes go evenly with the run's time."""
    bytes_ = [
        [traffic(line) * min(1.0, reached(line) / line["curve"][-1][1]) for line in found if line["cell"] == cell_]
        for cell_ in (one, other)
    ]
    return round(median(bytes_[0]) / median(bytes_[1]), 3) if all(bytes_) else None


def traffic(line: Line) -> float:
    """Bytes over all links, both ways, of the whole run."""
    return float(line["bytes_up"] + line["bytes_down"])


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, data | seeds | virtual seconds to the target | reached | accuracy at the end (range) | worst client "
        "| virtual seconds in all | MB, both ways |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if own := [line for line in found if line["cell"] == name]:
            columns = (
                *told(name, own, [reached(line) for line in own]),
                f"{100 * median(line['worst_client'] for line in own):.0f} %",
                f"{median(line['virtual_seconds'] for line in own):,.0f}",
                f"{median(traffic(line) for line in own) / 1e6:.0f}",
            )
            rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


CELLS = {f"{name}/agnews": partial(cell, f"{name}/agnews") for name in METHODS}
GRID = Grid("all_four", CELLS, (0, 1, 2, 3, 4), 0.0, start, summary, table=shown)

if __name__ == "__main__":
    main(GRID)
