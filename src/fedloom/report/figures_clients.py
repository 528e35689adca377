"""The pictures of who took part: what each client was busy with, and who holds which data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from fedloom.report.facts import clock, elapsed, label, tiers
from fedloom.report.numbers import SPANS, number, plural, scale, short
from fedloom.report.run_log import Line, RunLog
from fedloom.report.style import INK, KINDS, MUTED, OTHER, PALE, SERIES, Box, boxes, key, percent_axis, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

T = TypeVar("T")
Kind: TypeAlias = tuple[str, str, list[tuple[float, float]]]

NAMED = 40  # so many names fit under one picture
SHOWN_CLIENTS, SHOWN_TASKS, SHOWN_BARS = 40, 800, 200


def spread(items: Sequence[T], limit: int) -> list[T]:
    """At most `limit` of the items, evenly over their order.

    >>> spread(range(10), 4)
    [0, 2, 5, 7]
    """
    count = min(limit, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _some(shown: Sequence[str], order: Sequence[str]) -> str:
    return f"{len(shown)} of {len(order)} clients" if len(shown) < len(order) else plural(len(order), "client")


def named(axes: Axes, shown: Sequence[str], title: str) -> None:
    """Clients along the x axis: by name while the names fit, else as a crowd."""
    axes.set_xlim(-0.7, len(shown) - 0.3)
    axes.grid(visible=False, axis="x")
    if len(shown) <= NAMED:
        turn = 0 if len(shown) <= 12 and max(map(len, shown), default=0) <= 8 else 90
        axes.set_xticks(range(len(shown)), [label(name, 16) for name in shown], rotation=turn, fontsize=7.5)
    else:
        axes.set_xticks([])
        axes.set_xlabel(title)


@picture(3.0)
def activity(figure: Figure, log: RunLog) -> str:
    """What clients were busy with: receiving, training, sending; hatched where the work was thrown away.

    With many clients, some of those that got a task, evenly from the slowest tier to the fastest; with many tasks, the beginning
    of the run.
    """
    from matplotlib.patches import Patch

    order = [name for group in tiers(log).values() for name in group] or sorted({str(t["client"]) for t in log.tasks})
    asked = {str(task["client"]) for task in log.tasks}
    shown = order if len(order) <= SHOWN_CLIENTS else spread([name for name in order if name in asked], SHOWN_CLIENTS)
    row = {name: index for index, name in enumerate(reversed(shown))}
    mine = sorted((t for t in log.tasks if t["client"] in row), key=lambda t: (number(t.get("sent")), t["id"]))
    tasks = mine[:SHOWN_TASKS]
    until = number(mine[SHOWN_TASKS].get("sent")) if len(mine) > SHOWN_TASKS else elapsed(log)
    second, unit = scale([until], SPANS)
    figure.set_figheight(1.2 + 0.22 * max(4, len(shown)) if len(shown) <= 24 else 1.2 + 0.14 * len(shown))
    axes = figure.subplots()
    spans = [span for task in tasks for span in _phases(task, row[task["client"]], second, until)]
    for phase, line in (("down", 0.0), ("up", 0.0), ("train", 0.5)):  # last and outlined, so that a short task is seen
        boxes(axes, [box for kind, box in spans if kind == phase], color=PHASES[phase], linewidth=line)
    legend = [Patch(facecolor=color, label=f"{phase}") for phase, color in PHASES.items()]
    for text, (_, hatch) in WASTED.items():
        found = [box for kind, box in spans if kind == text]
        boxes(axes, found, facecolor="#ffffff99", edgecolor=INK, hatch=hatch)
        legend += [Patch(facecolor="#ffffff", edgecolor=INK, hatch=hatch, label=text, linewidth=0.5)] if found else []
    _merges(axes, log, second, until)
    figure.legend(handles=legend, loc="outside upper right", ncols=5)
    axes.set_yticks(list(row.values()), [label(n, 16) for n in row], fontsize=7.5 if len(row) <= 24 else 6)
    axes.set_ylim(-0.7, len(row) - 0.3)
    axes.grid(visible=False)
    axes.set_xlim(0, until / second or None)
    axes.set_xlabel(f"{clock(log)} ({unit})")
    cut = f", the first {short(100 * until / elapsed(log))} % of the run" if len(tasks) < len(mine) else ""
    some = (
        f"{len(shown)} of {len(order):,} clients, evenly from slow to fast"
        if len(shown) < len(order)
        else plural(len(order), "client")
    )
    axes.set_title(f"{some}{cut}" if cut or len(shown) < len(order) else "")
    return f"Timeline of {plural(len(tasks), 'task')} on {plural(len(shown), 'client')}: receiving, training, sending."


PHASES = {"down": SERIES[5], "train": SERIES[0], "up": SERIES[4]}
WASTED = {
    "cancelled": (("cancelled", "unused"), "//////"),
    "lost, failed or refused": (("lost", "failed", "rejected"), "xxxxxx"),
}
"""What became of work that was not merged: the status of its task, and how that is hatched."""


def _merges(axes: Axes, log: RunLog, second: float, until: float) -> None:
    """A fine line where a merge happened, unless there are so many that they would hide the work."""
    times = [time for line in log.versions if (time := number(line.get("time"))) <= until]
    if len(times) <= 100:
        for time in times:
            axes.axvline(time / second, color="#c4c9d0", linewidth=0.7, zorder=0.5)


def _phases(task: Line, row: int, second: float, until: float) -> list[tuple[str, Box]]:
    """The parts of a task as rectangles of one row; one that was stopped counts as training until then."""
    start, arrived = number(task.get("sent")), number(task.get("arrived"))
    spent: Mapping[str, Any] = task.get("seconds") or {"train": arrived - start}
    parts, at, last = [], start, min(until, arrived if arrived == arrived else math.inf)
    for phase in PHASES:
        end = min(at + number(spent.get(phase, 0.0)), last)
        parts.append((phase, at, end))
        at = end
    parts += [(text, start, at) for text, (statuses, _) in WASTED.items() if task.get("status") in statuses]
    return [(kind, (a / second, row - 0.36, (b - a) / second, 0.72)) for kind, a, b in parts if b > a]


@picture(3.9)
def partition(figure: Figure, part: Line) -> str:
    """Who holds what: above the number of examples, below the mix of labels, largest client first.

    `part` is as `fedloom.data.partition.statistics` gives it.
    """
    held: Mapping[str, Line] = part["clients"]
    order = sorted(held, key=lambda name: (-number(held[name].get("examples")), name))
    shown = spread(order, SHOWN_BARS)
    top, low = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.7])
    train = [number(held[name].get("examples", 0)) for name in shown]
    test = [number(held[name].get("held_out", 0)) for name in shown]
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
    named(low, shown, f"{_some(shown, order)}, largest first")
    top.grid(visible=False, axis="x")
    return f"Number of examples and mix of labels of {plural(len(shown), 'client')}."


def _columns(axes: Axes, kinds: Sequence[Kind]) -> None:
    """Stacked columns, one a client: every kind with its colour and its (start, height) in each."""
    for _, color, rows in kinds:
        width = 0.8 if len(rows) <= 60 else 0.92
        boxes(axes, [(i - width / 2, start, width, height) for i, (start, height) in enumerate(rows)], facecolor=color)


def _swatches(kinds: Sequence[Kind]) -> list[Patch]:
    from matplotlib.patches import Patch

    return [Patch(color=color, label=key(text)) for text, color, _ in kinds]


def _mix(part: Line, shown: Sequence[str]) -> list[Kind]:
    """Label, colour and (start, height) in every shown client's bar; beyond nine labels the rarer ones become one."""
    counts = {name: [number(n) for n in part["clients"][name].get("labels", [])] for name in shown}
    width = max(map(len, counts.values()), default=0)
    known = [str(name) for name in part.get("label_names", [])]
    texts = known + [f"label {i}" for i in range(len(known), width)]
    total = Counter({i: sum(row[i] for row in counts.values() if i < len(row)) for i in range(width)})
    common = sorted(i for i, _ in total.most_common(len(KINDS)))
    rare = [i for i in range(width) if i not in common]
    kinds = [([i], label(texts[i], 18), KINDS[k]) for k, i in enumerate(common)]
    kinds += [(rare, f"{len(rare)} others", OTHER)] if rare else []
    at = dict.fromkeys(shown, 0.0)
    found: list[Kind] = []
    for members, text, color in kinds:
        rows = []
        for name, row in counts.items():
            share = sum(row[i] for i in members if i < len(row)) / (sum(row) or 1.0)
            rows.append((at[name], share))
            at[name] += share
        found.append((text, color, rows))
    return found
