"""Eighty devices and a real language model: do groups, a planned depth or not waiting make it learn sooner?

    python experiments/hierfedlora_llm.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

SmolLM2-135M-Instruct writes the topic of news (AG News). LoRA of rank 8 is on the linear layers of its top four blocks, and a client
trains one of them, two or four. Each of 80 devices holds 30 texts, with labels by Dirichlet. They are weak, middle and strong
(30 : 40 : 10 at speeds 1 : 2.5 : 6), in modes that change, with links of 1 to 30 Mb/s drawn for each task; a weak device is one core
of the machine of the measurements (`step_seconds.py`). Times are of real bytes and measured steps: nothing stands for a larger model.
24 devices are at work at once, every run has as many uploads, and every method publishes a running average of its versions
(`Averaged`), the baselines too. Cells are METHOD/SPLIT/NETWORK: with `far` groups exist at a distant server only, with `near` each
has an edge that its members reach ten times as fast. Depths and rates are the best of a small grid (`hierfedlora_llm_rates.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import log
from statistics import median

from claims import Claim, paired
from grid import Grid, Line, main
from loss_targets import accuracy, curve, final, reached, times, until
from measured_devices import MeasuredDevices
from text_pools import TOLD_LENGTH, TOPICS_TOLD

from fedloom import (
    Averaged,
    BestRoundTime,
    ClientDirichlet,
    Engine,
    FedBuff,
    FedIT,
    FixedDepth,
    FixedRank,
    Generation,
    GradientScore,
    Hierarchy,
    Immediate,
    Job,
    JointPlan,
    Limits,
    Link,
    LoRA,
    LossRate,
    NearIID,
    Plan,
    Polynomial,
    Rounds,
    Run,
    Training,
    by_work,
)
from fedloom.core import message_size
from fedloom.core.events import Command, Evaluate, Event
from fedloom.core.policies import Fleet, Schedule
from fedloom.core.types import Budget, Profile
from fedloom.plan.depth import DepthRule
from fedloom.runs.observation import RunObservation, TaskAnswered
from fedloom.simulate.devices import MIDDLE, STRONG, WEAK, Capabilities
from fedloom.train.demo_model import smollm2

CLIENTS, TEXTS, GROUPS = 80, 30, 8
STEPS, BATCH, UPLOADS, EVERY = 5, 4, 256, 32
"""Local steps of a task, of so many texts; tasks of a run, and from one score to the next. Planned groups choose their steps."""
COHORT, STARTED, MEMBERS = 16, 24, Rounds(2, over_selection=1.5)
"""Answers that count in a round of everybody, of devices that are started; in a group the first two of three count."""
BLOCKS, MODULES = 4, r".*layers\.(26|27|28|29)\..*_proj"
"""Blocks that are adapted."""
TOKENS, MEMORY = 400, 7.28e8
"""Tokens of a batch, and bytes of a device: by `Shape.train_memory` depth 4 takes 720 MB, 5 would take 735."""

WEAK_FLOPS = 2.85e11
CLASSES = tuple(
    replace(one, flops=one.flops / WEAK.flops * WEAK_FLOPS, memory=MEMORY) for one in (WEAK, MIDDLE, STRONG)
)
DEVICES = MeasuredDevices(Capabilities(CLASSES), WEAK_FLOPS, TOKENS, steps=(0.125, 0.225, 0.32, 0.43), between=0.055)
"""Processor seconds of `step_seconds.py`, on a core of an AMD EPYC that others used too."""

ENGINE = Engine("onednn")
"""One kernel for every cell, so that they share kept activations."""
SPLITS = {"dir0.5": 0.5, "dir0.1": 0.1}
TARGET = 0.45
"""Test loss that is to be reached, with either skew; fixed by `hierfedlora_llm_rates.py`."""
EDGES = {"far": 1.0, "near": 10.0}
TESTS = 250
"""Test texts of a run, of the pool's 500, drawn by its seed."""


@dataclass(frozen=True, slots=True)
class DepthInTime:
    """As LEGEND (arXiv 2412.20004) has it: the deepest at which a device at full power answers in time.

    Unlike `DepthByCapability` it knows what a step takes at each depth, as LEGEND's server does, which has measured the devices.

    Fields:
        seconds: longest task (s).
    """

    seconds: float

    @property
    def bounds(self) -> tuple[int, int]:
        """From the top block to all that are adapted."""
        return 1, BLOCKS

    def __call__(self, profile: Profile, fleet: Fleet, budget: Budget) -> int:
        """Return the depth, 1 where none is in time."""

        def task_seconds(depth: int) -> float:
            numbers = (fleet.shape.payload(budget.rank) + fleet.shape.payload(budget.rank, depth)) / 4
            return DEVICES.train_seconds(profile, budget.steps, depth) + 16 * numbers / profile.up_bps

        return max((depth for depth in range(1, BLOCKS + 1) if task_seconds(depth) <= self.seconds), default=1)


