"""What the clients' texts do to local training and to the global model, and what helps: CLLoRA's questions, with effect sizes.

    python experiments/cllora.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

20 clients, 10 a round, LoRA of rank 8, as many local steps for all. Cells are TEXTS/AXIS[/ALPHA[/REMEDY]]. An effect is the
difference in points to the run of the same seed whose clients are alike (`iid`; for quality `damaged`, whose clients have the same
damaged texts, evenly); at every seed both begin with the same model and are measured on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from statistics import mean

from cut import cut
from generation_data import MODEL, Row, federation_rows, natural_instructions
from grid import Grid, Line, interval, main, start
from hierfedlora_80 import AGNEWS, SST2, TINY
from text_study import Study

from fedloom import (
    IID,
    ByQuality,
    Corrupted,
    FedIT,
    FixedRank,
    Half,
    Instructions,
    Job,
    LengthDirichlet,
    Limits,
    LoRA,
    Plan,
    ProductDelta,
    QualityDirichlet,
    QuantityDirichlet,
    Rounds,
    Run,
    Shuffled,
    Training,
    by_examples,
    by_text,
    by_tokens,
    ones,
    uniform,
    words,
)
from fedloom.core.policies import Aggregator
from fedloom.data.examples import Source
from fedloom.data.partition import Partition
from fedloom.schedule.shared.weights import Weigh
from fedloom.train.settings import Generation

CLIENTS, COHORT, LAST = 20, 10, 4
"""A run's figures are means over its `LAST` scored versions: a single one is noisier."""

WHERE = {"global": "accuracy", "local": "local"}
FIGURES = ("accuracy", "worst", "local", "own", "gain")


@dataclass(frozen=True)
class Texts:
    """A data set with a model, made when it is first asked for, and how it is trained."""

    data: Source
    model: Callable[[], str]
    modules: str
    length: int
    rate: float
    steps: int = 10
    rounds: int = 12
    every: int = 2
    batch: int = 16
    tested: int | None = None

    @property
    def generation(self) -> Generation | None:
        """What is written at the end: nothing."""
        return Generation(examples=0) if isinstance(self.data, Instructions) else None

    @property
    def damaged(self) -> Corrupted:
        """Three tenths of the texts with half of their sentences out of order, three tenths with all, and half of these labels wrong.

        Nothing is left out of a text, so that the worse ones are not shorter too.
        """
        worse = Corrupted(self.data, share=0.6, delete=0.0, shuffle=0.5)
        return Corrupted(worse, share=0.3, delete=0.0, shuffle=1.0, swap=0.5)


def top(layer: int) -> str:
    """The modules of one layer of a BERT: where it is the last, what lies below is computed once a text and kept."""
    return rf".*layer\.{layer}\..*(query|value|dense)"


SHORT = 45


def short_rows() -> list[Row]:
    """Instructions of at most `SHORT` words with context and answer, the shorter half: so that few are cut."""
    return [
        row for row in federation_rows() if len(f"{row['instruction']} {row['input']} {row['output']}".split()) <= SHORT
    ]


SENTENCES = replace(SST2, limit=4000)
TEXTS = {
    "agnews": Texts(AGNEWS, lambda: TINY, top(1), 121, 5e-3, tested=2000),
    "instructions": Texts(
        replace(natural_instructions(short_rows), limit=800),
        lambda: str(MODEL),
        r".*layers\.5\..*_proj",
        256,
        2e-2,
        steps=5,
        rounds=6,
        batch=8,
        tested=150,
    ),
    "sst2": Texts(SENTENCES, partial(cut, 6), top(5), 44, 5e-3, rounds=20),
    "sst2-4": Texts(SENTENCES, partial(cut, 4), top(3), 44, 5e-3, rounds=20),
    "sst2-2": Texts(SENTENCES, partial(cut, 2), top(1), 44, 5e-3, rounds=20),
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
    "length-n": Axis(partial(_length, equal=ones)),
    "quality": Axis(lambda alpha: QualityDirichlet(CLIENTS, alpha, equal=ones), "damaged"),
    "quantity": Axis(lambda alpha: QuantityDirichlet(CLIENTS, alpha)),
    "null": Axis(lambda alpha: Shuffled(_length(alpha))),
}
"""`length` holds the words of a client equal (mode L-tok), `length-n` its examples (L-n); `null` has shuffled lengths."""


@dataclass(frozen=True)
class Remedy:
    """How answers are weighed and added, and batches are made."""

    weigh: Weigh = by_examples
    stratified: bool = False
    aggregator: Aggregator = field(default_factory=FedIT)


PLAIN = Remedy()
REMEDIES = {
    "uniform": Remedy(uniform),
    "by_tokens": Remedy(by_tokens),
    "by_text": Remedy(by_text),
    "by_quality": Remedy(ByQuality()),
    "stratified": Remedy(stratified=True),
    "products": Remedy(aggregator=ProductDelta()),
}


