"""The pictures of how time was used: uploads and bytes, places at work and waiting, staleness, and who took part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedloom.report import timeline
from fedloom.report.facts import clock, label, names, tiers
from fedloom.report.figures import from_zero, legend
from fedloom.report.figures_clients import named, spread
from fedloom.report.numbers import BYTES, SPANS, number, percent, plural, scale, short, size
from fedloom.report.run_log import Line, RunLog
from fedloom.report.style import MUTED, OTHER, SERIES, boxes, curve, key, look, percent_axis, picture, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STRETCHES, COLUMNS, BARS = 240, 200, 40


@picture(2.4)
def spending(figure: Figure, log: RunLog) -> str:
    """Uploads and bytes by time."""
    left, right = figure.subplots(1, 2)
    _uploads(left, [log])
    lines = thinned(timeline.ends(log))
    second, span = _span([log])
    byte, unit = scale([number(line.get(way)) for line in lines[-1:] for way in ("bytes_up", "bytes_down")], BYTES)
    for index, way in enumerate(("up", "down")):
        x, y = _from_origin(lines, f"bytes_{way}")
        curve(right, [t / second for t in x], [b / byte for b in y], label=way, marker=None, **look(index))
    right.legend(loc="upper left")
    right.set_title(f"Bytes ({unit})")
    right.set_xlabel(f"{clock(log)} ({span})")
    from_zero(right)
    total = [number(log.versions[-1].get(f"bytes_{way}")) for way in ("up", "down")]
    return f"Uploads and bytes by {clock(log)}; in the end {size(total[0])} up and {size(total[1])} down."


@picture(5.0)
def paces(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Several runs: uploads, waiting, and bytes by time, and how stale updates were."""
    (uploads, bytes_up), (waiting, stale) = figure.subplots(2, 2)
    _uploads(uploads, logs)
    second, span = _span(logs)
    byte, unit = scale([number(log.versions[-1].get("bytes_up")) for log in logs if log.versions], BYTES)
    late, lost = scale([number(log.versions[-1].get("waiting_seconds")) for log in logs if log.versions], SPANS)
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        for axes, field, one in ((bytes_up, "bytes_up", byte), (waiting, "waiting_seconds", late)):
            x, y = _from_origin(thinned(timeline.ends(log)), field)
            curve(axes, [t / second for t in x], [v / one for v in y], label=key(name), marker=None, **look(index))
        shares = _shares(log)
        stale.stairs(
            [share for _, share in shares], [at for at, _ in shares] + [_edge(shares)], linewidth=1.5, **look(index)
        )
    for axes, title in ((bytes_up, f"Bytes up ({unit})"), (waiting, f"Waiting: empty places times time ({lost})")):
        axes.set_title(title)
        axes.set_xlabel(f"{clock(*logs)} ({span})")
        from_zero(axes)
    _titled(stale, "Staleness: share of the updates")
    legend(figure, uploads, logs)
    told = ", ".join(f"{name} {percent(timeline.waiting(log))}" for name, log in zip(names(logs), logs, strict=True))
    return f"Uploads, bytes and waiting by {clock(*logs)}, and staleness. Of the places' time waited: {told}."


def _span(logs: Sequence[RunLog]) -> tuple[float, str]:
    return scale([number(line.get("time")) for log in logs for line in log.versions[-1:]], SPANS)


def _from_origin(lines: Sequence[Line], field: str) -> tuple[list[float], list[float]]:
    return [0.0, *(number(line.get("time")) for line in lines)], [0.0, *(number(line.get(field)) for line in lines)]


def _uploads(axes: Axes, logs: Sequence[RunLog]) -> None:
    second, span = _span(logs)
    for index, (log, name) in enumerate(zip(logs, names(logs), strict=True)):
        x, y = _from_origin(thinned(timeline.ends(log)), "uploads")
        curve(axes, [t / second for t in x], y, label=key(name), marker=None, **look(index))
    axes.set_title("Uploads")
    axes.set_xlabel(f"{clock(*logs)} ({span})")
    from_zero(axes)


