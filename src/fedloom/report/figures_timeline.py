"""Pictures of how time was used: uploads and bytes, slots at work and waiting, staleness, and who took part.

They draw the facts of `timeline`; each takes one run or several and returns an SVG text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.report import timeline
from fedloom.report.facts import clients_by_tier, label, run_names, time_name
from fedloom.report.figures import from_zero, run_legend
from fedloom.report.figures_clients import client_axis
from fedloom.report.line_table import Line
from fedloom.report.numbers import BYTES, SPANS, axis_unit, evenly, format_bytes, percent, plural, short, to_float
from fedloom.report.run_log import RunLog
from fedloom.report.style import (
    INK,
    MUTED,
    OTHER,
    SERIES,
    draw_boxes,
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

INTERVALS, COLUMNS, BARS = 240, 200, 40  # at most so many of them in a picture


@picture(2.4)
def draw_traffic(figure: Figure, log: RunLog) -> str:
    """Draw uploads and bytes by time."""
    left, right = figure.subplots(1, 2)
    _uploads(left, [log])
    lines = thinned(timeline.last_version_at_each_time(log))
    second, span = _span([log])
    byte, unit = axis_unit(
        [to_float(line.get(way)) for line in lines[-1:] for way in ("bytes_up", "bytes_down")], BYTES
    )
    for index, way in enumerate(("up", "down")):
        x, y = _from_origin(lines, f"bytes_{way}")
        draw_curve(right, [t / second for t in x], [b / byte for b in y], label=way, marker=None, **line_style(index))
    right.legend(loc="upper left")
    right.set_title(f"Bytes ({unit})")
    right.set_xlabel(f"{time_name(log)} ({span})")
    from_zero(right)
    total = [to_float(log.versions[-1].get(f"bytes_{way}")) for way in ("up", "down")]
    return f"Uploads and bytes by {time_name(log)}; in the end {format_bytes(total[0])} up and {format_bytes(total[1])} down."


@picture(5.0)
def draw_pace_comparison(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Draw uploads, waiting, bytes by time, and staleness of several runs."""
    (uploads, bytes_up), (waiting, stale) = figure.subplots(2, 2)
    _uploads(uploads, logs)
    second, span = _span(logs)
    byte, unit = axis_unit([to_float(log.versions[-1].get("bytes_up")) for log in logs if log.versions], BYTES)
    late, lost = axis_unit([to_float(log.versions[-1].get("waiting_seconds")) for log in logs if log.versions], SPANS)
    for index, (log, name) in enumerate(zip(logs, run_names(logs), strict=True)):
        for axes, field, divisor in ((bytes_up, "bytes_up", byte), (waiting, "waiting_seconds", late)):
            x, y = _from_origin(thinned(timeline.last_version_at_each_time(log)), field)
            draw_curve(
                axes,
                [t / second for t in x],
                [v / divisor for v in y],
                label=legend_text(name),
                marker=None,
                **line_style(index),
            )
        edges, shares = timeline.staleness_histogram(log, BARS)
        stale.stairs(shares, edges, linewidth=1.5, **line_style(index))
    for axes, title in ((bytes_up, f"Bytes up ({unit})"), (waiting, f"Waiting: empty slots times time ({lost})")):
        axes.set_title(title)
        axes.set_xlabel(f"{time_name(*logs)} ({span})")
        from_zero(axes)
    _titled(stale, "Staleness: share of the updates")
    run_legend(figure, uploads, logs)
    shares_text = (
        f"{name} {percent(timeline.waiting_share(log))}" for name, log in zip(run_names(logs), logs, strict=True)
    )
    return f"Uploads, bytes and waiting by {time_name(*logs)}, and staleness. Of the slots' time waited: {', '.join(shares_text)}."


def _span(logs: Sequence[RunLog]) -> tuple[float, str]:
    return axis_unit([to_float(line.get("time")) for log in logs for line in log.versions[-1:]], SPANS)


