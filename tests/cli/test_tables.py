"""Tables in the terminal: the report's rows as texts, and a partition that fits the screen."""

from __future__ import annotations

import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fedloom.cli.tables import partition_table, partition_words, runs_in_terminal
from fedloom.core.seeds import simulated_secret
from fedloom.data.examples import Examples
from fedloom.data.partition import IID, hold_out, partition_statistics


@pytest.mark.parametrize(("clients", "labels", "rows"), [(5, 4, 5), (100, 4, 17), (100, 30, 17)])
def test_a_partition_fits_a_terminal(clients: int, labels: int, rows: int) -> None:
    kinds = tuple(i % labels for i in range(1000))
    examples = Examples(tuple(f"text {i}" for i in range(1000)), None, kinds, tuple(map(str, range(labels))), None)
    shards = hold_out(IID(clients).split(examples, 0), examples, 0.2, partial(simulated_secret, 0))
    statistics = partition_statistics(examples, shards)
    for width in (60, 80, 200):
        table = partition_table(statistics, width)
        assert table.row_count == rows
        assert whole(table, width)
    assert re.fullmatch(
        r"labels [a-z ]+ \(JSD 0\.\d{3}\), [a-z]+ sizes( \(CV \d\.\d\d\))?", partition_words(statistics)
    )


def whole(table: Table, width: int) -> bool:
    """Whether a table has no line that is too long and nothing that was cut."""
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    cells = [str(cell) for column in table.columns for cell in column.cells]
    return max(map(len, lines)) <= width and sum("…" in line for line in lines) == ("…" in cells)


@pytest.mark.parametrize("runs", [1, 2, 4, 9])
def test_runs_fit_any_terminal_and_show_more_in_a_wide_one(finished: Path, tmp_path: Path, runs: int) -> None:
    folders = [finished]
    for number in range(1, runs):
        folders.append(tmp_path / f"run-{number}")
        folders[-1].mkdir()
        for name in ("manifest.json", "metrics.jsonl"):
            (folders[-1] / name).write_bytes((finished / name).read_bytes())
    tables = [runs_in_terminal(folders, width) for width in (60, 80, 300)]
    assert all(whole(table, width) for table, width in zip(tables, (60, 80, 300), strict=True))
    assert tables[2].row_count == runs
    shown = [{str(column.header) for column in table.columns} for table in tables]
    assert shown[2] >= {"Run", "Accuracy", "Majority", "Uploads"}
    assert runs <= 4 or shown[0] < shown[1] < shown[2]
    assert runs > 4 or tables[0].row_count in (runs, len(tables[2].columns) - 1)


def test_a_run_is_a_row_and_its_name_stays_a_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "[red]demo[/nothing]", "status": "finished"}))
    table = runs_in_terminal([tmp_path], 80)
    assert table.row_count == 1
    assert "[red]demo[/nothing]" in str(next(iter(table.columns[0].cells)))
