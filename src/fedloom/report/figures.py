"""The pictures of how a run went: accuracy, perplexity, training loss, and how the adapter's energy spreads over its directions.

Each takes one run or several and returns an SVG text; what is not recorded leaves a gap, never an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fedloom.report import facts
from fedloom.report.facts import accuracy, client_ranks, effective_rank, final, mean, names, noun, spectra, spent
from fedloom.report.numbers import BYTES, SPANS, number, percent, scale, short
from fedloom.report.run_log import Line, RunLog
from fedloom.report.style import MUTED, OTHER, SERIES, curve, key, look, percent_axis, picture, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def whole(axes: Axes, title: str, label: str = "round") -> None:
    """Whole numbers on the x axis, below a title."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_title(title)
    axes.set_xlabel(label)


def from_zero(axes: Axes) -> None:
    """The y axis begins at 0."""
    axes.axhline(0, linewidth=0)
    axes.set_ylim(bottom=0)


def measure(logs: Sequence[RunLog]) -> str:
    """What progress is counted in: uploads where a version is no round, since versions of two schedules do not compare."""
    counted = all("uploads" in line for log in logs for line in log.versions)
    return "upload" if noun(*logs) == "version" and counted else noun(*logs)


def legend(figure: Figure, axes: Axes, logs: Sequence[RunLog]) -> None:
    """The runs by name, where there are several."""
    if len(logs) > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)


@picture(2.7)
def accuracies(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Test accuracy against what was spent for it."""
    what = f"test {facts.measure(*logs)}"
    panels, unit = _progress(figure, logs, accuracy)
    for axes in panels:
        _baselines(axes, logs)
    percent_axis(panels[0])
    panels[0].set_ylabel(what)
    ends = ", ".join(f"{n} {percent(accuracy(final(log)))}" for n, log in zip(names(logs), logs, strict=True))
    return f"{what.capitalize()} against {unit}s, {facts.clock(*logs)} and bytes sent up. Final: {ends}."


@picture(2.7)
def perplexities(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Test perplexity against the same, on an axis of ratios."""
    from matplotlib.ticker import LogFormatter

    panels, unit = _progress(figure, logs, facts.perplexity)
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter(LogFormatter())
    panels[0].yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    panels[0].set_ylabel("test perplexity")
    ends = ", ".join(f"{n} {short(facts.perplexity(final(log)))}" for n, log in zip(names(logs), logs, strict=True))
    return f"Test perplexity against {unit}s, {facts.clock(*logs)} and bytes sent up. Final: {ends}."


def _progress(figure: Figure, logs: Sequence[RunLog], of: Callable[[Line], float]) -> tuple[Sequence[Axes], str]:
    """A figure of each score against rounds (uploads, where a version is no round; which of the two), time, bytes sent up."""
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    unit = measure(logs)
    second, span = scale([number(score.get("time")) for log in logs for score in log.scores], SPANS)
    byte, size = scale([sent for log in logs for sent in spent(log, log.scores, "bytes_up")], BYTES)
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        scores = thinned(log.scores)
        counted = (
            [number(score.get("version")) for score in scores] if unit != "upload" else spent(log, scores, "uploads")
        )
        times, sent = [number(score.get("time")) / second for score in scores], spent(log, scores, "bytes_up")
        for axes, x in zip(panels, (counted, times, [b / byte for b in sent]), strict=True):
            curve(axes, x, [of(score) for score in scores], label=key(name), **look(index))
    clock = facts.clock(*logs)
    for axes, title in zip(panels, (f"by {unit}", f"by {clock} ({span})", f"by traffic up ({size})"), strict=True):
        axes.set_title(title)
    whole(panels[0], f"by {unit}", "")
    legend(figure, panels[0], logs)
    return panels, unit


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
    axes, unit = figure.subplots(), measure(logs) if len(logs) > 1 else noun(*logs)
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        label = name if len(logs) > 1 else "training (clients)"
        points = [(number(line.get(_field(unit))), number(line.get("loss"))) for line in log.versions]
        curve(axes, *_means(points), label=key(label), **look(index))
    if len(logs) == 1 and logs[0].scores:
        test = thinned([(score["version"], number(score.get("loss"))) for score in logs[0].scores], 60)
        axes.plot(*zip(*test, strict=True), marker="s", label="test (server)", **look(1))
        figure.legend(loc="outside upper right", ncols=2)
    whole(axes, "Training loss" if len(logs) > 1 else "Loss", unit)
    from_zero(axes)
    legend(figure, axes, logs)
    return f"Mean training loss of the merged updates by {unit}."


def _field(unit: str) -> str:
    return "uploads" if unit == "upload" else "version"


BINS = 150
"""A loss of thousands of single answers is noise: it is drawn as the mean of neighbours, in so many points."""


def _means(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Neighbours together: the last x and the mean y of each group."""
    size = max(1, -(-len(points) // BINS))
    groups = [points[k : k + size] for k in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [mean(y for _, y in group) for group in groups]


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
    versions, what = thinned(spectra(log), 100), noun(log)
    panels = figure.subplot_mosaic([["stack", "rank"], ["stack", "cut"]], width_ratios=[1.7, 1])
    rank = len(versions[-1]["energy"])
    _stack(panels["stack"], versions, bands(rank, client_ranks(log)))
    whole(panels["stack"], "Share of energy by direction", what)
    x = [line["version"] for line in versions]
    curve(panels["rank"], x, [effective_rank(line["energy"]) for line in versions], **look(0))
    panels["rank"].set_ylim(0, rank * 1.08)
    panels["rank"].axhline(rank, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    whole(panels["rank"], f"Effective rank (of {rank})", "")
    lost = [number(line.get("discarded")) for line in versions]
    panels["cut"].bar(x, lost, color=SERIES[1], width=0.7 * max(1.0, (x[-1] - x[0]) / len(x)))
    whole(panels["cut"], "Energy cut off by the merge", what)
    if not any(share > 0 for share in lost):
        panels["cut"].set_ylim(0, 0.01)
    percent_axis(panels["cut"])
    end = effective_rank(versions[-1]["energy"])
    return f"Energy of the {rank} directions by {what}; at the end the effective rank is {end:.1f}."


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


@picture(2.7)
def energies(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Rank collapse across runs: the share within the smallest client rank, effective rank, energy cut off."""
    panels, unit = figure.subplots(1, 3), measure(logs)

    def common(log: RunLog, line: Line) -> float:
        ranks = client_ranks(log)
        return sum(line["energy"][: ranks[0]]) if ranks else 1.0

    shares: list[Callable[[RunLog, Line], float]] = [
        common,
        lambda _, line: effective_rank(line["energy"]),
        lambda _, line: number(line.get("discarded")),
    ]
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        versions = thinned(spectra(log))
        for axes, share in zip(panels, shares, strict=True):
            y = [share(log, line) for line in versions]
            curve(axes, [number(line.get(_field(unit))) for line in versions], y, label=key(name), **look(index))
    titles = ("Within the smallest client rank", "Effective rank", "Cut off by the merge")
    for axes, title in zip(panels, titles, strict=True):
        whole(axes, title, unit)
        from_zero(axes)
    percent_axis(panels[0])
    percent_axis(panels[2])
    panels[0].set_ylim(0, 1.04)
    legend(figure, panels[0], logs)
    return f"Share of energy within the smallest client rank, effective rank and discarded energy by {unit}."
