"""The federation of the experiments that write text, and the clients left out of it, on which their base model is trained.

Natural Instructions (Wang et al. 2022, "Super-NaturalInstructions") as FlexLoRA divides it: one task, one client. Of the
160 clients here `FEDERATED` drawn ones federate. The small base model (`small_llama.py`) sees the others only, and of them no row
whose input a federated client has too: tasks of one source share sentences. Dolly and GSM8K it does not see at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fedloom import Instructions
from fedloom.core.seeds import rng
from fedloom.data.file_formats import read_table_file

SHARED = Path(__file__).parents[2] / "shared" / "data"
TASKS = SHARED / "natural_instructions" / "clients.jsonl.gz"
MODEL = Path(__file__).parents[1] / "models" / "small-llama"
"""Where `small_llama.py` puts the base model."""

FEDERATED = 60

Row = Mapping[str, object]


@cache
def rows() -> tuple[Row, ...]:
    """All rows of all clients."""
    columns = read_table_file(TASKS).columns
    return tuple(dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))


@cache
def federated() -> frozenset[object]:
    """The clients that federate."""
    clients = sorted({int(str(row["client"])) for row in rows()})
    return frozenset(rng(0, "generation", "federated").sample(clients, FEDERATED))


def federation_rows() -> list[Row]:
    """What the clients that federate have."""
    return [row for row in rows() if row["client"] in federated()]


def base_rows() -> list[Row]:
    """What the base model is trained and tried on: rows of the other clients, without the inputs of those that federate."""
    known = {row["input"] for row in federation_rows()}
    return [row for row in rows() if row["client"] not in federated() and row["input"] not in known]


def natural_instructions(given: object = federation_rows) -> Instructions:
    """The source of these rows; each client has one kind of task, its own."""
    return Instructions(
        given,  # type: ignore[arg-type]
        context="input",
        answer="output",
        client="client",
        kind="category",
        split="split",
    )
