"""What the clients' texts do to local training and to the global model, and what helps: CLLoRA's questions, with effect sizes.

    python experiments/cllora.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

20 clients, 10 a round, LoRA of rank 8, as many local steps for all. Cells are TEXTS/AXIS[/ALPHA[/REMEDY]]. An effect is the
difference in points to the run of the same seed whose clients are alike (`iid`; for quality `damaged`, whose clients have the same
damaged texts, evenly); at every seed both begin with the same model and are measured on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean

from cut import cut
from fedfa_speed import SST2
from grid import Grid, Line, interval, main, start

from fedloom import (
    IID,
    ByQuality,
    Corrupted,
    FedIT,
    FixedRank,
    Job,
    LengthDirichlet,
    Limits,
    LoRA,
    Plan,
    QualityDirichlet,
    QuantityDirichlet,
    Rounds,
    Run,
    Shuffled,
    Study,
    Training,
    by_examples,
    by_text,
    by_tokens,

    uniform,
    words,
)
from fedloom.data.context import samples
from fedloom.data.examples import Source
from fedloom.data.partition import Partition
from fedloom.schedule.weights import Weigh
from fedloom.summary import summarise
from fedloom.types import Command, Event
from fedloom.uneven import unevenness

CLIENTS, COHORT, LAST = 20, 10, 4
"""A run's figures are means over its `LAST` scored versions: a single one is noisier."""


@dataclass(frozen=True)
class Texts:
    """A data set with a model, and how it is trained; `rate` is the best of a few on the tuning seed."""

    data: Source
    model: str
    modules: str
    length: int
    rate: float
    steps: int = 10
    rounds: int = 14
    every: int = 2

    @property
    def damaged(self) -> Corrupted:
        """Three tenths of the texts damaged a little, three tenths badly and with half of their labels (answers) wrong."""
        return Corrupted(Corrupted(self.data, share=0.6, delete=0.3), share=0.3, delete=0.5, swap=0.5)


def top(layer: int) -> str:
    """The modules of one layer of a BERT: where it is the last, what lies below is computed once a text and kept."""
    return rf".*layer\.{layer}\..*(query|value|dense)"


SENTENCES = replace(SST2, limit=4000)
TEXTS = {
    "sst2": Texts(SENTENCES, cut(6), top(5), 44, 2e-3),
    "sst2-4": Texts(SENTENCES, cut(4), top(3), 44, 2e-3),
    "sst2-2": Texts(SENTENCES, cut(2), top(1), 44, 2e-3),
}
ALPHAS = (0.1, 0.5, 1.0, 10.0)


@dataclass(frozen=True)
class Axis:
    """Clients that differ along an axis, by alpha, and the axis without any difference that they are compared with."""

    clients: Callable[[float], Partition]
    control: str = "iid"


def _length(alpha: float, equal: Callable[..., Sequence[float]] = words) -> LengthDirichlet:
    return LengthDirichlet(CLIENTS, alpha, equal=equal)


AXES = {
    "length": Axis(_length),
    "length-n": Axis(partial(_length, equal=samples)),
    "quality": Axis(lambda alpha: QualityDirichlet(CLIENTS, alpha, equal=samples), "damaged"),
    "quantity": Axis(lambda alpha: QuantityDirichlet(CLIENTS, alpha)),
    "null": Axis(lambda alpha: Shuffled(_length(alpha))),
}
"""`length` holds the words of a client equal (mode L-tok), `length-n` its examples (L-n); `null` has shuffled lengths."""


@dataclass(frozen=True)
class Remedy:
    """How answers are weighed and batches are made."""

    weigh: Weigh = by_examples
    stratified: bool = False


PLAIN = Remedy()
REMEDIES = {
    "uniform": Remedy(uniform),
    "by_tokens": Remedy(by_tokens),
    "by_text": Remedy(by_text),
    "by_quality": Remedy(ByQuality()),
    "stratified": Remedy(stratified=True),
}


def cell(texts: Texts, axis: str, alpha: float, remedy: Remedy, seed: int) -> Run:
    """One run."""
    partition = AXES[axis].clients(alpha) if axis in AXES else IID(CLIENTS)
    worse = "damaged" in (axis, axis in AXES and AXES[axis].control)
    training = Training(
        learning_rate=texts.rate, max_length=texts.length, keep_moments=False, stratified=remedy.stratified
    )
    return Run(
        name="cllora",
        model=texts.model,
        data=texts.damaged if worse else texts.data,
        partition=partition,
        aggregator=FedIT(),
        schedule=Rounds(COHORT, weigh=remedy.weigh),
        plan=Plan(FixedRank(8), texts.steps),
        lora=LoRA(target_modules=texts.modules, dropout=0.0),
        training=training,
        limits=Limits(versions=texts.rounds, evaluate_every=texts.every),
        held_out=0.1,
        seed=seed,
    )


def cells() -> dict[str, partial[Run]]:
    """The whole grid by name."""
    made: dict[str, partial[Run]] = {}
    for name, texts in TEXTS.items():
        for axis in ("iid", "damaged"):
            made[f"{name}/{axis}"] = partial(cell, texts, axis, 0.0, PLAIN)
        for axis in AXES:
            for alpha in ALPHAS:
                place = f"{name}/{axis}/{alpha:g}"
                made[place] = partial(cell, texts, axis, alpha, PLAIN)
                made |= {f"{place}/{how}": partial(cell, texts, axis, alpha, r) for how, r in REMEDIES.items()}
    return made


@dataclass(frozen=True)
class Look:
    """A study of the run, with how uneven its clients really are."""

    job: Job
    study: Study = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "study", Study.of(self.job, common=300))

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """As the study does."""
        self.study(now, event, commands)

    def figures(self) -> Line:
        """Of all rounds, and the indices of unevenness."""
        train = self.job.split.train
        found = unevenness([summarise(shard.client, train.take(shard.train)) for shard in self.job.shards])
        told = {name: one and round(one.value, 4) for name, one in asdict(found).items()} if False else {
            "length": round(found.length.value, 4),
            "quantity": round(found.quantity.value, 4),
            "quality": found.quality and round(found.quality.value, 4),
        }
        return {"rounds": [asdict(one) for one in self.study.rounds()], "uneven": told}


def probe(job: Job) -> Look:
    return Look(job)


if __name__ == "__main__":
    import sys, time, statistics
    from grid import carry_out
    c = cells()
    for name, rate in [a.split("@") for a in sys.argv[1:]]:
        t=time.process_time(); w=time.time()
        run = c[name](100); run = replace(run, training=replace(run.training, learning_rate=float(rate)))
        line = carry_out(name, 100, run, probe)
        print(name, rate, "cpu %.1f wall %.1f" % (time.process_time()-t, time.time()-w), line["uneven"], flush=True)
        for r in line["rounds"]: print("  ", r["version"], *(f"{x:.3f}" if x is not None else "-" for x in (r["accuracy"], r["local"], r["own"], r["gain"], *r["bins"])), flush=True)