def _from_origin(lines: Sequence[Line], field: str) -> tuple[list[float], list[float]]:
    return [0.0, *(to_float(line.get("time")) for line in lines)], [0.0, *(to_float(line.get(field)) for line in lines)]


def _uploads(axes: Axes, logs: Sequence[RunLog]) -> None:
    second, span = _span(logs)
    for index, (log, name) in enumerate(zip(logs, run_names(logs), strict=True)):
        x, y = _from_origin(thinned(timeline.last_version_at_each_time(log)), "uploads")
        draw_curve(axes, [t / second for t in x], y, label=legend_text(name), marker=None, **line_style(index))
    axes.set_title("Uploads")
    axes.set_xlabel(f"{time_name(*logs)} ({span})")
    from_zero(axes)


def _titled(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_title(title)
    axes.set_xlabel("versions behind")
    percent_axis(axes)
    axes.set_ylim(bottom=0)


@picture(2.4)
def draw_staleness(figure: Figure, log: RunLog) -> str:
    """Draw how stale updates were when they were merged first, in all and in the course of the run."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    edges, shares = timeline.staleness_histogram(log, BARS)
    bars = [(low, 0.0, 0.9 * (high - low), share) for low, high, share in zip(edges, edges[1:], shares, strict=False)]
    draw_boxes(left, bars, facecolor=SERIES[0])
    left.set_xlim(-0.1 * (edges[1] - edges[0]), edges[-1])
    _titled(left, "Share of the updates by staleness")
    second, span = _span([log])
    lines = thinned(timeline.last_version_at_each_time(log))
    for index, (field, text) in enumerate((("staleness", "mean"), ("staleness_max", "largest"))):
        values = [to_float(line.get(field)) for line in lines]
        draw_curve(
            right,
            [to_float(line["time"]) / second for line in lines],
            values,
            label=text,
            marker=None,
            **line_style(index),
        )
    right.set_title("In a version")
    right.set_xlabel(f"{time_name(log)} ({span})")
    from_zero(right)
    right.legend(loc="lower right", ncols=2)
    return f"Histogram of staleness, and its mean and maximum in every version. {timeline.staleness_sentence(log)}"


@picture(2.7)
def draw_waiting(figure: Figure, log: RunLog) -> str:
    """Draw slots at work and waiting over time, and how long each client was without a task."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    second, span = _span([log])
    parts = timeline.intervals(log, INTERVALS)
    x = [part.begin / second for part in parts] + [parts[-1].end / second for _ in parts[:1]]
    rows = [
        [part.working for part in parts],
        [part.held for part in parts],
        [part.waiting - part.held for part in parts],
    ]
    texts = ("at work", "empty: held for the next version", "empty, though a client is idle")
    if parts:
        left.stackplot(
            x, [[*row, row[-1]] for row in rows], labels=texts, colors=(SERIES[5], SERIES[4], SERIES[1]), step="post",
            linewidth=0,
        )  # fmt: skip
        left.set_xlim(0, x[-1])
    from_zero(left)
    left.set_title("Slots")
    left.set_xlabel(f"{time_name(log)} ({span})")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    idle = _idle(right, log)
    return f"Slots at work and waiting by {time_name(log)}. {timeline.waiting_sentence(log)} {idle}"


def _idle(axes: Axes, log: RunLog) -> str:
    """Draw a column per client, slowest tier first and in each the busiest first."""
    order = list(clients_by_tier(log))
    rows = sorted(timeline.client_shares(log), key=lambda row: (order.index(row.tier), row.idle, row.client))
    shown = evenly(rows, COLUMNS)
    _columns(axes, shown, order, [row.idle for row in shown])
    _named(axes, shown, rows)
    axes.set_title("Idle time")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=3, handlelength=1, columnspacing=1, borderaxespad=0.2
    )
    axes.set_ylim(0, 1.03)
    percent_axis(axes)
    return f"Share of time without a task of {plural(len(shown), 'client')}."


