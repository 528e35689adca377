"""The kept figures: their means, intervals and table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.leakage.cells import CELLS, Cell, allowed
from bench.leakage.scene import SITE_CLIP, Setting
from fedloom.audit.statistics import mean_of
from fedloom.core.mean_interval import half_width

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / "results" / "leakage.jsonl", ROOT / "docs" / "leakage.md"
BEGIN, END = "<!-- table: python -m bench.leakage --table -->", "<!-- end of table -->"

Line = dict[str, Any]

COLUMNS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "words": (
        ("ten surest guesses at rarer words: share right", "top_10", "prior_top_10"),
        (
            "ten surest guesses at words of no public text: share right",
            "never_public_top_10",
            "prior_never_public_top_10",
        ),
    ),
    "places": (("median place of the right token", "median_place", "chance"),),
    "rows": (
        ("planted text: AUC", "canary", "half"),
        ("ordinary row: AUC of the shift", "membership", "half"),
        ("ordinary row: AUC of LiRA", "membership_lira", "half"),
        ("planted text in one of five summed answers: AUC", "sum_canary", "half"),
        ("ordinary row in one of five summed answers: AUC, row by row", "sum_membership", "half"),
    ),
    "labels": (("correlation of the bias with the shares of labels", "correlation", "prior"),),
}
"""What a cell of each kind shows: in words, the figure, and what stands beside it as known without the answer."""


def kept_lines() -> list[Line]:
    """Return the kept lines of cells as they are defined now."""
    if not RESULTS.exists():
        return []
    lines = [json.loads(text) for text in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["cell"] in CELLS and CELLS[line["cell"]].facts == line["setting"]]


def values_of(lines: Sequence[Line], cell: str, figure: str) -> list[float]:
    """Return a figure of a cell, seed by seed; of several attacks that look for the same, the one that is best over all seeds."""
    own = [line["figures"] for line in lines if line["cell"] == cell]
    match figure:
        case "half":
            return [0.5] * len(own)
        case "chance":
            return [(one["vocabulary"] + 1) / 2 for one in own]
        case "canary" | "membership":
            names = [f"{figure}_shift", f"{figure}_margin"]
            return max(([one[name] for one in own] for name in names), key=mean_of)
    return [one[figure] for one in own if not math.isnan(one[figure])]


def worst(lines: Sequence[Line], kind: str, figure: str, largest: bool = True) -> float | None:
    """Return the mean of a figure in the ordinary cell of this kind where most is learnt (None: nothing is kept)."""
    found = [values_of(lines, name, figure) for name, cell in CELLS.items() if cell.kind == kind and cell.ordinary]
    means = [mean_of(values) for values in found if values]
    return round((max if largest else min)(means), 3) if means else None


def summary(lines: Sequence[Line]) -> dict[str, float | None]:
    """The figures of the last line: means over the seeds, at the default limits, at the setting that tells most."""
    return {
        "words_over_prior": worst(lines, "words", "over_prior"),
        "canary_auc": worst(lines, "rows", "canary"),
        "membership_shift": worst(lines, "rows", "membership"),
        "membership_lira": worst(lines, "rows", "membership_lira"),
        "median_place": worst(lines, "places", "median_place", largest=False),
        "label_correlation": worst(lines, "labels", "correlation"),
    }


def with_table(text: str, lines: Sequence[Line]) -> str:
    """The text of a page with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    return before + "\n".join([BEGIN, *table_lines(lines), END]) + rest.partition(END)[2]


def table_lines(lines: Sequence[Line]) -> Iterator[str]:
    """A line for each figure of each cell."""
    yield "| what is learnt | setting | allowed by default | seeds | with the answer | without |"
    yield "|" + "---|" * 6
    for kind, columns in COLUMNS.items():
        for words, figure, beside in columns:
            for name, cell in CELLS.items():
                values = values_of(lines, name, figure) if cell.kind == kind else []
                if values:
                    shown = (shown_mean(values), shown_number(mean_of(values_of(lines, name, beside))))
                    where = "yes" if allowed(cell.setting) else "no"
                    yield f"| {words} | {words_of(cell)} | {where} | {len(values)} | {' | '.join(shown)} |"


def shown_mean(values: Sequence[float]) -> str:
    """The mean, from three seeds on with its 95 % interval."""
    return shown_number(mean_of(values)) + (f" ± {shown_number(half_width(values))}" if len(values) > 2 else "")


def shown_number(number: float) -> str:
    """Two digits after the point, none from 10 on."""
    return f"{number:,.0f}" if abs(number) >= 10 else f"{number:.2f}"


def words_of(cell: Cell) -> str:
    """The setting of a cell in words."""
    own, usual = cell.setting, Setting()
    steps = f"{own.steps} step{'' if own.steps == 1 else 's'} of {own.batch}"
    parts = [f"rank {own.rank}, {own.rows} row{'' if own.rows == 1 else 's'}, {steps}"]
    if own.learning_rate != usual.learning_rate:
        parts.append(f"learning rate {own.learning_rate:g}")
    if own.clip != usual.clip:
        parts.append(f"clip {own.clip:g}")
    if own.length != usual.length:
        parts.append(f"texts of {own.length} tokens")
    if own.depth is not None:
        parts.append("top block alone" if own.depth == 1 else f"top {own.depth} blocks")
    if own.frozen:
        parts.append(f"frozen {', '.join(own.frozen)}")
    if not own.later:
        parts.append("a run's first task")
    if own.summed > 1:
        parts.append(f"sum of {own.summed} clients")
    if own.noise:
        parts.append(f"noise of {own.noise * SITE_CLIP:g} in each number")
    if cell.kind == "places":
        parts.append(f"seed {'known' if own.seed_known else 'unknown'}")
    return ", ".join(parts)
