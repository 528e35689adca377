"""The page about a federation's texts before anything is trained: how uneven they are on each axis, and what that may do.

It is made from the summaries of clients, for `fedloom inspect`; a report of a run does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fedloom.data.client_summary import LOSSES, Summary, bin_middles
from fedloom.data.heterogeneity import Heterogeneity, HeterogeneityIndex, label_table
from fedloom.report import figures_clients
from fedloom.report.facts import label
from fedloom.report.numbers import NONE, format_count, plural
from fedloom.report.page import Page, render_page, write_page
from fedloom.report.sections import PageBlock, Section
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
Above, all texts; below, one row per client, stronger where more of its texts are; a stroke is its median. Rows that look alike are
even."""
QUALITY = """
As above, for what the examples or the model say of the quality of each text; scores compare only within one scale."""
HOLDINGS = "Above, how many examples each client holds; below, the mix of labels among them."
CLIENTS = 200
"""Rows of the table of clients, at most."""


def write_heterogeneity_report(
    summaries: Sequence[Summary], indices: Heterogeneity | None, name: str, notes: Sequence[str], out: Path
) -> Path:
    """Write the page to `out`. `indices` is None for a single client, `notes` are what was read and how."""
    private = [summary for summary in summaries if summary.epsilon is not None]
    noise = [f"All counts carry noise (epsilon {private[0].epsilon:g} for each client's summary)."] if private else []
    page = Page(
        title=label(name, 60),
        sentence=heterogeneity_sentence(summaries, indices),
        sections=[Section(title, blocks) for title, blocks in _sections(summaries, indices) if blocks],
        version=version("fedloom"),
        notes=[*notes, *noise],
        figures=tuple(_tiles(summaries, indices)),
    )
    return write_page(render_page(page), out)


def describe_level(axis: str, index: HeterogeneityIndex) -> str:
    """Describe an index in words: for quality by Cohen's sizes of effects, else by the Dirichlet draw that is as uneven."""
    if index.alpha == math.inf or (index.alpha is None and index.value <= index.chance[1]):
        return "even" if axis == "quantity" else "as even as chance"
    scale = (
        {0.8: "strongly", 0.5: "clearly", 0.2: "mildly"}
        if index.alpha is None
        else {-0.3: "strongly", -1.0: "clearly", -10.0: "mildly"}
    )
    size = index.value if index.alpha is None else -index.alpha
    return f"{next((word for least, word in scale.items() if size >= least), 'hardly')} uneven"


def measured_axes(indices: Heterogeneity) -> Iterator[tuple[str, HeterogeneityIndex]]:
    """Yield each axis that was measured, with its index."""
    for axis in AXES:
        if (index := getattr(indices, axis)) is not None:
            yield axis, index


def heterogeneity_sentence(summaries: Sequence[Summary], indices: Heterogeneity | None) -> str:
    """Result in one sentence."""
    whole = f"{format_count(sum(summary.examples for summary in summaries))} examples"
    if indices is None:
        return f"One client, {whole}: how uneven a federation is shows only where there are several."
    levels = [f"{AXES[axis]} {describe_level(axis, index)}" for axis, index in measured_axes(indices)]
    return f"{plural(len(summaries), 'client')}, {whole}: {', '.join(levels)}."


def axis_table(indices: Heterogeneity) -> Grid:
    """Tabulate the axes, one row each."""
    head = ("Axis", "Unevenness", "By chance", "Like Dirichlet", "In words")
    rows = []
    for axis, index in measured_axes(indices):
        chance = f"{index.chance[0]:.3f}" if axis != "quantity" else NONE
        rows.append((AXES[axis].capitalize(), f"{index.value:.3f}", chance, _alpha(index), describe_level(axis, index)))
    return Grid(head, tuple(rows))


def _alpha(index: HeterogeneityIndex) -> str:
    if index.alpha is None or index.alpha == math.inf:
        return NONE
    return "above 100" if index.alpha > 99 else "below 0.01" if index.alpha < 0.0101 else f"{index.alpha:.2g}"


