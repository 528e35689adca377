"""Eighty devices in near-IID groups: does choosing rounds and depth for each group pay, with one distant server and with edges?

    python experiments/hierfedlora_80.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...]

80 devices in three classes (30 : 40 : 10 at speeds 1 : 2.5 : 6, each in a mode that changes), links uniform in 1 to 30 Mb/s,
drawn for each task; everybody takes part in every round. Two networks: `far`, where everybody talks to one distant server and
groups exist there only, and `near`, where each group has an edge that its members reach ten times as fast. Cells are
METHOD/DATA/SPLIT/NETWORK.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import mean, median

from grid import SHARED, Grid, Line, interval, main, start
from joint_rules import JointMemory, TimeAligned

from fedloom import (
    Averaged,
    BestRoundTime,
    DepthByCapability,
    FedFa,
    FedIT,
    FixedDepth,
    FixedRank,
    FLoRA,
    GradientScore,
    HetLoRA,
    Hierarchy,
    Immediate,
    JointPlan,
    LabelDirichlet,
    Limits,
    Link,
    LoRA,
    LossRate,
    NearIID,
    Plan,
    Polynomial,
    RandomGroups,
    Rounds,
    Run,
    Table,
    Training,
    by_examples,
    by_work,
    uniform,
)
from fedloom.core.policies import Aggregator, Fleet, Schedule
from fedloom.core.types import Profile
from fedloom.data.examples import Source
from fedloom.plan.rank import RankRule
from fedloom.simulate.devices import MIDDLE, STRONG, WEAK, Capabilities
from fedloom.train.demo_model import minilm

CLIENTS, GROUPS, H, TOTAL = 80, 8, 10, 160
"""`H` steps of a client in a global round of groups, `TOTAL` in a run: as many in every run whose rule does not choose the steps."""
STEP, ADAPTER = 0.25, 9.6e6
"""What the models stand for: seconds of a whole step on a weak device at full power, bits of a whole adapter of rank 8."""
TOKENS = 128
"""Of a batch, about, that a plan reckons with before it has seen one."""
STEADY = 3
"""Scores in a row that count together: with skewed labels one alone swings."""
EDGES = {"near": 10.0, "far": 1.0}
SECONDS = {"near": 40.0, "far": 100.0}
"""In which our runs end, which do as many steps as they find right; all others take longer."""
ENDLESS = 10**6


@dataclass(frozen=True)
class Study:
    """A data set and a model; `flop` are those of a step of full depth, `bits` those of an adapter of rank 8.

    `total` are the steps of a client in a run.
    """

    data: Source
    model: str
    flop: float
    bits: float
    targets: Mapping[str, float]
    batch: int = 4
    length: int = 32
    rate: float = 5e-3
    modules: str | None = r".*layer.*(query|value|dense)"
    total: int = TOTAL

    @property
    def world(self) -> Capabilities:
        """The 80 devices, slowed down to this small model."""
        classes = tuple(replace(one, flops=one.flops / WEAK.flops * self.flop / STEP) for one in (WEAK, MIDDLE, STRONG))
        return Capabilities(classes, low_bps=1e6 * self.small, high_bps=3e7 * self.small)

    @property
    def small(self) -> float:
        """Bits of this adapter for one of what it stands for."""
        return self.bits / ADAPTER


FOLDER, TINY = SHARED / "data", str(SHARED / "models" / "bert-tiny-local")
AGNEWS = Table(
    FOLDER / "agnews" / "train_part.tsv.gz",
    FOLDER / "agnews" / "test.tsv.gz",
    text="text",
    test_text=("title", "description"),
)
SST2 = Table(FOLDER / "sst2" / "train.tsv.gz", FOLDER / "sst2" / "dev.tsv.gz", text="sentence", limit=6000)
MRPC = Table(FOLDER / "mrpc" / "train.tsv.gz", FOLDER / "mrpc" / "test.tsv.gz", text="sentence1", pair="sentence2")
SPLITS = {"dir0.1": 0.1, "dir0.5": 0.5, "dir1": 1.0}
STUDIES: dict[str, Study] = {
    "agnews": Study(AGNEWS, TINY, 2.3e8, 1.057e6, {"dir0.1": 0.60, "dir0.5": 0.70, "dir1": 0.72}),
    "sst2": Study(SST2, TINY, 1e8, 1.057e6, {"dir0.1": 0.60, "dir0.5": 0.56, "dir1": 0.65}),
    "agnews-minilm": Study(AGNEWS, str(minilm()), 5.9e9, 9.46e6, {"dir0.1": 0.70}, rate=2e-3, total=TOTAL // 4),
    "mrpc": Study(
        MRPC,
        str(minilm()),
        1.9e10,
        9.46e6,
        {"dir0.1": 0.68, "dir0.5": 0.69, "dir1": 0.70},
        batch=8,
        length=96,
        rate=1e-3,
    ),
}


@dataclass(frozen=True)
class RankOfClass:
    """The rank of a device's class; the bandwidths of the world are alike, so that they say nothing."""

    weak: int = 2
    middle: int = 4
    strong: int = 8

    @property
    def largest(self) -> int:
        """The strong devices'."""
        return max(self.weak, self.middle, self.strong)

    def __call__(self, profile: Profile, fleet: Fleet) -> int:
        """By the name of the class; an edge is asked too, and has the highest."""
        return {"weak": self.weak, "middle": self.middle}.get(profile.tier, self.largest)