def _shares(log: RunLog) -> list[tuple[int, float]]:
    """(staleness from which a bar begins, share of the updates in it), all bars of one width, at most `BARS`."""
    counts = timeline.staleness(log)
    width = 1 + max(counts, default=0) // BARS
    return [
        (low, sum(counts[k] for k in range(low, low + width)) / max(1, counts.total()))
        for low in range(0, max(counts, default=0) + 1, width)
    ]


def _edge(shares: Sequence[tuple[int, float]]) -> int:
    return 2 * shares[-1][0] - shares[-2][0] if len(shares) > 1 else shares[-1][0] + 1


def _titled(axes: Axes, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.set_title(title)
    axes.set_xlabel("versions made since the one that the update was trained from")
    percent_axis(axes)
    axes.set_ylim(bottom=0)


@picture(2.4)
def staleness(figure: Figure, log: RunLog) -> str:
    """How stale updates were when they were merged first, in all and in the course of the run."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    shares = _shares(log)
    edges = [*(at for at, _ in shares), _edge(shares)]
    boxes(
        left, [(at, 0.0, 0.9 * (edges[k + 1] - at), share) for k, (at, share) in enumerate(shares)], facecolor=SERIES[0]
    )
    left.set_xlim(-0.1 * (edges[1] - edges[0]), edges[-1])
    _titled(left, "Share of the updates by staleness")
    second, span = _span([log])
    lines = thinned(timeline.ends(log))
    for index, (field, text) in enumerate((("staleness", "mean"), ("staleness_max", "largest"))):
        values = [number(line.get(field)) for line in lines]
        curve(right, [number(line["time"]) / second for line in lines], values, label=text, marker=None, **look(index))
    right.set_title("In a version")
    right.set_xlabel(f"{clock(log)} ({span})")
    from_zero(right)
    right.legend(loc="lower right", ncols=2)
    return f"Histogram of staleness, and its mean and maximum in every version. {timeline.stale(log)}"


@picture(2.7)
def waiting(figure: Figure, log: RunLog) -> str:
    """Places at work and waiting over time, and how long each client was without a task."""
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    second, span = _span([log])
    parts = timeline.stretches(log, STRETCHES)
    x = [part.begin / second for part in parts] + [parts[-1].end / second for _ in parts[:1]]
    rows = [
        [part.working for part in parts],
        [part.held for part in parts],
        [part.waiting - part.held for part in parts],
    ]
    names_ = ("at work", "empty: held for the next version", "empty, though a client is idle")
    if parts:
        left.stackplot(
            x, [[*row, row[-1]] for row in rows], labels=names_, colors=(SERIES[5], SERIES[4], SERIES[1]), step="post",
            linewidth=0,
        )  # fmt: skip
        left.set_xlim(0, x[-1])
    from_zero(left)
    left.set_title("Places")
    left.set_xlabel(f"{clock(log)} ({span})")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    idle = _idle(right, log)
    return f"Places at work and waiting by {clock(log)}. {timeline.waited(log)} {idle}"


def _idle(axes: Axes, log: RunLog) -> str:
    """A column a client, slowest tier first and in each the busiest first."""
    order = list(tiers(log))
    rows = sorted(timeline.parts(log), key=lambda row: (order.index(row.tier), row.idle, row.client))
    shown = spread(rows, COLUMNS)
    _columns(axes, shown, order, [row.idle for row in shown])
    _named(axes, shown, rows)
    axes.set_title("Idle time")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 0.98), ncols=3, handlelength=1, columnspacing=1, borderaxespad=0.2
    )
    axes.set_ylim(0, 1.03)
    percent_axis(axes)
    return f"Share of time without a task of {plural(len(shown), 'client')}."


def _columns(axes: Axes, shown: Sequence[timeline.Part], order: Sequence[str], heights: Sequence[float]) -> None:
    width = 0.8 if len(shown) <= 60 else 0.96
    for index, tier in enumerate(order):
        own = [
            (k - width / 2, 0.0, width, h)
            for k, (row, h) in enumerate(zip(shown, heights, strict=True))
            if row.tier == tier
        ]
        boxes(axes, own, facecolor=SERIES[index % len(SERIES)], label=key(label(tier, 18)))


def _named(axes: Axes, shown: Sequence[timeline.Part], rows: Sequence[timeline.Part]) -> None:
    many = f"{len(shown)} of {len(rows):,} clients" if len(shown) < len(rows) else plural(len(rows), "client")
    named(axes, [row.client for row in shown], many)


@picture(2.8)
def participation(figure: Figure, log: RunLog) -> str:
    """Updates by tier, where there are several, and by client, beside an equal share and the share of the examples."""
    rows, order = timeline.parts(log), list(tiers(log))
    if len(order) > 1:
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.6])
        _by_tier(left, [log], ["updates"])
        left.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.1), ncols=3, handlelength=1, borderaxespad=0)
    else:
        right = figure.subplots()
    shown = spread(rows, COLUMNS)
    _columns(right, shown, order, [len(rows) * row.updates for row in shown])
    held = [len(rows) * row.examples for row in shown]
    right.plot(range(len(shown)), held, "_" if len(shown) <= 60 else ".", color="#1f2430", markersize=5 if len(shown) <= 60 else 2,
               label="examples")  # fmt: skip
    right.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="equal share")
    _named(right, shown, rows)
    tops = [len(rows) * max(row.updates, row.examples) for row in shown]
    right.set_ylim(0, 1.4 * max((top for top in tops if top == top), default=1.0))
    right.set_title("Updates of a client, in equal shares")
    right.legend(loc="upper right", ncols=2 if len(order) > 2 else 1, handlelength=1.2)
    return f"Shares of the merged updates by {'tier and ' if len(order) > 1 else ''}client. {timeline.took_part(rows, log)}"


@picture(2.6)
def participations(figure: Figure, logs: Sequence[RunLog]) -> str:
    """Several runs of one federation: updates by tier."""
    axes = figure.subplots()
    _by_tier(axes, logs, names(logs))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return f"Shares of the merged updates by tier of {plural(len(logs), 'run')}, beside the shares of clients and examples."


def _by_tier(axes: Axes, logs: Sequence[RunLog], texts: Sequence[str]) -> None:
    """Bars: a share of the clients, of the examples, and of the updates of each run."""
    rows, groups = timeline.parts(logs[0]), list(tiers(logs[0]))
    count = len(rows) or 1
    bars = [("clients", MUTED, {t: sum(row.tier == t for row in rows) / count for t in groups})]
    bars += [("examples", OTHER, {t: sum(row.examples for row in rows if row.tier == t) for t in groups})]
    for index, (log, text) in enumerate(zip(logs, texts, strict=True)):
        own = timeline.parts(log)
        shares = {tier: sum(row.updates for row in own if row.tier == tier) for tier in groups}
        bars.append((text, SERIES[index % len(SERIES)], shares))
    width = 0.84 / len(bars)
    for place, (text, colour, shares) in enumerate(bars):
        at = [k + (place - (len(bars) - 1) / 2) * width for k in range(len(groups))]
        axes.bar(at, list(shares.values()), 0.92 * width, color=colour, label=key(text))
        for x, share in zip(at, shares.values(), strict=True):
            if len(bars) * len(groups) <= 16 and share == share:
                text_ = short(100 * share)
                axes.annotate(text_, (x, share), ha="center", va="bottom", fontsize=7, color=MUTED)
    axes.set_xticks(range(len(groups)), [key(label(tier, 18)) for tier in groups])
    axes.grid(visible=False, axis="x")
    axes.set_title("Share by tier")
    percent_axis(axes)