def expected_effects(indices: Heterogeneity) -> list[tuple[str, str]]:
    """List the axes that are uneven by more than a trace, each in words and with what to expect of it."""
    levels = [(axis, describe_level(axis, index)) for axis, index in measured_axes(indices)]
    return [
        (f"{AXES[axis].capitalize()}: {level}.", EXPECTED[axis])
        for axis, level in levels
        if level.split()[0] in ("mildly", "clearly", "strongly")
    ]


def client_table(summaries: Sequence[Summary], most: int = CLIENTS) -> Grid:
    """Tabulate clients, largest first; of more than `most` the middle is left out."""
    order = sorted(summaries, key=lambda summary: (-summary.examples, summary.client))
    cut = [*order[: most // 2], None, *order[len(order) - most // 2 :]] if len(order) > most else order
    head = ["Client", "Examples", f"Median {summaries[0].unit.split()[0]}"]
    has_labels, has_quality = (
        any(summary.labels for summary in summaries),
        any(summary.quality for summary in summaries),
    )
    head += [*(["Commonest labels"] if has_labels else []), *(["Mean quality"] if has_quality else [])]
    rows = []
    for summary in cut:
        if summary is None:
            rows.append(("…", f"{len(order) - most // 2 * 2} more", *[""] * (len(head) - 2)))
            continue
        row = [label(summary.client), format_count(summary.examples), format_count(summary.median())]
        row += [_commonest(summary)] if has_labels else []
        row += [f"{_mean_quality(summary):.2f}"] if has_quality else []
        rows.append(tuple(row))
    return Grid(tuple(head), tuple(rows))


def _commonest(summary: Summary) -> str:
    ranked = sorted((summary.labels or {}).items(), key=lambda pair: (-pair[1], pair[0]))
    whole = sum(number for _, number in ranked) or 1.0
    return ", ".join(f"{label(name, 24)} {100 * number / whole:.0f} %" for name, number in ranked[:2] if number)


def _mean_quality(summary: Summary) -> float:
    return (
        -float(np.dot(summary.quality, bin_middles(LOSSES))) / (sum(summary.quality) or 1.0)
        if summary.quality
        else math.nan
    )


def _tiles(summaries: Sequence[Summary], indices: Heterogeneity | None) -> Iterator[tuple[str, str, str]]:
    sizes = sorted(summary.examples for summary in summaries)
    yield (
        "Clients",
        format_count(len(summaries)),
        f"{format_count(sizes[0])} to {format_count(sizes[-1])} examples each",
    )
    for axis, index in measured_axes(indices) if indices else ():
        beside = f"{index.chance[0]:.3f} by chance; " if axis != "quantity" else ""
        yield AXES[axis].capitalize(), f"{index.value:.3f}", f"{beside}{describe_level(axis, index)}"


def _sections(
    summaries: Sequence[Summary], indices: Heterogeneity | None
) -> Iterator[tuple[str, tuple[PageBlock, ...]]]:
    if indices is not None:
        likely = expected_effects(indices)
        none = PageBlock("", "Nothing: on every axis the clients are about as even as chance makes them.")
        yield "How uneven", (PageBlock(MEASURED, grid=axis_table(indices)),)
        yield (
            "What to expect",
            tuple(PageBlock(text, level) for level, text in likely) + ((PageBlock(HEDGE),) if likely else (none,)),
        )
    yield (
        "Lengths",
        (PageBlock(LENGTHS if len(summaries) > 1 else "", picture=partial(figures_clients.draw_lengths, summaries)),),
    )
    if all(summary.quality for summary in summaries):
        yield "Quality", (PageBlock(QUALITY, picture=partial(figures_clients.draw_quality, summaries)),)
    table = label_table(summaries)
    if table is not None and len(summaries) > 1:
        names = sorted({name for summary in summaries for name in summary.labels or ()})
        held = {
            summary.client: {"examples": summary.examples, "labels": row}
            for summary, row in zip(summaries, table.tolist(), strict=True)
        }
        picture = partial(figures_clients.draw_partition, {"clients": held, "label_names": names})
        yield "Sizes and labels", (PageBlock(HOLDINGS, picture=picture),)
    some = f"The largest and the smallest of {len(summaries):,}." if len(summaries) > CLIENTS else ""
    yield "Clients", (PageBlock(some, grid=client_table(summaries)),)