@dataclass(frozen=True)
class Method:
    """What differs: who is waited for, how deep clients train and at which rate; `answers` are those in a version of the server."""

    schedule: Schedule
    answers: int
    depth: DepthRule
    rate: float
    hierarchy: Hierarchy | None = None


def planned(depth: int | None = None) -> Hierarchy:
    """Groups planned by what training earned, for a server that waits for none of them; at this depth, if it is given."""
    plan = JointPlan(LossRate(steps=STEPS), depth=depth, batch_tokens=TOKENS)
    return Hierarchy(NearIID(GROUPS), schedule=MEMBERS, plan=plan)


DEEPEST, EVERYBODY = FixedDepth(BLOCKS), Rounds(COHORT, over_selection=STARTED / COHORT)
BY_SCORE = JointPlan(BestRoundTime(GradientScore(2 * STEPS)), batch_tokens=TOKENS)
OURS = Method(Immediate(0.4, GROUPS, 6 * GROUPS, Polynomial(0.5)), MEMBERS.cohort_size, DEEPEST, 2e-3, planned())
METHODS: dict[str, Method] = {
    "fedit-over": Method(EVERYBODY, COHORT, FixedDepth(1), 4e-3),
    "fedbuff": Method(FedBuff(8, STARTED), 8, FixedDepth(1), 4e-3),
    "legend": Method(EVERYBODY, COHORT, DepthInTime(1.2), 2e-3),
    "hierfedlora": Method(
        Rounds(GROUPS, weigh=by_work),
        2 * COHORT,
        DEEPEST,
        2e-3,
        Hierarchy(NearIID(GROUPS), schedule=MEMBERS, plan=BY_SCORE),
    ),
    "ours": OURS,
    "ours-depth-1": replace(OURS, hierarchy=planned(1)),
    "ours-depth-4": replace(OURS, hierarchy=planned(4)),
    "ungrouped": Method(Immediate(0.4, STARTED, 6 * STARTED, Polynomial(0.5)), 1, FixedDepth(1), 4e-3),
}
"""`legend` and `hierfedlora` are reconstructions of these papers; `ours` waits for no group, `ungrouped` is ours without groups."""


