"""Pictures with one row or column per client: what it was busy with, its data and texts, what its rank receives, its accuracy.

Each takes one run, or the summaries of clients, and returns an SVG text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from fedloom.report import rank_facts
from fedloom.report.facts import (
    accuracy,
    clients_by_tier,
    elapsed_seconds,
    generates_text,
    is_deployed,
    label,
    nan_mean,
    score_name,
    time_name,
    version_noun,
)
from fedloom.report.figures import integer_axis
from fedloom.report.line_table import Line
from fedloom.report.numbers import BYTES, SPANS, axis_unit, evenly, format_bytes, percent, plural, short, to_float
from fedloom.report.rank_facts import RankGroup
from fedloom.report.run_log import RunLog
from fedloom.report.style import (
    INK,
    KINDS,
    MUTED,
    OTHER,
    PALE,
    PAPER,
    SERIES,
    Box,
    draw_boxes,
    draw_curve,
    legend_text,
    percent_axis,
    picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from fedloom.data.client_summary import Floats, Summary

T = TypeVar("T")
Kind: TypeAlias = tuple[str, str, list[tuple[float, float]]]

NAMED = 40  # so many names fit under one picture
SHOWN_CLIENTS, SHOWN_TASKS, SHOWN_BARS, SHOWN_SCORES = 40, 800, 200, 500
LINES = 6  # most ranks in one panel that a reader can distinguish
ROWS, SHADES = 40, 9  # clients of a picture of texts, and shades of a bin
PHASES = {"down": SERIES[5], "train": SERIES[0], "up": SERIES[4]}
WASTED = {
    "cancelled": (("cancelled", "unused"), "//////"),
    "lost, failed or refused": (("lost", "failed", "rejected"), "xxxxxx"),
}
"""Work that was not merged: the status of its task, and how that is hatched."""
BYTE_KINDS = {"adapter": KINDS[0], "fold": KINDS[1], "head": KINDS[5], "all": OTHER}


def _some(shown: Sequence[str], order: Sequence[str]) -> str:
    return f"{len(shown)} of {len(order)} clients" if len(shown) < len(order) else plural(len(order), "client")


def client_axis(axes: Axes, shown: Sequence[str], title: str) -> None:
    """Put clients along the x axis: by name while the names fit, else as a crowd."""
    axes.set_xlim(-0.7, len(shown) - 0.3)
    axes.grid(visible=False, axis="x")
    if len(shown) <= NAMED:
        turn = 0 if len(shown) <= 12 and max(map(len, shown), default=0) <= 8 else 90
        axes.set_xticks(range(len(shown)), [label(name, 16) for name in shown], rotation=turn, fontsize=7.5)
    else:
        axes.set_xticks([])
        axes.set_xlabel(title)


@picture(3.0)
def draw_activity(figure: Figure, log: RunLog) -> str:
    """Draw what clients were busy with: receiving, training, sending; hatched where the work was thrown away.

    With many clients, some of those that got a task, evenly from the slowest tier to the fastest; with many tasks, the beginning
    of the run.
    """
    from matplotlib.patches import Patch

    active = log.tasks.counts("client")
    order = [name for group in clients_by_tier(log).values() for name in group] or sorted(active)
    shown = order if len(order) <= SHOWN_CLIENTS else evenly([name for name in order if name in active], SHOWN_CLIENTS)
    row = {name: index for index, name in enumerate(reversed(shown))}
    mine = log.tasks.select(log.tasks.matches("client", row))
    mine = mine.select(np.lexsort((mine.numbers("id"), mine.numbers("sent"))))
    tasks = mine[:SHOWN_TASKS]
    until = to_float(mine[SHOWN_TASKS].get("sent")) if len(mine) > SHOWN_TASKS else elapsed_seconds(log)
    second, unit = axis_unit([until], SPANS)
    figure.set_figheight(1.2 + 0.22 * max(4, len(shown)) if len(shown) <= 24 else 1.2 + 0.14 * len(shown))
    axes = figure.subplots()
    spans = [span for task in tasks for span in _phases(task, row[task["client"]], second, until)]
    for phase, line in (("down", 0.0), ("up", 0.0), ("train", 0.5)):  # last and outlined, so that a short task is seen
        draw_boxes(axes, [box for kind, box in spans if kind == phase], color=PHASES[phase], linewidth=line)
    legend = [Patch(facecolor=color, label=f"{phase}") for phase, color in PHASES.items()]
    for text, (_, hatch) in WASTED.items():
        rectangles = [box for kind, box in spans if kind == text]
        draw_boxes(axes, rectangles, facecolor=PAPER, alpha=0.6, edgecolor=INK, hatch=hatch)
        legend += [Patch(facecolor=PAPER, edgecolor=INK, hatch=hatch, label=text, linewidth=0.5)] if rectangles else []
    _merges(axes, log, second, until)
    figure.legend(handles=legend, loc="outside upper right", ncols=5)
    axes.set_yticks(list(row.values()), [label(n, 16) for n in row], fontsize=7.5 if len(row) <= 24 else 6)
    axes.set_ylim(-0.7, len(row) - 0.3)
    axes.grid(visible=False)
    axes.set_xlim(0, until / second or None)
    axes.set_xlabel(f"{time_name(log)} ({unit})")
    cut = f", the first {short(100 * until / elapsed_seconds(log))} % of the run" if len(tasks) < len(mine) else ""
    some = (
        f"{len(shown)} of {len(order):,} clients, evenly from slow to fast"
        if len(shown) < len(order)
        else plural(len(order), "client")
    )
    axes.set_title(f"{some}{cut}" if cut or len(shown) < len(order) else "")
    return f"Timeline of {plural(len(tasks), 'task')} on {plural(len(shown), 'client')}: receiving, training, sending."


def _merges(axes: Axes, log: RunLog, second: float, until: float) -> None:
    """A fine line where a merge happened, unless there are so many that they would hide the work."""
    times = log.versions.numbers("time")
    times = times[times <= until]
    if len(times) <= 100:
        for time in times.tolist():
            axes.axvline(time / second, color=OTHER, linewidth=0.7, zorder=0.5)


def _phases(task: Line, row: int, second: float, until: float) -> list[tuple[str, Box]]:
    """The parts of a task as rectangles of one row; one that was stopped counts as training until then."""
    start, arrived = to_float(task.get("sent")), to_float(task.get("arrived"))
    spent: Mapping[str, Any] = task.get("seconds") or {"train": arrived - start}
    parts, at, last = [], start, min(until, arrived if arrived == arrived else math.inf)
    for phase in PHASES:
        end = min(at + to_float(spent.get(phase, 0.0)), last)
        parts.append((phase, at, end))
        at = end
    parts += [(text, start, at) for text, (statuses, _) in WASTED.items() if task.get("status") in statuses]
    return [(kind, (a / second, row - 0.36, (b - a) / second, 0.72)) for kind, a, b in parts if b > a]


@picture(3.9)
def draw_partition(figure: Figure, part: Line) -> str:
    """Draw the data of clients: above the number of examples, below the mix of labels, largest client first.

    `part` is as `fedloom.data.partition.partition_statistics` returns it.
    """
    held: Mapping[str, Line] = part["clients"]
    order = sorted(held, key=lambda name: (-to_float(held[name].get("examples")), name))
    shown = evenly(order, SHOWN_BARS)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.7])
    train = [to_float(held[name].get("examples", 0)) for name in shown]
    test = [to_float(held[name].get("held_out", 0)) for name in shown]
    sizes = [("training", MUTED, [(0.0, n) for n in train]), ("held out", PALE, list(zip(train, test, strict=True)))]
    _columns(top, sizes)
    if any(test):
        top.legend(handles=_swatches(sizes), loc="upper right", ncols=2)
    top.set_ylabel("examples")
    top.set_ylim(bottom=0)
    mix = _mix(part, shown)
    _columns(low, mix)
    low.legend(handles=_swatches(mix)[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=1)
    low.set_ylabel("labels")
    low.set_ylim(0, 1)
    percent_axis(low)
    client_axis(low, shown, f"{_some(shown, order)}, largest first")
    top.grid(visible=False, axis="x")
    return f"Number of examples and mix of labels of {plural(len(shown), 'client')}."


def _columns(axes: Axes, kinds: Sequence[Kind]) -> None:
    """Draw stacked columns, one per client: every kind with its colour and its (start, height) in each."""
    for _, color, rows in kinds:
        width = 0.8 if len(rows) <= 60 else 0.92
        draw_boxes(
            axes, [(i - width / 2, start, width, height) for i, (start, height) in enumerate(rows)], facecolor=color
        )


def _swatches(kinds: Sequence[Kind]) -> list[Patch]:
    from matplotlib.patches import Patch

    return [Patch(color=color, label=legend_text(text)) for text, color, _ in kinds]


def _mix(part: Line, shown: Sequence[str]) -> list[Kind]:
    """Label, colour and (start, height) in every shown client's bar; beyond nine labels the rarer ones become one."""
    counts = {name: [to_float(n) for n in part["clients"][name].get("labels", [])] for name in shown}
    width = max(map(len, counts.values()), default=0)
    names = [str(name) for name in part.get("label_names", [])]
    texts = names + [f"label {i}" for i in range(len(names), width)]
    total = Counter({i: sum(row[i] for row in counts.values() if i < len(row)) for i in range(width)})
    common = sorted(i for i, _ in total.most_common(len(KINDS)))
    rare = [i for i in range(width) if i not in common]
    kinds = [([i], label(texts[i], 18), KINDS[k]) for k, i in enumerate(common)]
    kinds += [(rare, f"{len(rare)} others", OTHER)] if rare else []
    at = dict.fromkeys(shown, 0.0)
    columns: list[Kind] = []
    for members, text, color in kinds:
        rows = []
        for name, row in counts.items():
            share = sum(row[i] for i in members if i < len(row)) / (sum(row) or 1.0)
            rows.append((at[name], share))
            at[name] += share
        columns.append((text, color, rows))
    return columns


