"""What a federation's summaries say, before anything is trained: how uneven it is on each axis, and what that may do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fedloom.data.client_summary import LOSSES, Summary, middles
from fedloom.data.heterogeneity import Index, Unevenness, label_table
from fedloom.report import figures_clients, figures_heterogeneity
from fedloom.report.facts import label
from fedloom.report.numbers import NONE, count, plural
from fedloom.report.page import deliver, render
from fedloom.report.sections import Part, Section
from fedloom.report.tables import Grid

AXES = {"length": "lengths", "quality": "quality", "quantity": "sizes", "labels": "labels"}
EXPECTED = {
    "length": "CLLoRA reports that uneven lengths hardly touch local training and touch the global model more; small models are "
    "said to be more sensitive than large ones. Weights by examples and by tokens then differ: compare by_examples with by_tokens.",
    "quality": "CLLoRA reports that uneven quality hurts local training and the global model. No weighting here knows of quality: "
    "look at the texts of the clients that stand out.",
    "quantity": "Uneven amounts are said to act on the global model more than on local training. Weights by examples give large "
    "clients the say: compare by_examples with uniform.",
    "labels": "Not one of CLLoRA's axes. That averaging suffers from uneven labels is known since Hsu et al. 2019. Groups whose "
    "labels are like the whole (NearIID) soften it.",
}
HEDGE = """
The findings of CLLoRA (arXiv 2502.18910) are known in words, not in numbers, and hold for the models and texts of that paper: take
them for what to watch, not for a forecast."""
MEASURED = """
Lengths and labels: the mean Jensen-Shannon divergence (bits; 0 alike, at most 1) between a client and all clients together, lengths
over ten bins of equal weight. Quality: how far the clients' means lie from the mean of all, in standard deviations. Sizes: standard
deviation over mean. Chance is what the same texts give when they are dealt out at random, mean of 40 deals. Like
Dirichlet: the concentration of a Dirichlet draw that would be as uneven; the smaller, the more uneven."""
LENGTHS = """
Above, all texts; below, one row a client, darker where more of its texts are, with a stroke at its median. Rows that look alike are
even."""
QUALITY = """
As above, for what the examples or the model say of the quality of each text; scores compare only within one scale."""
HOLDINGS = "Above, how many examples each client holds; below, the mix of labels among them."
CLIENTS = 200
"""Rows of the table of clients, at most."""


def write(summaries: Sequence[Summary], found: Unevenness | None, name: str, notes: Sequence[str], out: Path) -> Path:
    """The page. `found` is None for a single client, `notes` say what was read and how."""
    told = [own for own in summaries if own.epsilon is not None]
    noise = [f"All counts carry noise (epsilon {told[0].epsilon:g} for each client's summary)."] if told else []
    kept = [Section(title, parts) for title, parts in _sections(summaries, found) if parts]
    text = render(
        title=label(name, 60),
        status="",
        sentence=sentence(summaries, found),
        warnings=[],
        notes=[*notes, *noise],
        figures=tuple(_tiles(summaries, found)),
        sections=kept,
        version=version("fedloom"),
    )
    return deliver(text, out)


def level(axis: str, index: Index) -> str:
    """In words: for quality by Cohen's sizes of effects, else by the Dirichlet draw that is as uneven."""
    if index.alpha == math.inf or (index.alpha is None and index.value <= index.chance[1]):
        return "even" if axis == "quantity" else "as even as chance"
    scale = (
        {0.8: "strongly", 0.5: "clearly", 0.2: "mildly"}
        if index.alpha is None
        else {-0.3: "strongly", -1.0: "clearly", -10.0: "mildly"}
    )
    size = index.value if index.alpha is None else -index.alpha
    return f"{next((word for least, word in scale.items() if size >= least), 'hardly')} uneven"


def indices(found: Unevenness) -> Iterator[tuple[str, Index]]:
    """The axes that were measured."""
    for axis in AXES:
        if (index := getattr(found, axis)) is not None:
            yield axis, index


def sentence(summaries: Sequence[Summary], found: Unevenness | None) -> str:
    """The answer in one sentence."""
    whole = f"{count(sum(own.examples for own in summaries))} examples"
    if found is None:
        return f"One client, {whole}: how uneven a federation is shows only where there are several."
    said = [f"{AXES[axis]} {level(axis, index)}" for axis, index in indices(found)]
    return f"{plural(len(summaries), 'client')}, {whole}: {', '.join(said)}."


