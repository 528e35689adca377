"""What the length and the quality of clients' contexts do to a real language model: contexts of 64 to 1,024 tokens, and what helps.

    python experiments/cllora_llm.py [--quick [--cell NAME]] [--summary] [--workers N] [--only PATTERN ...] [--seeds N]

CLLoRA's questions (Zhang et al. 2025, arXiv 2502.18910) with SmolLM2-135M-Instruct: questions about a passage, things to take out of
it and summaries of it (three kinds of Dolly-15k), whose contexts differ much in length and their answers little. LoRA of rank 8 on
the linear layers of the top block. 20 clients, 10 a round, as many local steps of as many texts for all, so that a client of long
texts trains on more tokens. Cells are AXIS[/ALPHA[/REMEDY]]. An effect is the difference to the run of the same seed whose clients
are alike (`iid`; for quality `damaged`, whose clients have the same damaged texts, evenly); at every seed both begin with the same
model and are measured on the same examples. The rate is from `cllora_llm_rates.py`, which also says whether anything is learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import product
from statistics import mean

from claims import Claim, paired
from grid import Grid, Line, main
from text_pools import OneDraw, Pool, Row, Splits, shuffled
from text_study import Study

from fedloom import (
    IID,
    Corrupted,
    Engine,
    FixedDepth,
    FixedRank,
    Generation,
    Instructions,
    Job,
    LengthDirichlet,
    Limits,
    LoRA,
    Plan,
    QualityDirichlet,
    Rounds,
    Run,
    Shuffled,
    Training,
    by_examples,
    by_tokens,
    ones,
    words,
)
from fedloom.core.mean_interval import half_width
from fedloom.data.partition import Partition
from fedloom.schedule.shared.weights import Weigh
from fedloom.train.demo_model import smollm2

CLIENTS, COHORT, ROUNDS, EVERY, STEPS, BATCH = 20, 10, 8, 2, 4, 4
RATE, LONGEST = 5e-4, 1024
KINDS = ("closed_qa", "information_extraction", "summarization")
BANDS = ((40, 110), (110, 180), (180, 300), (300, 680))
"""Words of request, context and answer, in four bands with as many rows each; 680 words are about 1,000 tokens."""
PARTS, ANSWERS = ("instruction", "context", "response"), (4, 80)
"""Columns of a row, and words of an answer."""
TRAIN, TEST, TUNING = 250, 50, 50
"""Rows of a band."""
COMMON, SINCE = 32, 4
"""Test examples on which clients' own models are scored, those of the tasks that begin from this version or a later scored one."""


@cache
def passages() -> Pool:
    """Requests about a passage, no two about the same one: as many of each band of lengths, always the same."""
    bands: dict[int, list[Row]] = {at: [] for at in range(len(BANDS))}
    seen = set[str]()
    for row in shuffled("dolly/clients.jsonl.gz"):
        size, answer = (sum(len(row[part].split()) for part in parts) for parts in (PARTS, PARTS[-1:]))
        band = next((at for at, (low, high) in enumerate(BANDS) if low <= size < high), None)
        fits = row["category"] in KINDS and ANSWERS[0] <= answer <= ANSWERS[1]
        if band is not None and fits and row["context"] not in seen:
            seen.add(row["context"])
            bands[band].append(row)

    def part(first: int, last: int) -> list[Row]:
        return [row for band in bands.values() for row in band[first:last]]

    return Pool(part(0, TRAIN), part(TRAIN, TRAIN + TEST), part(TRAIN + TEST, TRAIN + TEST + TUNING))


def passage_rows() -> Splits:
    """The rows of the experiment."""
    return {"train": passages().train, "test": passages().test}


def passage_tuning_rows() -> Splits:
    """The same training rows, scored on others that nobody trains on."""
    return {"train": passages().train, "test": passages().tuning}


def asked(rows: Callable[[], Splits]) -> Instructions:
    """Passages as requests with a context."""
    return Instructions(rows, context="context", answer="response", kind="category")