@dataclass(frozen=True)
class Method:
    """What differs. `legend` is the time, in shares of a weak device's whole task, in which depth lets everybody answer.

    `schedule` stands at the server (None: everybody waits for everybody), `timed`: a run ends by `SECONDS`.
    """

    steps: int = H
    aggregator: Aggregator = field(default_factory=FedIT)
    rank: RankRule = field(default_factory=lambda: FixedRank(8))
    within: float | None = None
    hierarchy: Hierarchy | None = None
    schedule: Schedule | None = None
    depth: int | None = None
    timed: bool = False


def grouped(plan: JointPlan | None, groups: object = NearIID(GROUPS), rounds: int = 1, **more: object) -> Method:
    """A method with groups."""
    hierarchy = Hierarchy(groups, rounds=rounds, plan=plan)  # type: ignore[arg-type]
    return Method(hierarchy=hierarchy, **{"rank": RankOfClass(), **more})  # type: ignore[arg-type]


BY_SCORE = JointPlan(BestRoundTime(GradientScore(H)), batch_tokens=TOKENS)
ACROSS = FedFa(GROUPS // 2, GROUPS, weigh=by_work)
AT_ONCE = Immediate(0.4, GROUPS, 6 * GROUPS, Polynomial(0.5))
FIRST = Rounds(7, over_selection=10 / 7)
"""Inside a group: all ten start, the first seven answers count."""
BY_LOSS_RATE = Hierarchy(NearIID(GROUPS), schedule=FIRST, plan=JointPlan(LossRate(), batch_tokens=TOKENS))
OURS = Method(aggregator=Averaged(FedIT()), rank=RankOfClass(), hierarchy=BY_LOSS_RATE, schedule=AT_ONCE, timed=True)
BASELINES = ("fedit-5", "fedit-10", "fedit-20", "hetlora", "flora", "legend")
METHODS: dict[str, Method] = {
    "fedit-5": Method(5),
    "fedit-10": Method(10),
    "fedit-20": Method(20),
    "hetlora": Method(aggregator=HetLoRA(), rank=RankOfClass()),
    "flora": Method(aggregator=FLoRA(), rank=RankOfClass()),
    "legend": Method(rank=RankOfClass(), within=0.7),
    "depth-only": Method(within=0.7),
    "hierfedlora": grouped(BY_SCORE),
    "equal-ranks": grouped(BY_SCORE, rank=FixedRank(8)),
    "groups-only": grouped(None, rounds=5),
    "fixed-rounds": grouped(replace(BY_SCORE, rounds=5)),
    "fixed-depth": grouped(replace(BY_SCORE, depth=1)),
    "no-joint": grouped(replace(BY_SCORE, rule=TimeAligned(H, 5, work_grows=False))),
    "unpaced": grouped(replace(BY_SCORE, rule=GradientScore(H))),
    "work-grows": grouped(replace(BY_SCORE, rule=TimeAligned(H, 5))),
    "random-groups": grouped(BY_SCORE, RandomGroups(GROUPS)),
    "joint-memory": grouped(replace(BY_SCORE, rule=JointMemory(H, 5, ranks=(2, 4, 8)))),
    "fedfa-across": grouped(BY_SCORE, schedule=ACROSS),
    "ours": OURS,
    "ours-synchronous": replace(OURS, schedule=None),
    "ours-fedfa": replace(OURS, schedule=ACROSS),
    "ours-unaveraged": replace(OURS, aggregator=FedIT()),
    "ours-for-all-ten": replace(OURS, hierarchy=replace(BY_LOSS_RATE, schedule=None)),
    "ours-weighed": replace(OURS, hierarchy=replace(BY_LOSS_RATE, plan=BY_SCORE)),
    "ours-random-groups": replace(OURS, hierarchy=replace(BY_LOSS_RATE, groups=RandomGroups(GROUPS))),
    "ours-ungrouped": replace(OURS, hierarchy=None, schedule=replace(AT_ONCE, max_in_flight=CLIENTS), depth=1),
    "legend-averaged": Method(aggregator=Averaged(FedIT()), rank=RankOfClass(), within=0.7),
}
"""FedIT is flat FedAvg with so many steps; the best of them counts. `hierfedlora` has the ranks of `legend`, `equal-ranks` those of
FedIT; from `groups-only` on it is without one of its parts, from `ours-synchronous` on ours is."""


def cell(name: str, seed: int) -> Run:
    """One run."""
    which, data, split, network = name.split("/")
    method, study = METHODS[which], STUDIES[data]
    hierarchy = method.hierarchy
    if hierarchy is not None:
        link = Link(1e8 * study.small, 1e8 * study.small) if network == "near" else None
        hierarchy = replace(hierarchy, link=link, inner_speedup=EDGES[network])
    weigh = uniform if isinstance(method.aggregator, HetLoRA) else by_work if hierarchy else by_examples
    whole = method.steps * STEP + 2 * ADAPTER / 1.55e7
    depth = DepthByCapability(method.within * whole, TOKENS) if method.within else None
    places = GROUPS if hierarchy else CLIENTS
    each = places if method.schedule else 1
    limits = Limits(each * (study.total // method.steps), evaluate_every=each)
    if method.timed:
        limits = replace(limits, versions=ENDLESS, seconds=SECONDS[network] * study.total / TOTAL)
    return Run(
        name=name.replace("/", "-"),
        model=study.model,
        data=study.data,
        partition=LabelDirichlet(CLIENTS, SPLITS[split]),
        aggregator=method.aggregator,
        schedule=method.schedule or Rounds(places, weigh=weigh),
        plan=Plan(method.rank, method.steps, FixedDepth(method.depth) if method.depth else depth),
        lora=LoRA(target_modules=study.modules, dropout=0.0),
        training=Training(
            learning_rate=study.rate, batch_size=study.batch, max_length=study.length, keep_moments=False
        ),
        world=study.world,
        hierarchy=hierarchy,
        limits=limits,
        transfer=None,
        held_out=0.0,
        test_limit=500,
        seed=seed,
    )


def cells() -> dict[str, partial[Run]]:
    """The whole grid by name. Without groups there are no edges, and only the distant server."""
    names = [
        f"{name}/{data}/{split}/{network}"
        for data, study in STUDIES.items()
        for split in study.targets
        for name, method in METHODS.items()
        for network in (EDGES if method.hierarchy else ("far",))
    ]
    return {name: partial(cell, name) for name in names}


def reached(line: Line) -> float:
    """Virtual seconds to the target; infinite: never."""
    _, data, split, _ = line["cell"].split("/")
    return reaches(line, STUDIES[data].targets[split])


def reaches(line: Line, goal: float) -> float:
    """Virtual seconds until the mean of `STEADY` scores in a row is `goal`, by the last of them; infinite: never."""
    scores = line["curve"][1:]
    for last in range(STEADY, len(scores) + 1):
        if mean(score for _, _, score in scores[last - STEADY : last]) >= goal:
            return float(scores[last - 1][1])
    return math.inf


def final(line: Line) -> float:
    """The mean of the last `STEADY` scores."""
    return float(mean(score for _, _, score in line["curve"][-STEADY:]))


def seconds(found: Iterable[Line], method: str, place: str) -> float:
    """Median over seeds of the time to the target; a run that never got there counts as endless."""
    times = [reached(line) for line in found if line["cell"] == f"{method}/{place}"]
    return median(times) if times else math.nan


def ratio(slow: float, fast: float) -> float | None:
    """How many times as fast; None where one was not run, or ours never got there."""
    return round(slow / fast, 2) if math.isfinite(fast) and math.isfinite(slow) else None


def summary(found: Sequence[Line]) -> Line:
    """The claim's figures, on AG News at Dirichlet 0.1: against the best baseline on the distant server, which has no edges."""
    place = "agnews/dir0.1"
    times = {name: seconds(found, name, f"{place}/far") for name in BASELINES}
    known = {name: time for name, time in times.items() if math.isfinite(time)}
    best = min(known, key=known.__getitem__, default=None)
    far, near = (seconds(found, "ours", f"{place}/{network}") for network in ("far", "near"))
    ends = {(line["cell"], line["seed"]): 100 * final(line) for line in found}
    seeds = sorted({line["seed"] for line in found})
    pairs = [((f"ours/{place}/far", seed), (f"{best}/{place}/far", seed)) for seed in seeds]
    gains = [ends[one] - ends[other] for one, other in pairs if one in ends and other in ends]
    waiting, across = (seconds(found, f"ours-{name}", f"{place}/near") for name in ("synchronous", "fedfa"))
    return {
        "seeds": len(seeds),
        "speedup_vs_best_baseline": ratio(known[best], far) if best else None,
        "speedup_with_edges": ratio(known[best], near) if best else None,
        "accuracy_gain_points": round(mean(gains), 2) if gains else None,
        "interval": interval(gains),
        "best_baseline": best,
        "fedfa_across_groups_speedup": ratio(waiting, across),
    }


def table_row(name: str, own: Sequence[Line], times: Sequence[float]) -> tuple[str, ...]:
    """The first columns of a cell's row: its name, seeds, median time to the target, how many got there, accuracy at the end."""
    took, ends = median(times), [100 * final(line) for line in own]
    return (
        name.replace("/", ", "),
        str(len(own)),
        f"{took:,.0f}" if math.isfinite(took) else "never",
        f"{sum(map(math.isfinite, times))} of {len(own)}",
        f"{median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
    )


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, data, split, network | seeds | virtual seconds to the target | reached | accuracy at the end (range) "
        "| virtual seconds in all | MB up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if own := [line for line in found if line["cell"] == name]:
            columns = (
                *table_row(name, own, [reached(line) for line in own]),
                f"{median(line['virtual_seconds'] for line in own):,.0f}",
                f"{median(line['bytes_up'] for line in own) / 1e6:.1f}",
            )
            rows.append(f"| {' | '.join(columns)} |")
    return "\n".join(rows)


CELLS = cells()
USUAL = tuple(name for name in CELLS if "/agnews/dir0.1/" in name)
GRID = Grid("hierfedlora_80", CELLS, (0, 1, 2, 3, 4), 0.0, start, summary, USUAL, table=shown)

if __name__ == "__main__":
    main(GRID)
