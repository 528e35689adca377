"""Pictures of how a run went: accuracy, perplexity, training loss, and how the adapter's energy spreads over its directions.

Each takes one run or several and returns an SVG text; what is not recorded leaves a gap, never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedloom.report import facts
from fedloom.report.facts import (
    accuracy,
    client_ranks,
    effective_rank,
    final_score,
    nan_mean,
    run_names,
    values_at_scores,
    version_noun,
    versions_with_energy,
)
from fedloom.report.line_table import Floats, Line
from fedloom.report.numbers import BYTES, SPANS, axis_unit, percent, short, to_float
from fedloom.report.paired_differences import PairedDifference
from fedloom.report.run_log import RunLog
from fedloom.report.style import (
    MUTED,
    OTHER,
    SERIES,
    draw_curve,
    legend_text,
    line_style,
    percent_axis,
    picture,
    thinned,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def integer_axis(axes: Axes, title: str, label: str = "round") -> None:
    """Put whole numbers on the x axis, below a title."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_title(title)
    axes.set_xlabel(label)


def from_zero(axes: Axes) -> None:
    """Begin the y axis at 0."""
    axes.axhline(0, linewidth=0)
    axes.set_ylim(bottom=0)


def progress_unit(logs: Sequence[RunLog]) -> str:
    """Unit of progress: uploads where a version is no round, since versions of two schedules do not compare."""
    counted = all(not np.isnan(log.versions.numbers("uploads")).any() for log in logs)
    return "upload" if version_noun(*logs) == "version" and counted else version_noun(*logs)