PASSAGES, PASSAGES_TUNING = asked(passage_rows), asked(passage_tuning_rows)


DAMAGED = OneDraw(
    Corrupted(Corrupted(PASSAGES, share=0.6, delete=0.0, shuffle=0.5), share=0.3, delete=0.0, shuffle=1.0, swap=0.5)
)
"""Three tenths of the contexts with half of their sentences out of order, three tenths with all, and half of these with another's
answer. Nothing is left out, so that the worse ones are not shorter too."""


@dataclass(frozen=True)
class Axis:
    """Clients that differ along an axis, by alpha, and the axis without any difference that they are compared with."""

    clients: Callable[[float], Partition]
    control: str = "iid"


def by_length(alpha: float) -> LengthDirichlet:
    """Clients who differ in the length of their texts, and hold as many words."""
    return LengthDirichlet(CLIENTS, alpha, equal=words)


AXES = {
    "length": Axis(by_length),
    "null": Axis(lambda alpha: Shuffled(by_length(alpha))),
    "quality": Axis(lambda alpha: QualityDirichlet(CLIENTS, alpha, equal=ones), "damaged"),
}
"""`null` has shuffled lengths: what it differs by is chance."""


@dataclass(frozen=True)
class Remedy:
    """How answers are weighed, and batches made."""

    weigh: Weigh = by_examples
    stratified: bool = False


PLAIN = Remedy()
REMEDIES = {"by-tokens": Remedy(by_tokens), "stratified": Remedy(stratified=True)}


def cell(axis: str, alpha: float, remedy: Remedy, seed: int, rate: float = RATE) -> Run:
    """One run."""
    control = AXES[axis].control if axis in AXES else axis
    return Run(
        name="cllora",
        model=str(smollm2()),
        data=DAMAGED if control == "damaged" else PASSAGES,
        partition=AXES[axis].clients(alpha) if axis in AXES else IID(CLIENTS),
        schedule=Rounds(COHORT, weigh=remedy.weigh),
        plan=Plan(FixedRank(8), STEPS, FixedDepth(1)),
        lora=LoRA(target_modules=r".*layers\.29\..*_proj"),
        training=Training(learning_rate=rate, batch_size=BATCH, max_length=LONGEST, stratified=remedy.stratified),
        limits=Limits(versions=ROUNDS, evaluate_every=EVERY),
        held_out=0.0,
        engine=Engine("onednn"),
        generation=Generation(examples=0),
        seed=seed,
    )


def cells() -> dict[str, partial[Run]]:
    """The whole grid by name."""
    made = {axis: partial(cell, axis, 0.0, PLAIN) for axis in ("iid", "damaged")}
    for axis, alpha in product(AXES, (0.1, 1.0)):
        place = f"{axis}/{alpha:g}"
        made[place] = partial(cell, axis, alpha, PLAIN)
        if axis == "length":
            made |= {f"{place}/{name}": partial(cell, axis, alpha, remedy) for name, remedy in REMEDIES.items()}
    return made


def look(job: Job) -> Study:
    """What looks on at a run."""
    return Study.of(job, common=COMMON, since=SINCE)


def compared_with(name: str) -> str | None:
    """The cell that one is compared with: a remedy with the same clients without it, these with clients who are alike."""
    axis, *rest = name.split("/")
    if not rest:
        return None
    return f"{axis}/{rest[0]}" if rest[1:] else AXES[axis].control


def trained(line: Line, since: int = 1) -> list[Line]:
    """The scored versions from this one on."""
    return [one for one in line["rounds"] if one["version"] >= since]


