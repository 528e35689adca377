"""Tables in the terminal: rows of text as the report has them, and how examples are divided over clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedloom.cli.console import out
from fedloom.report.run_log import read_run_log
from fedloom.report.tables import Grid, runs_table, summary_table

FEW_RUNS = 4
"""Runs that have room beside each other, one a column."""
DIVERGENCES = ((0.05, "labels nearly identical"), (0.2, "labels similar"), (0.5, "labels different"))
"""Jensen-Shannon divergences of clients' labels from those of all (bits), below which is said so much of them."""
VARIATIONS = ((0.05, "equal sizes"), (0.3, "similar sizes"), (0.8, "different sizes"))
"""Standard deviations of clients' sizes over their mean, below which is said so much of them."""


def table_width(table: Table) -> int:
    """Return how many columns of the terminal a table takes where nothing in it is cut or wrapped."""
    return Measurement.get(out, out.options.update(width=10_000), table).maximum


def rich_table(
    grid: Grid, left: Collection[str], *, padding: tuple[int, int, int, int] = (0, 1, 0, 1), wrap: bool = True
) -> Table:
    """Draw a grid; the columns named in `left` are words, the others numbers and aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
    for head in grid.head:
        table.add_column(Text(head), justify="left" if head in left else "right", no_wrap=not wrap)
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def runs_in_terminal(folders: Sequence[Path], width: int) -> Table:
    """The runs in these folders, one a row, in as many columns as `width` has room for; few runs that need more, one a column."""
    logs = [read_run_log(folder) for folder in folders]
    grid = runs_table(logs)
    for shown in (grid, summary_table(logs)):
        table = rich_table(shown, ("Run", "Status"), padding=(0, 1, 0, 0), wrap=False)
        if table_width(table) <= width:
            return table
    if len(folders) <= FEW_RUNS:
        turned = Grid(
            (grid.head[0], *(row[0] for row in grid.rows)), tuple(zip(grid.head, *grid.rows, strict=True))[1:]
        )
        return rich_table(turned, ("Run",))
    return fitting_table(shown, ("Run", "Status"), width)


def fitting_table(grid: Grid, left: Collection[str], width: int) -> Table:
    """Draw a grid with as many of its columns as `width` has room for, the first ones."""
    table = rich_table(grid, left, padding=(0, 1, 0, 0), wrap=False)
    while len(grid.head) > 2 and table_width(table) > width:
        grid = Grid(grid.head[:-1], tuple(row[:-1] for row in grid.rows))
        table = rich_table(grid, left, padding=(0, 1, 0, 0), wrap=False)
    return table


def partition_words(statistics: Mapping[str, Any]) -> str:
    """Say how different the labels and the sizes of clients are, by `fedloom.data.partition.partition_statistics`.

    >>> partition_words({"label_js": 0.041, "size_cv": 0.0})
    'labels nearly identical (JSD 0.041), equal sizes'
    """
    divergence, variation = statistics["label_js"], statistics["size_cv"]
    labels = next((words for most, words in DIVERGENCES if divergence < most), "labels very different")
    sizes = next((words for most, words in VARIATIONS if variation < most), "very different sizes")
    return f"{labels} (JSD {divergence:.3f}), {sizes}" + (
        f" (CV {variation:.2f})" if variation >= VARIATIONS[0][0] else ""
    )


def partition_table(statistics: Mapping[str, Any], width: int, most: int = 16) -> Table:
    """Draw `fedloom.data.partition.partition_statistics`, largest client first; beyond `most` clients the middle is left out.

    Labels have a column each where that fits into `width` characters; else the three commonest at each client are named.
    """
    wide = _partition_table(statistics, most, True)
    return wide if table_width(wide) <= width else _partition_table(statistics, most, False)


def _partition_table(statistics: Mapping[str, Any], most: int, wide: bool) -> Table:
    names, clients = statistics["label_names"], statistics["clients"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("client")
    for heading in ("train", "held out", "words", *(names if wide else ["commonest labels"])):
        table.add_column(heading, justify="right")
    order = sorted(clients, key=lambda name: (-clients[name]["examples"], name))
    for position, name in enumerate(order):
        if most // 2 <= position < len(order) - most // 2 and len(order) > most:
            if position == most // 2:
                table.add_row("…", f"{len(order) - most // 2 * 2} more")
            continue
        client = clients[name]
        ranked = sorted(range(len(names)), key=lambda label: -client["labels"][label])[:3]
        commonest = ", ".join(f"{names[i]} {client['labels'][i]}" for i in ranked if client["labels"][i])
        labels = map(str, client["labels"]) if wide else [commonest]
        table.add_row(name, str(client["examples"]), str(client["held_out"]), f"{client['mean_words']:.0f}", *labels)
    return table
