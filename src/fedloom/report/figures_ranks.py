"""The pictures of rank heterogeneity: what each rank is given of the model, what it pays for it, and how it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedloom.report import rank_facts
from fedloom.report.facts import accuracy, deployed, mean, measure, noun, writes
from fedloom.report.figures import whole
from fedloom.report.figures_clients import named
from fedloom.report.numbers import BYTES, number, percent, plural, scale, size
from fedloom.report.rank_facts import Group
from fedloom.report.run_log import RunLog
from fedloom.report.style import KINDS, MUTED, OTHER, SERIES, curve, key, percent_axis, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = {"adapter": KINDS[0], "fold": KINDS[1], "head": KINDS[5], "all": OTHER}
LINES = 6  # so many ranks can be told apart in one panel


@picture(2.6)
def handed(figure: Figure, log: RunLog) -> str:
    """What a task brings to a client of each rank, and what it moves: energy by version, bytes by tier."""
    shares = rank_facts.kept(log)
    shown = [group for group in rank_facts.groups(log) if rank_facts.load(group.tasks, "down")]
    figure.set_figheight(max(2.6, 0.95 + 0.42 * len(shown)))
    panels = figure.subplots(1, 2, width_ratios=[1, 1.25]) if shares and shown else [figure.subplots()] * 2
    told = []
    if shares:
        _energy(panels[0], log, shares)
        last = ", ".join(f"rank {rank} {percent(row[-1][1])}" for rank, row in shares.items())
        told.append(f"Share of the global model's energy in a task, in the end: {last}.")
    if shown:
        _bytes(panels[1], shown)
        told.append(f"Bytes of a task: {'; '.join(f'{group.name} {_cost(group)}' for group in shown)}.")
    return " ".join(told)


def _cost(group: Group) -> str:
    return ", ".join(f"{size(sum(rank_facts.load(group.tasks, way).values()))} {way}" for way in rank_facts.WAYS)


def _energy(axes: Axes, log: RunLog, shares: Mapping[int, Sequence[tuple[int, float]]]) -> None:
    """A line a rank; those drawn first are wider, so that one is seen under another."""
    shown = _shown(list(shares))
    colours = _colours(log, shown)
    for place, rank in enumerate(shown):
        x, y = zip(*shares[rank], strict=True)
        home = rank_facts.at_rank(log, rank)
        wide = 1.4 + 1.8 * (len(shown) - 1 - place) / max(1, len(shown) - 1)
        text = f"rank {rank}{f' ({home})' if home and len(home) < 30 else ''}"
        curve(axes, x, y, color=colours[rank], linewidth=wide, markersize=2 + wide, label=key(text))
    percent_axis(axes)
    axes.set_ylim(top=1.05)
    low = min(share for row in shares.values() for _, share in row)
    if low > 0:
        axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    whole(axes, "Energy of the global model in a task", f"{noun(log)} that the task started from")


def _shown(every: Sequence[int]) -> list[int]:
    """Few enough ranks for one panel, the lowest and the highest among them."""
    count = min(LINES, len(every))
    return [every[i * (len(every) - 1) // max(1, count - 1)] for i in range(count)]


def _colours(log: RunLog, shown: Sequence[int]) -> dict[int, str]:
    """A rank has the colour of the first tier that uses it, as in the picture of the clients."""
    groups = rank_facts.groups(log)
    first = {rank: i for i, group in reversed(list(enumerate(groups))) for rank in group.ranks}
    clear = len({first[rank] for rank in shown}) == len(shown)
    return {rank: SERIES[(first[rank] if clear else i) % len(SERIES)] for i, rank in enumerate(shown)}


def _bytes(axes: Axes, shown: Sequence[Group]) -> None:
    """Two bars a group, down above up, each of its parts; the number beside it is the whole."""
    loads = [
        (row, way, rank_facts.load(group.tasks, way)) for row, group in enumerate(shown) for way in rank_facts.WAYS
    ]
    byte, unit = scale([sum(load.values()) for _, _, load in loads], BYTES)
    for part, colour in PARTS.items():
        bars = [(load, row + (0.2 if way == "up" else -0.2)) for row, way, load in loads if load.get(part, 0) > 0]
        before = [sum(load[p] for p in list(load)[: list(load).index(part)]) / byte for load, _ in bars]
        if bars:
            widths, name = [load[part] / byte for load, _ in bars], "all (not divided)" if part == "all" else part
            axes.barh([y for _, y in bars], widths, 0.34, left=before, color=colour, label=name)
    for row, way, load in loads:
        if load:
            at = sum(load.values()), row + (0.2 if way == "up" else -0.2)
            axes.annotate(
                f"{way} {size(at[0])}", (at[0] / byte, at[1]), xytext=(4, 0), textcoords="offset points",
                va="center", fontsize=7.5, color=MUTED,
            )  # fmt: skip
    axes.set_yticks(range(len(shown)), [key(group.name) for group in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max((sum(load.values()) for _, _, load in loads), default=1.0) / byte or 1.0)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=4, handlelength=1, borderaxespad=0.2)
    axes.set_title("Mean bytes of a task")
    axes.set_xlabel(unit)


@picture(3.3)
def clients(figure: Figure, log: RunLog) -> str:
    """Accuracy of every client with the final model at its own rank, beside its base rate, lowest rank first."""
    axes = figure.subplots()
    shown = [(group, SERIES[i % len(SERIES)]) for i, group in enumerate(rank_facts.groups(log)) if group.clients]
    rows = [line for group, _ in shown for line in group.clients]
    beside = "before training" if writes(log) else "always its commonest label"
    base, first = [number(line.get("base_accuracy")) for line in rows], 0
    axes.vlines(range(len(rows)), base, [accuracy(line) for line in rows], color="#c9ced6", linewidth=1.2)
    axes.plot(base, "_", color=MUTED, markersize=6, markeredgewidth=1.4, label=beside)
    for group, colour in shown:
        _tier(axes, group, first, colour, 5 if len(rows) <= 150 else 3)
        first += len(group.clients)
    order = "rank and accuracy" if deployed(log) else "rank, tier and accuracy"
    named(axes, [str(line["client"]) for line in rows], f"{len(rows)} clients, by {order}")
    percent_axis(axes)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel(f"held-out {measure(log)}")
    handles, texts = axes.get_legend_handles_labels()
    figure.legend([*handles[1:], handles[0]], [*texts[1:], texts[0]], loc="outside upper left", ncols=3)
    return f"Held-out {measure(log)} of {plural(len(rows), 'client')} by rank, each beside its base rate."


def _tier(axes: Axes, group: Group, first: int, colour: str, dot: float) -> None:
    """The clients of one group with their mean, and a band of one standard error around it."""
    values = [accuracy(line) for line in group.clients]
    known = [value for value in values if value == value]
    middle, doubt = mean(known), rank_facts.error(known)
    left, right = first - 0.42, first + len(values) - 0.58
    text = f"{group.name}: mean {percent(middle)}"
    if doubt == doubt:
        axes.fill_between([left, right], middle - doubt, middle + doubt, color=colour, alpha=0.15, linewidth=0)
        text += f" ± {100 * doubt:.1f}"
    axes.plot(range(first, first + len(values)), values, "o", color=colour, markersize=dot, label=key(text))
    axes.hlines(middle, left, right, color=colour, linewidth=1)
    if first:
        axes.axvline(first - 0.5, color="#b4bac2", linewidth=0.8)