FIGURES: dict[str, Callable[[Line], float]] = {
    "loss over the curve": lambda line: mean(one["loss"] for one in trained(line)),
    "loss at the end": lambda line: float(line["rounds"][-1]["loss"]),
    "longest quarter": lambda line: mean(one["bin_losses"][-1] for one in trained(line)),
    "shortest quarter": lambda line: mean(one["bin_losses"][0] for one in trained(line)),
    "clients' own models": lambda line: mean(one["local_loss"] for one in trained(line, SINCE) if one["local_loss"]),
}
"""Mean cross-entropy of an answer's token: of the global model on all test examples, on the quarters of the longest and of the
shortest, and of clients' models after their tasks, each on the same common examples."""


def shortened(run: Run) -> Run:
    """The first round, scored on a few texts."""
    return replace(run, limits=replace(run.limits, versions=1), test_limit=16)


def shown(found: Sequence[Line], names: Iterable[str], _: float) -> str:
    """A Markdown table: a row a cell, each figure as the mean difference to what it is compared with."""
    rows = [
        f"| clients | compared with | seeds | unevenness: length, quality | {' | '.join(FIGURES)} |",
        f"|---|---|---|---|{'---|' * len(FIGURES)}",
    ]
    rows += [_row(found, name, own) for name in names if (own := [line for line in found if line["cell"] == name])]
    return "\n".join(rows)


def _row(found: Sequence[Line], name: str, own: Sequence[Line]) -> str:
    other = compared_with(name)
    indices = [[line["uneven"].get(axis) for line in own] for axis in ("length", "quality")]
    columns = (
        name.replace("/", ", "),
        (other or "–").replace("/", ", "),
        str(len(own)),
        ", ".join("–" if None in index else f"{mean(index):.2f}" for index in indices),
        *(_effect(found, name, other, figure) for figure in FIGURES),
    )
    return f"| {' | '.join(columns)} |"


def _effect(found: Sequence[Line], name: str, other: str | None, figure: str) -> str:
    if other is None:
        return f"({mean(FIGURES[figure](line) for line in found if line['cell'] == name):.3f})"
    values = paired(found, FIGURES[figure], name, other)
    around = half_width(values) if len(values) > 1 else None
    about = f" [{mean(values) - around:+.3f}, {mean(values) + around:+.3f}]" if around is not None else ""
    return f"{mean(values):+.3f}{about}" if values else "–"


CELLS = cells()
USUAL = ("iid", "damaged", "length/0.1", "null/0.1", "quality/0.1", "length/0.1/stratified")


MARGIN = 0.02
"""A loss that is higher by less than this counts as no harm; fixed before the runs."""
PAPER, CURVE, OWN = "CLLoRA", "loss over the curve", "clients' own models"


def claims(found: Sequence[Line]) -> list[Claim]:
    """What the experiment is to decide, fixed before its runs."""
    comparisons = (
        ("cllora-length-global", "uneven length does no harm to the global model", "length/0.1", CURVE, MARGIN, True),
        ("cllora-length-local", "uneven length does no harm to clients' own models", "length/0.1", OWN, MARGIN, True),
        ("cllora-quality-local", "uneven quality harms clients' own models", "quality/0.1", OWN, 0.0, False),
        ("cllora-quality-global", "uneven quality harms the global model", "quality/0.1", CURVE, 0.0, False),
        (
            "cllora-remedy",
            "batches of all lengths help against uneven length",
            "length/0.1/stratified",
            CURVE,
            0.0,
            True,
        ),
    )
    return [
        Claim(
            name,
            PAPER,
            says,
            f"SmolLM2, contexts of up to {LONGEST:,} tokens; {figure}: {cell} against {compared_with(cell)}",
            paired(found, FIGURES[figure], cell, compared_with(cell) or ""),
            "cllora_llm",
            margin,
            below,
            unit="nats",
        )
        for name, says, cell, figure, margin, below in comparisons
    ]


def summary(found: Sequence[Line]) -> Line:
    """Nothing but the claims."""
    return {}


GRID = Grid("cllora_llm", CELLS, (0, 1, 2), 0.0, shortened, summary, USUAL, table=shown, probe=look, claims=claims)

if __name__ == "__main__":
    main(GRID)
