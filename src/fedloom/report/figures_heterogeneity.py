"""The pictures of what clients' texts are like: one row a client, one column a bin of length or quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedloom.data.client_summary import LENGTHS, LOSSES, Floats, Summary
from fedloom.report.facts import label
from fedloom.report.figures_clients import spread
from fedloom.report.numbers import plural
from fedloom.report.style import INK, MUTED, boxes, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS, SHADES = 40, 9


@picture(3.4)
def lengths(figure: Figure, summaries: Sequence[Summary]) -> str:
    """How long the texts of each client are; clients with short texts on top."""
    counts = np.array([own.lengths for own in summaries])
    marks = {k: f"{edge:,}" for k, edge in enumerate(LENGTHS) if edge.bit_count() == 1}
    return _heat(figure, summaries, counts, marks, f"length ({summaries[0].unit})")


@picture(3.4)
def qualities(figure: Figure, summaries: Sequence[Summary]) -> str:
    """How good the texts of each client are; clients with the best on top."""
    counts = np.array([own.quality for own in summaries])
    marks = {k: f"{-edge:.2g}" for k, edge in enumerate(LOSSES) if k % 4 == 1}
    return _heat(figure, summaries, counts, marks | {0: "0"}, "quality (the best on the left)")


def _heat(figure: Figure, summaries: Sequence[Summary], counts: Floats, marks: dict[int, str], what: str) -> str:
    """All texts above, below them the shares of each client, and its median as a stroke; clients in the order of their medians."""
    half = [int((np.cumsum(row) * 2 >= row.sum()).argmax()) for row in counts]
    order = sorted(range(len(half)), key=lambda k: (half[k], summaries[k].client))
    shown = spread(order, ROWS)
    figure.set_figheight(1.7 + (0.22 if len(shown) <= 24 else 0.15) * max(2, len(shown)))
    many = len(shown) > 1
    top = figure.subplots() if not many else None
    if top is None:
        top, low = figure.subplots(2, 1, sharex=True, height_ratios=[1.1, 0.22 * len(shown) + 0.3])
        _rows(low, counts[shown], [half[k] for k in shown], [label(summaries[k].client, 16) for k in shown])
    whole = counts.sum(axis=0)
    boxes(
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
    """Darker where more of a client's texts are, relative to its fullest bin; first row on top."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    shares = counts / counts.max(axis=1, keepdims=True)
    shade = np.ceil(shares * SHADES).astype(int)
    for level in range(1, SHADES + 1):
        cells = [(float(x), -y - 0.45, 1.0, 0.9) for y, x in np.argwhere(shade == level).tolist()]
        if cells:
            boxes(axes, cells, facecolor=to_hex(colormaps["Blues"](0.08 + 0.72 * level / SHADES)))
    boxes(axes, [(k + 0.42, -y - 0.45, 0.16, 0.9) for y, k in enumerate(half)], facecolor=INK)
    axes.set_yticks([-y for y in range(len(names))], list(names), fontsize=7.5 if len(names) <= 24 else 6)
    axes.set_ylim(-len(names) + 0.4, 0.6)
    axes.grid(visible=False)