@picture(2.6)
def draw_received(figure: Figure, log: RunLog) -> str:
    """Draw what a task brings to a client of each rank, and what it moves: energy by version, bytes by tier."""
    shares = rank_facts.received_energy(log)
    shown = [group for group in rank_facts.rank_groups(log) if rank_facts.mean_task_bytes(group.tasks, "down")]
    figure.set_figheight(max(2.6, 0.95 + 0.42 * len(shown)))
    panels = figure.subplots(1, 2, width_ratios=[1, 1.25]) if shares and shown else [figure.subplots()] * 2
    texts = []
    if shares:
        _energy(panels[0], log, shares)
        last = ", ".join(f"rank {rank} {percent(row[-1][1])}" for rank, row in shares.items())
        texts.append(f"Share of the global model's energy in a task, in the end: {last}.")
    if shown:
        _bytes(panels[1], shown)
        texts.append(f"Bytes of a task: {'; '.join(f'{group.name} {_cost(group)}' for group in shown)}.")
    return " ".join(texts)


def _cost(group: RankGroup) -> str:
    return ", ".join(
        f"{format_bytes(sum(rank_facts.mean_task_bytes(group.tasks, way).values()))} {way}" for way in rank_facts.WAYS
    )


def _energy(axes: Axes, log: RunLog, shares: Mapping[int, Sequence[tuple[int, float]]]) -> None:
    """Draw a line per rank; those drawn first are wider, so that one is seen under another."""
    shown = _some_ranks(list(shares))
    colours = _colours(log, shown)
    for position, rank in enumerate(shown):
        x, y = zip(*shares[rank], strict=True)
        home = rank_facts.tiers_at_rank(log, rank)
        wide = 1.4 + 1.8 * (len(shown) - 1 - position) / max(1, len(shown) - 1)
        text = f"rank {rank}{f' ({home})' if home and len(home) < 30 else ''}"
        draw_curve(axes, x, y, color=colours[rank], linewidth=wide, markersize=2 + wide, label=legend_text(text))
    percent_axis(axes)
    axes.set_ylim(top=1.05)
    low = min(share for row in shares.values() for _, share in row)
    if low > 0:
        axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    integer_axis(axes, "Energy of the global model in a task", f"{version_noun(log)} that the task started from")