def cell(method: Method, split: str, network: str, name: str, seed: int) -> Run:
    """One run. The server's depth is that of the deepest client, so that kept activations are of the same block in every run."""
    hierarchy = method.hierarchy and replace(
        method.hierarchy, link=Link() if network == "near" else None, inner_speedup=EDGES[network]
    )
    return Run(
        name=name.replace("/", "-"),
        model=str(smollm2()),
        data=TOPICS_TOLD,
        partition=ClientDirichlet(CLIENTS, SPLITS[split], TEXTS),
        aggregator=Averaged(FedIT()),
        schedule=method.schedule,
        plan=Plan(FixedRank(8), STEPS, method.depth),
        lora=LoRA(target_modules=MODULES),
        training=Training(learning_rate=method.rate, batch_size=BATCH, max_length=TOLD_LENGTH),
        world=DEVICES,
        hierarchy=hierarchy,
        limits=Limits(versions=UPLOADS // method.answers, evaluate_every=EVERY // method.answers),
        test_limit=TESTS,
        held_out=0.0,
        engine=ENGINE,
        generation=Generation(examples=0),
        seed=seed,
    )


PLACES = {f"{split}/{network}": (split, network) for split in SPLITS for network in EDGES}
CELLS = {
    f"{name}/{place}": partial(cell, method, *where, f"{name}/{place}")
    for place, where in PLACES.items()
    for name, method in METHODS.items()
    if method.hierarchy or where[1] == "far"
}


@dataclass
class WorkDone:
    """An observer that counts accepted answers by depth, and what was done by each scored version."""

    observation: RunObservation = field(default_factory=RunObservation)
    depths: Counter[int] = field(default_factory=Counter)
    steps: int = 0
    bytes_up: int = 0
    scored: list[tuple[int, int, int]] = field(default_factory=list)

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """As any observer."""
        for fact in self.observation.read(now, event, commands):
            match fact:
                case TaskAnswered(_, _, result, task, False) if task and result:
                    self.depths[task.budget.depth or BLOCKS] += 1
                    self.steps += result.steps
                    self.bytes_up += message_size.upload_size(task, result).total
                case Evaluate():
                    self.scored.append((self.depths.total(), self.steps, self.bytes_up))

    def figures(self) -> Line:
        """Tasks by depth; tasks, steps and bytes up until each scored version."""
        return {"depths": {str(depth): count for depth, count in sorted(self.depths.items())}, "work": self.scored}


def work_done(job: Job) -> WorkDone:
    """What looks on at a run."""
    return WorkDone()


def seconds(line: Line) -> float:
    """Virtual seconds to the target."""
    return until(line, times(line), TARGET)


def megabytes(line: Line) -> float:
    """Megabytes of answers until the target."""
    return until(line, [sent / 1e6 for *_, sent in line["work"]], TARGET)


def shortened(run: Run) -> Run:
    """One version of a server that waits, up to eight of one that does not; scored on a few texts."""
    return replace(run, limits=replace(run.limits, versions=min(8, run.limits.evaluate_every)), test_limit=32)


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method, split, network | seeds | virtual seconds to the target (range) | reached | MB up until then | mean test loss of "
        "the curve | loss at the end | accuracy at the end (range) | tasks by depth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(name: str, own: Sequence[Line]) -> str:
    took, ends, depths = [seconds(line) for line in own], [accuracy(line) for line in own], Counter[str]()
    for line in own:
        depths.update(line["depths"])
    hits = sum(reached(line, TARGET) is not None for line in own)
    columns = (
        name.replace("/", ", "),
        str(len(own)),
        f"{median(took):.0f} ({min(took):.0f}–{max(took):.0f})",
        f"{hits} of {len(own)}",
        f"{median(megabytes(line) for line in own):.1f}",
        f"{median(curve(line) for line in own):.3f}",
        f"{median(final(line) for line in own):.3f}",
        f"{median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
        ", ".join(f"{depth}: {count / depths.total():.0%}" for depth, count in sorted(depths.items())),
    )
    return f"| {' | '.join(columns)} |"


PLACE = "dir0.5/far"
"""Where the claims are judged."""
PAPER, SPEEDUP = "HierFedLoRA", 2.1
"""What the paper claims at least."""


def sooner(found: Sequence[Line], slow: str, fast: str) -> tuple[float, ...]:
    """How many times as soon `fast` is at the target as `slow`, as a logarithm, for each seed."""
    return paired(found, lambda line: log(seconds(line)), f"{slow}/{PLACE}", f"{fast}/{PLACE}")


def hardest(found: Sequence[Line], *names: str) -> str:
    """That of these methods with the lowest median time to the target."""
    took = {name: [seconds(line) for line in found if line["cell"] == f"{name}/{PLACE}"] for name in names}
    return min((name for name in names if took[name]), key=lambda name: median(took[name]), default=names[0])


def claims(found: Sequence[Line]) -> list[Claim]:
    """What the experiment is to decide, fixed before its runs."""
    fixed = hardest(found, "ours-depth-1", "ours-depth-4")
    where = "SmolLM2, news told, 80 devices, one distant server; time to the target loss"
    comparisons = (
        (
            "hierfedlora-speed",
            f"groups and a joint choice are {SPEEDUP} times as fast as FedIT",
            "fedit-over",
            "hierfedlora",
        ),
        ("hierfedlora-depth", "a depth planned for each group is faster than the best fixed one", fixed, "ours"),
        ("hierfedlora-groups", "groups are faster than the same rule without them", "ungrouped", "ours"),
        ("hierfedlora-asynchronous", "planned groups are faster than FedBuff with the same average", "fedbuff", "ours"),
    )
    speeds = [
        Claim(
            name,
            PAPER,
            says,
            f"{where}: {fast} against {slow}",
            sooner(found, slow, fast),
            "hierfedlora_llm",
            margin=log(SPEEDUP) if fast == "hierfedlora" else 0.0,
            times=True,
        )
        for name, says, slow, fast in comparisons
    ]
    ends = paired(found, accuracy, f"ours/{PLACE}", f"fedit-over/{PLACE}")
    done = f"{where.partition(';')[0]}; accuracy at the end: ours against fedit-over"
    return [
        *speeds,
        Claim(
            "hierfedlora-accuracy", PAPER, "planned groups end more accurate than FedIT", done, ends, "hierfedlora_llm"
        ),
    ]


USUAL = tuple(name for name in CELLS if name.endswith(PLACE))


def summary(found: Sequence[Line]) -> Line:
    """Nothing but the claims."""
    return {}


GRID = Grid(
    "hierfedlora_llm", CELLS, (0, 1, 2), 0.0, shortened, summary, USUAL, table=shown, probe=work_done, claims=claims
)

if __name__ == "__main__":
    main(GRID)