def cell(texts: Texts, axis: str, alpha: float, remedy: Remedy, seed: int) -> Run:
    """One run."""
    partition = AXES[axis].clients(alpha) if axis in AXES else IID(CLIENTS)
    control = AXES[axis].control if axis in AXES else axis
    training = Training(
        learning_rate=texts.rate,
        batch_size=texts.batch,
        max_length=texts.length,
        keep_moments=False,
        stratified=remedy.stratified,
    )
    return Run(
        name="cllora",
        model=texts.model(),
        data=texts.damaged if control == "damaged" else texts.data,
        partition=partition,
        aggregator=remedy.aggregator,
        schedule=Rounds(COHORT, weigh=remedy.weigh),
        plan=Plan(FixedRank(8), texts.steps),
        lora=LoRA(target_modules=texts.modules, dropout=0.0),
        training=training,
        limits=Limits(versions=texts.rounds, evaluate_every=texts.every),
        held_out=0.1,
        test_limit=texts.tested,
        generation=texts.generation,
        transfer=Half(),
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


def look(job: Job) -> Study:
    """What looks on at a run."""
    return Study.of(job, common=min(300, len(job.tested) // 3))


def at_the_end(line: Line, name: str) -> float | None:
    """The mean of this figure over the last `LAST` versions that have one, in percent."""
    known = [one[name] if name != "worst" else min(one["bins"]) for one in line["rounds"]]
    last = [value for value in known if value is not None][-LAST:]
    return 100 * mean(last) if last else None


def compared_with(name: str) -> str | None:
    """The cell that one is compared with: a remedy with the same clients without it, these with clients who are alike."""
    texts, axis, *rest = name.split("/")
    if not rest:
        return None
    return "/".join((texts, axis, rest[0])) if rest[1:] else f"{texts}/{AXES[axis].control}"


def differences(found: Sequence[Line], one: str, other: str, name: str) -> list[float]:
    """Points by which this figure is higher in `one` than in `other`, seed by seed."""
    by = {(line["cell"], line["seed"]): at_the_end(line, name) for line in found}
    pairs = [(by.get((one, seed)), by.get((other, seed))) for seed in GRID.seeds]
    return [a - b for a, b in pairs if a is not None and b is not None]


def summary(found: Sequence[Line]) -> Line:
    """The effects of the axes at alpha 0.1, and of shuffled lengths."""
    effects = []
    for texts in TEXTS:
        for axis, (where, figure) in product(("length", "quality", "quantity"), WHERE.items()):
            points = differences(found, f"{texts}/{axis}/0.1", f"{texts}/{AXES[axis].control}", figure)
            if len(points) > 1:
                about = {"texts": texts, "axis": axis, "where": where, "effect_points": round(mean(points), 2)}
                effects.append(about | {"interval": interval(points), "seeds": len(points)})
    first = next(iter(TEXTS))
    return {
        "effects": effects,
        "null_interval": interval(differences(found, f"{first}/null/0.1", f"{first}/iid", "accuracy")),
    }


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, each figure as the mean difference to what it is compared with."""
    rows = [
        "| clients | compared with | seeds | unevenness: length, quality, amount | accuracy | global effect | worst bin "
        "| local effect | own texts | gain of training |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        if own := [line for line in found if line["cell"] == name]:
            rows.append(_row(found, name, own))
    return "\n".join(rows)


def _row(found: Sequence[Line], name: str, own: Sequence[Line]) -> str:
    other = compared_with(name)
    indices = [[line["uneven"].get(axis) for line in own] for axis in ("length", "quality", "quantity")]
    uneven = ", ".join("–" if None in index else f"{mean(index):.2f}" for index in indices)
    level = mean(at_the_end(line, "accuracy") or 0.0 for line in own)
    effects = [
        _points_text(differences(found, name, other, figure)) if other else _level(own, figure) for figure in FIGURES
    ]
    columns = (
        name.replace("/", ", "),
        (other or "–").replace("/", ", "),
        str(len(own)),
        uneven,
        f"{level:.1f} %",
        *effects,
    )
    return f"| {' | '.join(columns)} |"


def _level(own: Sequence[Line], figure: str) -> str:
    known = [value for line in own if (value := at_the_end(line, figure)) is not None]
    return f"({mean(known):.1f})" if known else "–"


def _points_text(points: Sequence[float]) -> str:
    if not points:
        return "–"
    around = interval(points)
    return f"{mean(points):+.1f}" + (f" [{around[0]:+.1f}, {around[1]:+.1f}]" if around else "")


CELLS = cells()
GRID = Grid("cllora", CELLS, (0, 1, 2, 3, 4, 5, 6, 7), 0.0, start, summary, table=shown, probe=look)

if __name__ == "__main__":
    main(GRID)