def _some_ranks(every: Sequence[int]) -> list[int]:
    """Few enough ranks for one panel, the lowest and the highest among them."""
    count = min(LINES, len(every))
    return [every[i * (len(every) - 1) // max(1, count - 1)] for i in range(count)]


def _colours(log: RunLog, shown: Sequence[int]) -> dict[int, str]:
    """A rank has the colour of the first tier that uses it, as in the picture of the clients."""
    groups = rank_facts.rank_groups(log)
    first = {rank: i for i, group in reversed(list(enumerate(groups))) for rank in group.ranks}
    clear = len({first[rank] for rank in shown}) == len(shown)
    return {rank: SERIES[(first[rank] if clear else i) % len(SERIES)] for i, rank in enumerate(shown)}


def _bytes(axes: Axes, shown: Sequence[RankGroup]) -> None:
    """Draw two bars per group, down above up, each of its parts; the number beside it is the whole."""
    loads = [
        (row, way, rank_facts.mean_task_bytes(group.tasks, way))
        for row, group in enumerate(shown)
        for way in rank_facts.WAYS
    ]
    byte, unit = axis_unit([sum(load.values()) for _, _, load in loads], BYTES)
    for part, colour in BYTE_KINDS.items():
        bars = [(load, row + (0.2 if way == "up" else -0.2)) for row, way, load in loads if load.get(part, 0) > 0]
        before = [sum(load[p] for p in list(load)[: list(load).index(part)]) / byte for load, _ in bars]
        if bars:
            widths, name = [load[part] / byte for load, _ in bars], "all (not divided)" if part == "all" else part
            axes.barh([y for _, y in bars], widths, 0.34, left=before, color=colour, label=name)
    for row, way, load in loads:
        if load:
            at = sum(load.values()), row + (0.2 if way == "up" else -0.2)
            axes.annotate(
                f"{way} {format_bytes(at[0])}", (at[0] / byte, at[1]), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.5, color=MUTED,
            )  # fmt: skip
    axes.set_yticks(range(len(shown)), [legend_text(group.name) for group in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max((sum(load.values()) for _, _, load in loads), default=1.0) / byte or 1.0)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, handlelength=1, borderaxespad=0.2)
    axes.set_title("Mean bytes of a task")
    axes.set_xlabel(unit)


@picture(3.3)
def draw_client_accuracy(figure: Figure, log: RunLog) -> str:
    """Draw the accuracy of every client with the final model at its own rank, beside its base rate, lowest rank first."""
    axes = figure.subplots()
    groups = [(group, SERIES[i % len(SERIES)]) for i, group in enumerate(rank_facts.rank_groups(log)) if group.clients]
    every = sum(len(group.clients) for group, _ in groups)
    share = min(1.0, SHOWN_SCORES / max(1, every))
    shown = [(group, colour, evenly(group.clients, math.ceil(share * len(group.clients)))) for group, colour in groups]
    rows = [line for _, _, lines in shown for line in lines]
    beside = "before training" if generates_text(log) else "always its commonest label"
    base, first = [to_float(line.get("base_accuracy")) for line in rows], 0
    axes.vlines(range(len(rows)), base, [accuracy(line) for line in rows], color=OTHER, linewidth=1.2)
    axes.plot(base, "_", color=MUTED, markersize=6, markeredgewidth=1.4, label=beside)
    for group, colour, lines in shown:
        _tier(axes, group, [accuracy(line) for line in lines], first, colour, 5 if len(rows) <= 150 else 3)
        first += len(lines)
    names, order = (
        [str(line["client"]) for line in rows],
        "rank and accuracy" if is_deployed(log) else "rank, tier and accuracy",
    )
    client_axis(axes, names, f"{f'{len(rows):,} of ' if len(rows) < every else ''}{every:,} clients, by {order}")
    percent_axis(axes)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(f"held-out {score_name(log)}")
    handles, texts = axes.get_legend_handles_labels()
    figure.legend([*handles[1:], handles[0]], [*texts[1:], texts[0]], loc="outside upper left", ncols=3)
    return f"Held-out {score_name(log)} of {plural(len(rows), 'client')} by rank, each beside its base rate."


def _tier(axes: Axes, group: RankGroup, values: Sequence[float], first: int, colour: str, dot: float) -> None:
    """Clients of one group, of very many some; with the mean of all of them, and a band of one standard error around it."""
    recorded = [score for line in group.clients if (score := accuracy(line)) == score]
    middle, error = nan_mean(recorded), rank_facts.standard_error(recorded)
    left, right = first - 0.42, first + len(values) - 0.58
    text = f"{group.name}: mean {percent(middle)}"
    if error == error:
        axes.fill_between([left, right], middle - error, middle + error, color=colour, alpha=0.15, linewidth=0)
        text += f" ± {100 * error:.1f}"
    axes.plot(range(first, first + len(values)), values, "o", color=colour, markersize=dot, label=legend_text(text))
    axes.hlines(middle, left, right, color=colour, linewidth=1)
    if first:
        axes.axvline(first - 0.5, color=PALE, linewidth=0.8)


@picture(3.4)
def draw_lengths(figure: Figure, summaries: Sequence[Summary]) -> str:
    """Draw how long the texts of each client are; clients with short texts on top."""
    from fedloom.data.client_summary import LENGTHS

    counts = np.array([summary.lengths for summary in summaries])
    marks = {k: f"{edge:,}" for k, edge in enumerate(LENGTHS) if edge.bit_count() == 1}
    return _heat(figure, summaries, counts, marks, f"length ({summaries[0].unit})")


@picture(3.4)
def draw_quality(figure: Figure, summaries: Sequence[Summary]) -> str:
    """Draw how good the texts of each client are; clients with the best on top."""
    from fedloom.data.client_summary import LOSSES

    counts = np.array([summary.quality for summary in summaries])
    marks = {k: f"{-edge:.2g}" for k, edge in enumerate(LOSSES) if k % 4 == 1}
    return _heat(figure, summaries, counts, marks | {0: "0"}, "quality (the best on the left)")


def _heat(figure: Figure, summaries: Sequence[Summary], counts: Floats, marks: dict[int, str], what: str) -> str:
    """All texts above, below them the shares of each client, and its median as a stroke; clients in the order of their medians."""
    half = [int((np.cumsum(row) * 2 >= row.sum()).argmax()) for row in counts]
    order = sorted(range(len(half)), key=lambda k: (half[k], summaries[k].client))
    shown = evenly(order, ROWS)
    figure.set_figheight(1.7 + (0.22 if len(shown) <= 24 else 0.15) * max(2, len(shown)))
    many = len(shown) > 1
    top = figure.subplots() if not many else None
    if top is None:
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, 0.22 * len(shown) + 0.3])
        _rows(low, counts[shown], [half[k] for k in shown], [label(summaries[k].client, 16) for k in shown])
    whole = counts.sum(axis=0)
    draw_boxes(
        top, [(k + 0.04, 0.0, 0.92, share) for k, share in enumerate((whole / whole.sum()).tolist())], facecolor=MUTED
    )
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    top.set_ylabel("of all texts")
    bottom = low if many else top
    used = np.flatnonzero(whole)
    first, last = int(used[0]), int(used[-1]) + 1
    bottom.set_xlim(first - 0.5, last + 0.5)
    near = {k: text for k, text in marks.items() if first - 1 <= k <= last + 1}
    bottom.set_xticks(list(near), list(near.values()))
    some = f"{len(shown)} of {len(order):,} clients, evenly over the order" if len(shown) < len(order) else ""
    bottom.set_xlabel(f"{what}{', ' if some else ''}{some}")
    return f"Distribution of {what.partition(' (')[0]} of {plural(len(order), 'client')}."


def _rows(axes: Axes, counts: Floats, half: Sequence[int], names: Sequence[str]) -> None:
    """Stronger where more of a client's texts are, relative to its fullest bin; first row on top."""
    shares = counts / counts.max(axis=1, keepdims=True)
    shade = np.ceil(shares * SHADES).astype(int)
    for level in range(1, SHADES + 1):
        cells = [(float(x), -y - 0.45, 1.0, 0.9) for y, x in np.argwhere(shade == level).tolist()]
        if cells:
            draw_boxes(axes, cells, facecolor=SERIES[0], alpha=0.06 + 0.84 * level / SHADES)
    draw_boxes(axes, [(k + 0.42, -y - 0.45, 0.16, 0.9) for y, k in enumerate(half)], facecolor=INK)
    axes.set_yticks([-y for y in range(len(names))], list(names), fontsize=7.5 if len(names) <= 24 else 6)
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.grid(visible=False)
