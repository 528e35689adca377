"""All four at once: FedFa across HierFedLoRA's groups, ranks added exactly, texts that differ in label, length and quality.

    python experiments/all_four.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

The 80 devices of `hierfedlora_80.py` with an edge near each group. Every client's texts differ in label, length and quality from
the others' (CLLoRA's axes; a fifth of the words of half of the texts are gone and a tenth of their labels are wrong). Each method
alone, in pairs, and all together, against FedIT of rank 8 (FedAvg-LoRA). Cells are METHOD/DATA: AG News, and instructions to which
the small Llama of `small_llama.py` writes the answers, in groups by topics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean, median

from cllora import short_rows
from generation_data import MODEL, natural_instructions
from grid import Grid, Line, interval, main, start
from hierfedlora_80 import (
    AT_ONCE,
    BY_LOSS_RATE,
    BY_SCORE,
    CLIENTS,
    EDGES,
    ENDLESS,
    GROUPS,
    SECONDS,
    STUDIES,
    H,
    RankOfClass,
    Study,
    final,
    ratio,
    reaches,
    table_row,
)

from fedloom import (
    Averaged,
    BestRoundTime,
    Corrupted,
    DeltaInt8,
    FedFa,
    FedIT,
    FixedRank,
    Generation,
    GradientScore,
    Hierarchy,
    JointPlan,
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
from fedloom.core.policies import Schedule
from fedloom.data.text_measures import labels, quality, words

AXES = Mixture(CLIENTS, (Skew(labels, 0.3, None), Skew(words, 0.5, 5), Skew(quality, 0.5, 5)))


@dataclass(frozen=True)
class Work:
    """Data and model, and how much is done: local `steps` of a task, tasks of each client in a run that does not choose its steps.

    A run of our own ends after virtual `seconds`. `target` is an accuracy, or a share of the base's perplexity;
    `topics` are what groups are told apart by where there are no labels.
    """

    study: Study
    steps: int
    rounds: int
    seconds: float
    target: float
    topics: int = 0


INSTRUCTIONS = Study(
    replace(natural_instructions(short_rows), limit=1600),
    str(MODEL),
    flop=4.1e9,
    bits=2.62e6,
    targets={},
    length=96,
    rate=1e-2,
    modules=r".*layers\.[45]\..*_proj",
)
"""The upper two of six layers are adapted, so depth is 1 or 2 as on AG News; what lies below is computed once a text and kept."""
WORKS = {
    "agnews": Work(STUDIES["agnews"], H, 8, SECONDS["near"], 0.65),
    "instructions": Work(INSTRUCTIONS, 4, 6, 20.0, 0.6, topics=16),
}
FEDAVG, ALL = "fedavg-lora", "at-once-int8"
SINGLES = ("hlora", "fedfa", "hierfedlora", "cllora")


@dataclass(frozen=True)
class Method:
    """Which of the four a run has: exact sums over mixed ranks, no waiting, planned groups, weights by what is in the texts.

    `at_once` is our own way to do the second and the third: each answer is a step, an average of the versions is published, groups
    are planned by what training earned (`hierfedlora_80.BY_LOSS_RATE`); an answer is not weighed, so texts of all lengths are in each
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
    method, work = METHODS[which], WORKS[data]
    study = work.study
    weigh = by_tokens if method.context else by_work if method.groups else by_examples
    each = 1 if not method.fedfa else GROUPS if method.groups else CLIENTS
    schedule: Schedule = Rounds(GROUPS if method.groups else CLIENTS, weigh=weigh)
    if method.fedfa:
        schedule = FedFa(GROUPS // 2, GROUPS, weigh=weigh) if method.groups else FedFa(20, CLIENTS, weigh=weigh)
    limits = Limits(versions=each * work.rounds, evaluate_every=each)
    if method.at_once:
        schedule, limits = AT_ONCE, Limits(ENDLESS, work.seconds, evaluate_every=GROUPS)
    exact = ProductDelta() if method.hlora else FedIT()
    return Run(
        name=name.replace("/", "-"),
        model=study.model,
        data=Corrupted(study.data, 0.5, delete=0.2, swap=0.1),
        partition=AXES,
        aggregator=Averaged(exact) if method.at_once else exact,
        schedule=schedule,
        plan=Plan(RankOfClass() if method.hlora else FixedRank(8), work.steps),
        lora=LoRA(target_modules=study.modules, dropout=0.0),
        training=Training(
            learning_rate=study.rate,
            batch_size=study.batch,
            max_length=study.length,
            keep_moments=False,
            stratified=method.at_once and method.context,
        ),
        world=study.world,
        hierarchy=groups(work, BY_LOSS_RATE if method.at_once else Hierarchy(plan=planned(work)))
        if method.groups
        else None,
        limits=limits,
        transfer=DeltaInt8() if method.int8 else None,
        held_out=0.1,
        test_limit=200 if data == "instructions" else 500,
        generation=Generation(examples=0) if data == "instructions" else None,
        seed=seed,
    )


def planned(work: Work) -> JointPlan:
    """The plan of `hierfedlora`, with the steps of a task here."""
    return replace(BY_SCORE, rule=BestRoundTime(GradientScore(work.steps)))


def groups(work: Work, how: Hierarchy) -> Hierarchy:
    """Near-IID groups with an edge near their clients."""
    link = Link(1e8 * work.study.small, 1e8 * work.study.small)
    return replace(how, groups=NearIID(GROUPS), link=link, inner_speedup=EDGES["near"], topics=work.topics)


def reached(line: Line) -> float:
    """Virtual seconds to the target; infinite: never."""
    target = WORKS[line["cell"].split("/")[1]].target
    if "perplexities" not in line:
        return reaches(line, target)
    found, base = line["perplexities"], line["perplexities"][0]
    falls = [[*when, math.log(base / value)] for (*when, _), value in zip(line["curve"], found, strict=True)]
    return reaches({"curve": falls}, -math.log(target))


def seconds(found: Iterable[Line], cell_: str) -> float:
    """Median over seeds of the time to the target; a run that never got there counts as endless."""
    times = [reached(line) for line in found if line["cell"] == cell_]
    return median(times) if times else math.nan


def summary(found: Sequence[Line]) -> Line:
    """The claim's figures on AG News, and the same of generation."""
    return figures(found, "agnews") | {"generation": figures(found, "instructions")}


def figures(found: Sequence[Line], data: str) -> Line:
    """Of everything at once against FedAvg-LoRA, on these data; the gain in points of accuracy, of tokens where text is written."""
    ours, other = f"{ALL}/{data}", f"{FEDAVG}/{data}"
    singles = [time for name in SINGLES if not math.isnan(time := seconds(found, f"{name}/{data}"))]
    lines = {(line["cell"], line["seed"]): line for line in found}
    pairs = [
        (one, lines[other, seed]) for (name, seed), one in lines.items() if name == ours and (other, seed) in lines
    ]
    gains = [100 * (final(one) - final(alone)) for one, alone in pairs]
    return {
        "seeds": len(pairs),
        "speedup_vs_fedavg_lora": ratio(seconds(found, other), seconds(found, ours)),
        "speedup_vs_best_single": ratio(min(singles, default=math.nan), seconds(found, ours)),
        "accuracy_gain_points": round(mean(gains), 2) if gains else None,
        "interval": interval(gains),
        "traffic_ratio": _traffic_ratio(pairs, traffic),
        "traffic_ratio_of_the_server": _traffic_ratio(pairs, at_the_server),
        "traffic_to_target_ratio": _ratio_to_target(pairs),
    }


def _traffic_ratio(pairs: Sequence[tuple[Line, Line]], bytes_of: Callable[[Line], float]) -> float | None:
    return round(mean(bytes_of(one) / bytes_of(other) for one, other in pairs), 3) if pairs else None


def _ratio_to_target(pairs: Sequence[tuple[Line, Line]]) -> float | None:
    """Medians of the bytes until the target, a run that never got there with all of its own; bytes go evenly with the run's time."""
    shares = [[min(1.0, reached(line) / line["curve"][-1][1]) * traffic(line) for line in pair] for pair in pairs]
    return round(median(own for own, _ in shares) / median(other for _, other in shares), 3) if shares else None


def traffic(line: Line) -> float:
    """Bytes over all links, both ways, of the whole run: members', and edges' where there are any."""
    return float(line["bytes_up"] + line["bytes_down"] + line.get("bytes_edges", 0))


def at_the_server(line: Line) -> float:
    """Bytes over the links of the server: of all clients, or where there are edges of these."""
    return float(line.get("bytes_edges", line["bytes_up"] + line["bytes_down"]))


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, data | seeds | virtual seconds to the target | reached | accuracy at the end (range) | worst tenth of clients "
        "| perplexity at the end | virtual seconds in all | MB, both ways | of these at the server |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if own := [line for line in found if line["cell"] == name]:
            columns = (
                *table_row(name, own, [reached(line) for line in own]),
                worst(own),
                perplexity(own),
                f"{median(line['virtual_seconds'] for line in own):,.0f}",
                f"{median(traffic(line) for line in own) / 1e6:.0f}",
                servers(own),
            )
            rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


def servers(own: Sequence[Line]) -> str:
    """Megabytes at the server, median over seeds; earlier lines of runs with edges do not tell them."""
    known = [line for line in own if "bytes_edges" in line or not METHODS[line["cell"].split("/")[0]].groups]
    return f"{median(map(at_the_server, known)) / 1e6:.0f}" if known else "–"


def worst(own: Sequence[Line]) -> str:
    """Mean accuracy of the worst tenth of the clients, on what each holds out of its own: median over seeds."""
    known = [line["worst_tenth"] for line in own if "worst_tenth" in line]
    return f"{100 * median(known):.0f} %" if known else "–"


def perplexity(own: Sequence[Line]) -> str:
    """Median over seeds, where text is written."""
    ends = [line["perplexities"][-1] for line in own if "perplexities" in line]
    return f"{median(ends):.1f}" if ends else "–"


CELLS = {f"{name}/{data}": partial(cell, f"{name}/{data}") for data in WORKS for name in METHODS}
USUAL = tuple(name for name in CELLS if name.endswith("/agnews"))
GRID = Grid("all_four", CELLS, (0, 1, 2, 3, 4), 0.0, start, summary, USUAL, table=shown)

if __name__ == "__main__":
    main(GRID)
