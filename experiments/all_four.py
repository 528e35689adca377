"""All four at once, on a language model: no waiting, planned groups, ranks added exactly, texts that differ in three ways.

    python experiments/all_four.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

The devices, the model and the clock of `hierfedlora_llm.py` (80 devices, SmolLM2-135M, one distant server). Every client's texts
differ in topic, length and quality from the others' (CLLoRA's axes; a fifth of the words of half of the texts are gone, and a tenth
of these have a wrong answer). Devices have ranks 2, 4 and 8 by class, or 8 where ranks are not what a method is about. Each method
alone, in pairs, all together, and baselines that wait for nobody either; every one publishes a running average of its versions.
Rates and the target are from `all_four_rates.py`. The first figure is virtual time to the target loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log
from statistics import median

from claims import Claim, paired
from grid import Grid, Line, main
from hierfedlora_llm import (
    BY_SCORE,
    CLIENTS,
    COHORT,
    EVERY,
    EVERYBODY,
    GROUPS,
    MEMBERS,
    STARTED,
    UPLOADS,
    Method,
    planned,
    shortened,
    work_done,
)
from hierfedlora_llm import cell as alone
from loss_targets import accuracy, curve, final, reached, times, until
from text_pools import TOPICS_DAMAGED

from fedloom import (
    Averaged,
    FedBuff,
    FedFa,
    FedIT,
    FixedDepth,
    FixedRank,
    Hierarchy,
    Immediate,
    Limits,
    Mixture,
    NearIID,
    Polynomial,
    ProductDelta,
    Rounds,
    Run,
    Skew,
    by_examples,
    by_tokens,
    by_work,
)
from fedloom.core.policies import Fleet
from fedloom.core.types import Profile
from fedloom.data.text_measures import labels, ones, quality, words

AXES = Mixture(CLIENTS, (Skew(labels, 0.5, None), Skew(words, 0.5, 5), Skew(quality, 0.5, 5)), equal=ones)
ACROSS = FedFa(GROUPS // 2, GROUPS, weigh=by_work)
AT_ONCE, FLAT = (Immediate(0.4, count, 6 * count, Polynomial(0.5)) for count in (GROUPS, STARTED))
BY_PLAN = Hierarchy(NearIID(GROUPS), schedule=MEMBERS, plan=BY_SCORE)
TOP, TOP_FOUR = FixedDepth(1), FixedDepth(4)


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
class Combination:
    """Which of the four a run has besides its schedule, depth and groups, and its rate.

    `ranks`: ranks by class, added exactly; `stratified`: texts of all lengths in each batch, where answers are not weighed.
    """

    method: Method
    ranks: bool = False
    stratified: bool = False


def flat(schedule: object, answers: int, rate: float, **more: bool) -> Combination:
    """Without groups, depth 1."""
    return Combination(Method(schedule, answers, TOP, rate), **more)  # type: ignore[arg-type]


METHODS = {
    "fedit": flat(Rounds(COHORT, weigh=by_examples), COHORT, 4e-3),
    "fedit-over": flat(EVERYBODY, COHORT, 4e-3),
    "fedbuff": flat(FedBuff(8, STARTED), 8, 4e-3),
    "hlora": flat(EVERYBODY, COHORT, 4e-3, ranks=True),
    "fedfa": flat(FedFa(16, STARTED), 1, 4e-3),
    "cllora": flat(replace(EVERYBODY, weigh=by_tokens), COHORT, 4e-3),
    "hierfedlora": Combination(Method(Rounds(GROUPS, weigh=by_work), 2 * COHORT, TOP_FOUR, 2e-3, BY_PLAN)),
    "hlora+fedfa": flat(FedFa(16, STARTED), 1, 4e-3, ranks=True),
    "fedfa+groups": Combination(Method(ACROSS, 2, TOP_FOUR, 2e-3, BY_PLAN)),
    "all-four": Combination(Method(replace(ACROSS, weigh=by_tokens), 2, TOP_FOUR, 2e-3, BY_PLAN), ranks=True),
    "ours": Combination(Method(AT_ONCE, 2, TOP_FOUR, 2e-3, planned()), ranks=True, stratified=True),
    "ours-ungrouped": flat(FLAT, 1, 4e-3, ranks=True, stratified=True),
}
"""`all-four` is the four papers together, `ours` our own way to do them; the rest is one or two of them, or none."""
TARGET = 0.45
"""Test loss that is to be reached, fixed by `all_four_rates.py`."""
NOT_WAITING = ("fedbuff", "fedfa", "ours-ungrouped")
"""Baselines without groups that wait for nobody."""


def cell(name: str, seed: int, rate: float | None = None) -> Run:
    """One run, at its own rate if no other is given."""
    what = METHODS[name]
    method = what.method if rate is None else replace(what.method, rate=rate)
    run = alone(method, "dir0.5", "far", name, seed)
    rounds = Limits(versions=UPLOADS // method.answers, evaluate_every=EVERY // method.answers)
    return replace(
        run,
        data=TOPICS_DAMAGED,
        partition=AXES,
        aggregator=Averaged(ProductDelta() if what.ranks else FedIT()),
        plan=replace(run.plan, rank=RankOfClass() if what.ranks else FixedRank(8)),
        training=replace(run.training, stratified=what.stratified),
        limits=rounds,
    )


CELLS = {name: partial(cell, name) for name in METHODS}


def seconds(line: Line) -> float:
    """Virtual seconds to the target; those of the whole run where it never got there, which are too few."""
    return until(line, times(line), TARGET)


def megabytes(line: Line) -> float:
    """Megabytes of answers until the target."""
    return until(line, [sent / 1e6 for *_, sent in line["work"]], TARGET)


def hardest(found: Sequence[Line]) -> str:
    """The flat baseline that waits for nobody with the lowest median time to the target."""
    took = {name: [seconds(line) for line in found if line["cell"] == name] for name in NOT_WAITING}
    return min(
        (name for name in NOT_WAITING if took[name]), key=lambda name: median(took[name]), default=NOT_WAITING[0]
    )


PAPER, WHERE, WANTED, POINTS = "all four", "SmolLM2, 80 devices, texts that differ in three ways", 5.0, 1.0


def claims(found: Sequence[Line]) -> list[Claim]:
    """What the experiment is to decide, fixed before its runs."""
    best = hardest(found)

    def faster(name: str, says: str, slow: str, fast: str, least: float = 1.0) -> Claim:
        values = paired(found, lambda line: log(seconds(line)), slow, fast)
        done = f"{WHERE}; time to the target loss: {fast} against {slow}"
        return Claim(f"all-four-{name}", PAPER, says, done, values, "all_four", margin=log(least), times=True)

    flat_one = "the best flat baseline that waits for nobody"
    ends = paired(found, accuracy, "ours", "fedit")
    says = f"all at once, our way, ends no more than {POINTS:g} point below FedIT"
    return [
        faster(
            "asynchronous", f"all at once, our way, is {WANTED:g} times as fast as {flat_one}", best, "ours", WANTED
        ),
        faster("fedit", f"all at once, our way, is {WANTED:g} times as fast as FedIT", "fedit", "ours", WANTED),
        faster("papers", f"the four papers together are faster than {flat_one}", best, "all-four"),
        faster("single", "the four papers together are faster than HierFedLoRA alone", "hierfedlora", "all-four"),
        Claim("all-four-end", PAPER, says, f"{WHERE}; accuracy at the end", ends, "all_four", -POINTS),
    ]


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, medians over seeds."""
    rows = [
        "| method | seeds | virtual seconds to the target (range) | reached | MB up until then | mean test loss of the curve "
        "| loss at the end | accuracy at the end (range) | virtual seconds in all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows += [_row(name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(name: str, own: Sequence[Line]) -> str:
    took, ends = [seconds(line) for line in own], [accuracy(line) for line in own]
    columns = (
        name,
        str(len(own)),
        f"{median(took):.0f} ({min(took):.0f}–{max(took):.0f})",
        f"{sum(reached(line, TARGET) is not None for line in own)} of {len(own)}",
        f"{median(megabytes(line) for line in own):.1f}",
        f"{median(curve(line) for line in own):.3f}",
        f"{median(final(line) for line in own):.3f}",
        f"{median(ends):.1f} % ({min(ends):.1f}–{max(ends):.1f})",
        f"{median(line['virtual_seconds'] for line in own):,.0f}",
    )
    return f"| {' | '.join(columns)} |"


def summary(found: Sequence[Line]) -> Line:
    """Nothing but the claims."""
    return {}


GRID = Grid("all_four", CELLS, (0, 1, 2), 0.0, shortened, summary, table=shown, probe=work_done, claims=claims)

if __name__ == "__main__":
    main(GRID)
