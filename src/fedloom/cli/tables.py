"""Tables in the terminal: rows of text as the report has them, and how examples are divided over clients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from fedloom.report.run_log import read_run_log
from fedloom.report.tables import Grid, summary_table


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


def runs_in_terminal(folders: Sequence[Path]) -> Table:
    """The runs in these folders, one a row, in the columns that fit into eighty characters."""
    grid = summary_table([read_run_log(folder) for folder in folders])
    return rich_table(grid, ("Run", "Status"), padding=(0, 1, 0, 0), wrap=False)


def partition_table(statistics: Mapping[str, Any], most: int = 16) -> Table:
    """Draw `fedloom.data.partition.partition_statistics`, largest client first; beyond `most` clients the middle is left out.

    Up to eight labels have a column each, of more the three commonest at each client are named.
    """
    names, clients = statistics["label_names"], statistics["clients"]
    measures = "label divergence {label_js:.3f} bits, size variation {size_cv:.2f}".format(**statistics)
    table = Table(
        title=f"{len(clients)} clients, {measures}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("client")
    wide = len(names) <= 8
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
        commonest = ", ".join(f"{names[i]} {client['labels'][i]}" for i in ranked)
        labels = map(str, client["labels"]) if wide else [commonest]
        table.add_row(name, str(client["examples"]), str(client["held_out"]), f"{client['mean_words']:.0f}", *labels)
    return table