def axes(found: Unevenness) -> Grid:
    """One row an axis."""
    head = ("Axis", "Unevenness", "By chance", "Like Dirichlet", "In words")
    rows = []
    for axis, index in indices(found):
        chance = f"{index.chance[0]:.3f}" if axis != "quantity" else NONE
        rows.append((AXES[axis].capitalize(), f"{index.value:.3f}", chance, _alpha(index), level(axis, index)))
    return Grid(head, tuple(rows))


def _alpha(index: Index) -> str:
    if index.alpha is None or index.alpha == math.inf:
        return NONE
    return "above 100" if index.alpha > 99 else "below 0.01" if index.alpha < 0.0101 else f"{index.alpha:.2g}"


def expected(found: Unevenness) -> list[tuple[str, str]]:
    """Of each axis that is uneven by more than a trace: that it is, and what to expect."""
    felt = [(axis, level(axis, index)) for axis, index in indices(found)]
    return [
        (f"{AXES[axis].capitalize()}: {how}.", EXPECTED[axis])
        for axis, how in felt
        if how.split()[0] in ("mildly", "clearly", "strongly")
    ]


def clients(summaries: Sequence[Summary], most: int = CLIENTS) -> Grid:
    """One row a client, largest first; of more than `most` the middle is left out."""
    order = sorted(summaries, key=lambda own: (-own.examples, own.client))
    cut = [*order[: most // 2], None, *order[len(order) - most // 2 :]] if len(order) > most else order
    head = ["Client", "Examples", f"Median {summaries[0].unit.split()[0]}"]
    has_labels, has_quality = any(own.labels for own in summaries), any(own.quality for own in summaries)
    head += [*(["Commonest labels"] if has_labels else []), *(["Mean quality"] if has_quality else [])]
    rows = []
    for own in cut:
        if own is None:
            rows.append(("…", f"{len(order) - most // 2 * 2} more", *[""] * (len(head) - 2)))
            continue
        row = [label(own.client), count(own.examples), count(own.median())]
        row += [_commonest(own)] if has_labels else []
        row += [f"{_mean_quality(own):.2f}"] if has_quality else []
        rows.append(tuple(row))
    return Grid(tuple(head), tuple(rows))


def _commonest(own: Summary) -> str:
    ranked = sorted((own.labels or {}).items(), key=lambda pair: (-pair[1], pair[0]))
    whole = sum(number for _, number in ranked) or 1.0
    return ", ".join(f"{label(name, 24)} {100 * number / whole:.0f} %" for name, number in ranked[:2] if number)


def _mean_quality(own: Summary) -> float:
    return -float(np.dot(own.quality, middles(LOSSES))) / (sum(own.quality) or 1.0) if own.quality else math.nan


def _tiles(summaries: Sequence[Summary], found: Unevenness | None) -> Iterator[tuple[str, str, str]]:
    sizes = sorted(own.examples for own in summaries)
    yield "Clients", count(len(summaries)), f"{count(sizes[0])} to {count(sizes[-1])} examples each"
    for axis, index in indices(found) if found else ():
        beside = f"{index.chance[0]:.3f} by chance; " if axis != "quantity" else ""
        yield AXES[axis].capitalize(), f"{index.value:.3f}", f"{beside}{level(axis, index)}"


def _sections(summaries: Sequence[Summary], found: Unevenness | None) -> Iterator[tuple[str, tuple[Part, ...]]]:
    if found is not None:
        likely = expected(found)
        none = Part("", "Nothing: on every axis the clients are about as even as chance makes them.")
        yield "How uneven", (Part(MEASURED, grid=axes(found)),)
        yield "What to expect", tuple(Part(text, how) for how, text in likely) + ((Part(HEDGE),) if likely else (none,))
    yield "Lengths", (Part(LENGTHS if len(summaries) > 1 else "", svg=figures_heterogeneity.lengths(summaries)),)
    if all(own.quality for own in summaries):
        yield "Quality", (Part(QUALITY, svg=figures_heterogeneity.qualities(summaries)),)
    table = label_table(summaries)
    if table is not None and len(summaries) > 1:
        names = sorted({name for own in summaries for name in own.labels or ()})
        held = {
            own.client: {"examples": own.examples, "labels": row}
            for own, row in zip(summaries, table.tolist(), strict=True)
        }
        yield (
            "Sizes and labels",
            (Part(HOLDINGS, svg=figures_clients.partition({"clients": held, "label_names": names})),),
        )
    some = f"The largest and the smallest of {len(summaries):,}." if len(summaries) > CLIENTS else ""
    yield "Clients", (Part(some, grid=clients(summaries)),)