def run_legend(figure: Figure, axes: Axes, logs: Sequence[RunLog]) -> None:
    """Name the runs, where there are several."""
    if len(logs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


@picture(2.7)
def draw_accuracy(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Draw test accuracy against rounds (or uploads), time and bytes sent up."""
    what = f"test {facts.score_name(*logs)}"
    panels, unit = _progress(figure, logs, accuracy)
    for axes in panels:
        _baselines(axes, logs)
    percent_axis(panels[0])
    panels[0].set_ylabel(what)
    ends = ", ".join(f"{n} {percent(accuracy(final_score(log)))}" for n, log in zip(run_names(logs), logs, strict=True))
    return f"{what.capitalize()} against {unit}s, {facts.time_name(*logs)} and bytes sent up. Final: {ends}."


@picture(2.7)
def draw_perplexity(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Draw test perplexity against rounds (or uploads), time and bytes sent up, on a logarithmic axis."""
    from matplotlib.ticker import LogFormatter

    panels, unit = _progress(figure, logs, facts.perplexity)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(LogFormatter())
    panels[0].yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    panels[0].set_ylabel("test perplexity")
    ends = ", ".join(
        f"{n} {short(facts.perplexity(final_score(log)))}" for n, log in zip(run_names(logs), logs, strict=True)
    )
    return f"Test perplexity against {unit}s, {facts.time_name(*logs)} and bytes sent up. Final: {ends}."


def _progress(figure: Figure, logs: Sequence[RunLog], of: Callable[[Line], float]) -> tuple[Sequence[Axes], str]:
    """Draw a score against rounds (uploads where a version is no round), time and bytes sent up; return the panels and the unit."""
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    unit = progress_unit(logs)
    second, span = axis_unit([to_float(score.get("time")) for log in logs for score in log.scores], SPANS)
    byte, size = axis_unit([sent for log in logs for sent in values_at_scores(log, log.scores, "bytes_up")], BYTES)
    for index, (log, name) in enumerate(zip(logs, run_names(logs), strict=True)):
        scores = thinned(log.scores)
        counted = (
            [to_float(score.get("version")) for score in scores]
            if unit != "upload"
            else values_at_scores(log, scores, "uploads")
        )
        times, sent = (
            [to_float(score.get("time")) / second for score in scores],
            values_at_scores(log, scores, "bytes_up"),
        )
        for axes, x in zip(panels, (counted, times, [b / byte for b in sent]), strict=True):
            draw_curve(axes, x, [of(score) for score in scores], label=legend_text(name), **line_style(index))
    clock = facts.time_name(*logs)
    for axes, title in zip(panels, (f"by {unit}", f"by {clock} ({span})", f"by traffic up ({size})"), strict=True):
        axes.set_title(title)
    integer_axis(panels[0], f"by {unit}", "")
    run_legend(figure, panels[0], logs)
    return panels, unit


def _baselines(axes: Axes, logs: Sequence[RunLog]) -> None:
    """Draw dashed lines at what a model would reach without this training."""
    values = {(str(name), to_float(value)) for log in logs for name, value in log.manifest["baselines"].items()}
    for name, value in sorted(values):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            legend_text(name), (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=7.5, color=MUTED,
        )  # fmt: skip


@picture(2.3)
def draw_loss(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Draw the mean training loss of the updates in every merge, with the test loss beside it for a single run."""
    axes, unit = figure.subplots(), progress_unit(logs) if len(logs) > 1 else version_noun(*logs)
    for index, (log, name) in enumerate(zip(logs, run_names(logs), strict=True)):
        label = name if len(logs) > 1 else "training (clients)"
        points = log.versions.numbers(_field(unit)), log.versions.numbers("loss")
        draw_curve(axes, *_means(*points), label=legend_text(label), **line_style(index))
    if len(logs) == 1 and logs[0].scores:
        test = thinned([(score["version"], to_float(score.get("loss"))) for score in logs[0].scores], 60)
        axes.plot(*zip(*test, strict=True), marker="s", label="test (server)", **line_style(1))
        figure.legend(loc="outside upper right", ncols=2)
    integer_axis(axes, "Training loss" if len(logs) > 1 else "Loss", unit)
    from_zero(axes)
    run_legend(figure, axes, logs)
    return f"Mean training loss of the merged updates by {unit}."


def _field(unit: str) -> str:
    return "uploads" if unit == "upload" else "version"


BINS = 150
"""A loss of thousands of single answers is noise: it is drawn as the mean of neighbours, in so many points."""


def _means(x: Floats, y: Floats) -> tuple[list[float], list[float]]:
    """Neighbours together: the last x and the mean y of each group."""
    begins = range(0, len(x), size := max(1, -(-len(x) // BINS)))
    return [float(x[k : k + size][-1]) for k in begins], [nan_mean(y[k : k + size]) for k in begins]


def bands(rank: int, marks: Sequence[int]) -> list[tuple[int, int]]:
    """Group neighbouring directions to draw as one: cut at every client rank and at the powers of two.

    >>> bands(8, [3])
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8)]
    """
    cuts = sorted({rank} | {m for m in marks if m < rank} | {2**k for k in range(rank.bit_length()) if 2**k < rank})
    return list(zip([0, *cuts], cuts, strict=False))


@picture(3.3)
def draw_energy(figure: Figure, log: RunLog) -> str:
    """Draw the global model's energy by direction, the effective rank, and how much energy merges cut off."""
    versions, what = thinned(versions_with_energy(log), 100), version_noun(log)
    panels = figure.subplot_mosaic([["stack", "rank"], ["stack", "cut"]], width_ratios=[1.7, 1])
    rank = len(versions[-1]["energy"])
    _stack(panels["stack"], versions, bands(rank, client_ranks(log)))
    integer_axis(panels["stack"], "Share of energy by direction", what)
    x = [line["version"] for line in versions]
    draw_curve(panels["rank"], x, [effective_rank(line["energy"]) for line in versions], **line_style(0))
    panels["rank"].set_ylim(0, rank * 1.08)
    panels["rank"].axhline(rank, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    integer_axis(panels["rank"], f"Effective rank (of {rank})", "")
    lost = [to_float(line.get("discarded")) for line in versions]
    panels["cut"].bar(x, lost, color=SERIES[1], width=0.7 * max(1.0, (x[-1] - x[0]) / len(x)))
    integer_axis(panels["cut"], "Energy cut off by the merge", what)
    if not any(share > 0 for share in lost):
        panels["cut"].set_ylim(0, 0.01)
    percent_axis(panels["cut"])
    end = effective_rank(versions[-1]["energy"])
    return f"Energy of the {rank} directions by {what}; at the end the effective rank is {end:.1f}."


def _stack(axes: Axes, versions: Sequence[Line], cut: Sequence[tuple[int, int]]) -> None:
    """Bands of directions, strongest below; grey on top is what lies beyond the adapter's directions, in a fold."""
    from matplotlib.colors import to_rgba

    x = [line["version"] for line in versions]
    shares = [[sum(line["energy"][a:b]) for line in versions] for a, b in cut]
    shades = [to_rgba(SERIES[0], 1 - 0.85 * i / max(1, len(cut) - 1)) for i in range(len(cut))]
    labels = [f"{a + 1}" if b == a + 1 else f"{a + 1} to {b}" for a, b in cut]
    beyond = [max(0.0, 1 - sum(line["energy"])) for line in versions]
    if max(beyond) > 1e-3:
        shares, shades, labels = [*shares, beyond], [*shades, to_rgba(OTHER)], [*labels, f"beyond {cut[-1][1]}"]
    if len(x) == 1:
        x, shares = [x[0] - 0.5, x[0] + 0.5], [row * 2 for row in shares]
    layers = axes.stackplot(x, shares, colors=shades, linewidth=0)
    axes.legend(
        layers[::-1], labels[::-1], title="direction", loc="upper left",
        bbox_to_anchor=(1.0, 1.02), borderaxespad=0.3, handlelength=1.2, alignment="left",
    )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_xlim(x[0], x[-1])
    percent_axis(axes)


@picture(2.7)
def draw_energy_comparison(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Draw rank collapse across runs: the share within the smallest client rank, effective rank, energy cut off."""
    panels, unit = figure.subplots(1, 3), progress_unit(logs)

    shares: list[Callable[[RunLog, Line], float]] = [
        facts.energy_within_smallest_rank,
        lambda _, line: effective_rank(line["energy"]),
        lambda _, line: to_float(line.get("discarded")),
    ]
    for index, (log, name) in enumerate(zip(logs, run_names(logs), strict=True)):
        versions = thinned(versions_with_energy(log))
        for axes, share in zip(panels, shares, strict=True):
            y = [share(log, line) for line in versions]
            draw_curve(
                axes,
                [to_float(line.get(_field(unit))) for line in versions],
                y,
                label=legend_text(name),
                **line_style(index),
            )
    titles = ("Within the smallest client rank", "Effective rank", "Cut off by the merge")
    for axes, title in zip(panels, titles, strict=True):
        integer_axis(axes, title, unit)
        from_zero(axes)
    percent_axis(panels[0])
    percent_axis(panels[2])
    panels[0].set_ylim(0, 1.04)
    run_legend(figure, panels[0], logs)
    return f"Share of energy within the smallest client rank, effective rank and discarded energy by {unit}."


@picture(2.4)
def draw_paired_differences(figure: Figure, rows: Sequence[PairedDifference]) -> str:
    """Draw what each setting changes: a dot a pair, the mean and its interval."""
    axes, what = figure.subplots(), rows[0].figure
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for place, row in enumerate(reversed(rows)):
        axes.plot(row.differences, [place + 0.16] * len(row.differences), "o", color=OTHER, markersize=5)
        width = row.half_width if len(row.differences) > 1 else 0.0
        axes.errorbar(row.mean, place, xerr=width, fmt="D", color=SERIES[0], capsize=3, markersize=4.5)
    names = [f"{facts.label(row.value)} instead of {facts.label(row.baseline)}" for row in rows]
    axes.set_yticks(range(len(rows)), names[::-1])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"difference in {what.name.lower()}" + (f" ({what.unit})" if what.unit else ""))
    return " ".join(row.sentence() for row in rows)
