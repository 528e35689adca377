"""Tables in the terminal: the report's rows as texts, and a partition that fits the screen."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from fedloom.cli.tables import partition_table, runs_in_terminal
from fedloom.core.seeds import simulated_secret
from fedloom.data.examples import Examples
from fedloom.data.partition import IID, hold_out, partition_statistics


@pytest.mark.parametrize(("clients", "labels", "rows"), [(5, 4, 5), (100, 4, 17), (100, 30, 17)])
def test_a_partition_fits_a_terminal(clients: int, labels: int, rows: int) -> None:
    kinds = tuple(i % labels for i in range(1000))
    examples = Examples(tuple(f"text {i}" for i in range(1000)), None, kinds, tuple(map(str, range(labels))), None)
    shards = hold_out(IID(clients).split(examples, 0), examples, 0.2, partial(simulated_secret, 0))
    table = partition_table(partition_statistics(examples, shards))
    assert table.row_count == rows
    console = Console(width=110, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"{clients} clients, label divergence" in text
    assert len(text.splitlines()) < 30


def test_a_run_is_a_row_and_its_name_stays_a_text(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "[red]demo[/nothing]", "status": "finished"}))
    table = runs_in_terminal([tmp_path])
    assert table.row_count == 1
    assert "[red]demo[/nothing]" in str(next(iter(table.columns[0].cells)))