def _columns(axes: Axes, shown: Sequence[timeline.ClientShare], order: Sequence[str], heights: Sequence[float]) -> None:
    width = 0.8 if len(shown) <= 60 else 0.96
    for index, tier in enumerate(order):
        columns = [
            (k - width / 2, 0.0, width, h)
            for k, (row, h) in enumerate(zip(shown, heights, strict=True))
            if row.tier == tier
        ]
        draw_boxes(axes, columns, facecolor=SERIES[index % len(SERIES)], label=legend_text(label(tier, 18)))


def _named(axes: Axes, shown: Sequence[timeline.ClientShare], rows: Sequence[timeline.ClientShare]) -> None:
    many = f"{len(shown)} of {len(rows):,} clients" if len(shown) < len(rows) else plural(len(rows), "client")
    client_axis(axes, [row.client for row in shown], many)


@picture(2.8)
def draw_participation(figure: Figure, log: RunLog) -> str:
    """Draw updates by tier, where there are several, and by client, beside an equal share and the share of the examples."""
    rows, order = timeline.client_shares(log), list(clients_by_tier(log))
    if len(order) > 1:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
        _by_tier(left, [log], ["updates"])
        left.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.1), ncols=3, handlelength=1, borderaxespad=0)
    else:
        right = figure.subplots()
    shown = evenly(rows, COLUMNS)
    _columns(right, shown, order, [len(rows) * row.updates for row in shown])
    held = [len(rows) * row.examples for row in shown]
    right.plot(range(len(shown)), held, "_" if len(shown) <= 60 else ".", color=INK, markersize=5 if len(shown) <= 60 else 2,
               label="examples")  # fmt: skip
    right.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="equal share")
    _named(right, shown, rows)
    tops = [len(rows) * max(row.updates, row.examples) for row in shown]
    right.set_ylim(0, 1.4 * max((top for top in tops if top == top), default=1.0))
    right.set_title("Updates of a client, in equal shares")
    right.legend(loc="upper right", ncols=2 if len(order) > 2 else 1, handlelength=1.2)
    kinds = "tier and client" if len(order) > 1 else "client"
    return f"Shares of the merged updates by {kinds}. {timeline.participation_sentence(rows, log)}"


@picture(2.6)
def draw_participation_comparison(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Draw updates by tier of several runs of one federation."""
    axes = figure.subplots()
    _by_tier(axes, logs, run_names(logs))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return f"Shares of the merged updates by tier of {plural(len(logs), 'run')}, beside the shares of clients and examples."


def _by_tier(axes: Axes, logs: Sequence[RunLog], texts: Sequence[str]) -> None:
    """Bars: a share of the clients, of the examples, and of the updates of each run."""
    tiers = list(clients_by_tier(logs[0]))
    bars = [
        (what, colour, timeline.tier_shares(logs[0], what))
        for what, colour in (("clients", MUTED), ("examples", OTHER))
    ]
    for index, (log, text) in enumerate(zip(logs, texts, strict=True)):
        bars.append((text, SERIES[index % len(SERIES)], timeline.tier_shares(log, "updates")))
    width = 0.84 / len(bars)
    for position, (text, colour, shares) in enumerate(bars):
        at = [k + (position - (len(bars) - 1) / 2) * width for k in range(len(tiers))]
        axes.bar(at, list(shares.values()), 0.92 * width, color=colour, label=legend_text(text))
        for x, share in zip(at, shares.values(), strict=True):
            if len(bars) * len(tiers) <= 16 and share == share:
                text_ = short(100 * share)
                axes.annotate(text_, (x, share), ha="center", va="bottom", fontsize=7, color=MUTED)
    axes.set_xticks(range(len(tiers)), [legend_text(label(tier, 18)) for tier in tiers])
    axes.grid(visible=False, axis="x")
    axes.set_title("Share by tier")
    percent_axis(axes)
