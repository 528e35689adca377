"""The pictures of how a run went: accuracy, training loss, and how the adapter's energy spreads over its directions.

Each takes one run or several and returns an SVG text; what is not recorded leaves a gap, never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedloom.report.facts import accuracy, at_version, client_ranks, effective_rank, final, names, spectra
from fedloom.report.read import Line, RunLog
from fedloom.report.style import MUTED, OTHER, SERIES, key, look, percent_axis, picture
from fedloom.report.words import BYTES, SPANS, number, percent, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def whole(axes: Axes, title: str, label: str = "round") -> None:
    """Whole numbers on the x axis, below a title."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_title(title)
    axes.set_xlabel(label)


def _from_zero(axes: Axes) -> None:
    axes.axhline(0, linewidth=0)
    axes.set_ylim(bottom=0)


def _legend(figure: Figure, axes: Axes, logs: Sequence[RunLog]) -> None:
    if len(logs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


@picture(2.7)
def accuracies(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Test accuracy against what was spent for it: rounds, virtual time, bytes sent up."""
    panels = figure.subplots(1, 3, sharey=True)
    times = [[number(score.get("time")) for score in log.scores] for log in logs]
    traffic = [[at_version(log, score.get("version"), "bytes_up") for score in log.scores] for log in logs]
    second, span = scale([t for row in times for t in row], SPANS)
    byte, unit = scale([b for row in traffic for b in row], BYTES)
    for index, (log, name, time, sent) in enumerate(zip(logs, names(logs), times, traffic, strict=True)):
        reached = [accuracy(score) for score in log.scores]
        version = [number(score.get("version")) for score in log.scores]
        for axes, spent in zip(panels, (version, [t / second for t in time], [b / byte for b in sent]), strict=True):
            axes.plot(spent, reached, marker="o", label=key(name), **look(index))
    for axes, title in zip(panels, ("by round", f"by virtual time ({span})", f"by traffic up ({unit})"), strict=True):
        _baselines(axes, logs)
        axes.set_title(title)
    whole(panels[0], "by round", "")
    percent_axis(panels[0])
    panels[0].set_ylabel("test accuracy")
    _legend(figure, panels[0], logs)
    ends = ", ".join(f"{n} {percent(accuracy(final(log)))}" for n, log in zip(names(logs), logs, strict=True))
    return f"Test accuracy against rounds, virtual time and bytes sent up. Final: {ends}."


def _baselines(axes: Axes, logs: Sequence[RunLog]) -> None:
    """Dashed lines at what a model without any training of ours would reach."""
    known = {(str(name), number(value)) for log in logs for name, value in log.manifest["baselines"].items()}
    for name, value in sorted(known):
        axes.axhline(value, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            key(name), (1, value), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=7.5, color=MUTED,
        )  # fmt: skip


@picture(2.3)
def losses(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Mean training loss of the updates in every merge, with the test loss beside it for a single run."""
    axes = figure.subplots()
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        loss = [number(line.get("loss")) for line in log.versions]
        label = name if len(logs) > 1 else "training (clients)"
        axes.plot([line["version"] for line in log.versions], loss, marker="o", label=key(label), **look(index))
    if len(logs) == 1 and logs[0].scores:
        test = [number(score.get("loss")) for score in logs[0].scores]
        axes.plot([score["version"] for score in logs[0].scores], test, marker="s", label="test (server)", **look(1))
        figure.legend(loc="outside upper right", ncols=2)
    whole(axes, "Training loss" if len(logs) > 1 else "Loss")
    _from_zero(axes)
    _legend(figure, axes, logs)
    return "Mean training loss of the merged updates by round."


def bands(rank: int, marks: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring directions to draw as one: cut at every client rank and at the powers of two.

    >>> bands(8, [3])
    [(0, 1), (1, 2), (2, 3), (3, 4), (4, 8)]
    """
    cuts = sorted({rank} | {m for m in marks if m < rank} | {2**k for k in range(rank.bit_length()) if 2**k < rank})
    return list(zip([0, *cuts], cuts, strict=False))


@picture(3.3)
def energy(figure: Figure, log: RunLog) -> str:
    """Where the global model's energy lies: in which directions, and how much of it merges cut off."""
    versions = spectra(log)
    panels = figure.subplot_mosaic([["stack", "rank"], ["stack", "cut"]], width_ratios=[1.7, 1])
    rank = len(versions[-1]["energy"])
    _stack(panels["stack"], versions, bands(rank, client_ranks(log)))
    x = [line["version"] for line in versions]
    panels["rank"].plot(x, [effective_rank(line["energy"]) for line in versions], marker="o", **look(0))
    panels["rank"].set_ylim(0, rank * 1.08)
    panels["rank"].axhline(rank, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    whole(panels["rank"], f"Effective rank (of {rank})", "")
    lost = [number(line.get("discarded")) for line in versions]
    panels["cut"].bar(x, lost, color=SERIES[1], width=0.7)
    whole(panels["cut"], "Energy cut off by the merge")
    if not any(share > 0 for share in lost):
        panels["cut"].set_ylim(0, 0.01)
    percent_axis(panels["cut"])
    end = effective_rank(versions[-1]["energy"])
    return f"Energy of the {rank} directions by round; at the end the effective rank is {end:.1f}."


def _stack(axes: Axes, versions: Sequence[Line], cut: Sequence[tuple[int, int]]) -> None:
    """Bands of directions, strongest below; grey on top is what lies beyond the adapter's directions, in a fold."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    x = [line["version"] for line in versions]
    shares = [[sum(line["energy"][a:b]) for line in versions] for a, b in cut]
    shades = [to_hex(colormaps["cividis"](0.95 * i / max(1, len(cut) - 1))) for i in range(len(cut))]
    labels = [f"{a + 1}" if b == a + 1 else f"{a + 1} to {b}" for a, b in cut]
    beyond = [max(0.0, 1 - sum(line["energy"])) for line in versions]
    if max(beyond) > 1e-3:
        shares, shades, labels = [*shares, beyond], [*shades, OTHER], [*labels, f"beyond {cut[-1][1]}"]
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
    whole(axes, "Share of energy by direction")


@picture(2.7)
def energies(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Rank collapse across runs: the share within the smallest client rank, effective rank, energy cut off."""
    panels = figure.subplots(1, 3)

    def common(log: RunLog, line: Line) -> float:
        ranks = client_ranks(log)
        return sum(line["energy"][: ranks[0]]) if ranks else 1.0

    measures: list[Callable[[RunLog, Line], float]] = [
        common,
        lambda _, line: effective_rank(line["energy"]),
        lambda _, line: number(line.get("discarded")),
    ]
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        versions = spectra(log)
        for axes, measure in zip(panels, measures, strict=True):
            y = [measure(log, line) for line in versions]
            axes.plot([line["version"] for line in versions], y, marker="o", label=key(name), **look(index))
    titles = ("Within the smallest client rank", "Effective rank", "Cut off by the merge")
    for axes, title in zip(panels, titles, strict=True):
        whole(axes, title)
        _from_zero(axes)
    percent_axis(panels[0])
    percent_axis(panels[2])
    panels[0].set_ylim(0, 1.04)
    _legend(figure, panels[0], logs)
    return "Share of energy within the smallest client rank, effective rank and discarded energy by round."
