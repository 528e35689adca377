"""What experiments share: a grid of cells and seeds, kept as `results/NAME.jsonl`, and the check that it reproduces.

A cell is a function from a seed to a `Run`. Without flags the missing (cell, seed) pairs are run, `--workers` at a time, each
in its own process with one BLAS thread. `--quick` re-runs the first versions of one cell, which are the same as in the whole
run because nothing in a run depends on where it ends, and compares their scores with the committed ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fedloom import Run, manifest, prepare
from fedloom.report.read import read

RESULTS = Path(__file__).parents[1] / "results"
SHARED = Path(__file__).parents[2] / "shared"
TOLERANCE = 0.02
"""By how much an accuracy or a loss may differ on another kind of machine; on the same kind it should not differ at all."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Cells by name, the seeds to run them with, the start of a run that `--quick` re-runs, and what to print of the lines."""

    name: str
    cells: Mapping[str, Callable[[int], Run]]
    seeds: Sequence[int]
    shorten: Callable[[Run], Run]
    summary: Callable[[Sequence[Line]], Line]


def main(grid: Grid) -> None:
    """The command line of an experiment; the last line it prints is one JSON object."""
    parser = argparse.ArgumentParser(description=f"The {grid.name} experiment; results in results/{grid.name}.jsonl.")
    parser.add_argument("--quick", action="store_true", help="re-run the start of one cell and compare, then summarise")
    parser.add_argument("--cell", choices=[*grid.cells], help="with --quick: which cell (default: drawn at random)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--summary", action="store_true", help="only summarise what is in results/")
    given = parser.parse_args()
    if not SHARED.is_dir():
        parser.exit(2, f"this experiment needs the data in {SHARED}, which is not there; see the .md beside it\n")
    if given.quick:
        verdict = reproduce(grid, given.cell or random.choice([*grid.cells]))
    else:
        verdict = {}
        if not given.summary:
            run_missing(grid, given.workers)
    print(json.dumps(verdict | grid.summary(lines(grid.name))))


def lines(name: str) -> list[Line]:
    """The committed results."""
    path = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def hashed(run: Run) -> str:
    """The hash that names the run's settings."""
    return manifest.digest(manifest.plain(run))


def run_missing(grid: Grid, workers: int) -> None:
    """Run what is not in the results yet and append it, as it comes."""
    have = {(line["cell"], line["run_hash"]) for line in lines(grid.name)}
    pairs = [(cell, seed) for seed in grid.seeds for cell in grid.cells]
    todo = [(cell, seed) for cell, seed in pairs if (cell, hashed(grid.cells[cell](seed))) not in have]
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, (RESULTS / f"{grid.name}.jsonl").open("a") as file:
        futures = [pool.submit(carry_out, cell, seed, grid.cells[cell](seed)) for cell, seed in todo]
        for done, future in enumerate(as_completed(futures), 1):
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(
                f"{done}/{len(todo)}  {line['cell']}  seed {line['seed']}  accuracy {line['accuracy']:.4f}", flush=True
            )


def carry_out(cell: str, seed: int, run: Run) -> Line:
    """One run as a line of results."""
    with tempfile.TemporaryDirectory() as scratch:
        outcome = prepare(run).execute(Path(scratch) / "run")
        log = read(outcome.folder)
    last, versions = outcome.scores[-1], log.versions
    clients = [float(line["accuracy"]) for line in log.clients]
    return {
        "cell": cell,
        "seed": seed,
        "accuracy": last["accuracy"],
        "f1": last["f1"],
        "curve": [[line["version"], line["time"], line["accuracy"]] for line in log.scores],
        "losses": [line["loss"] for line in versions],
        "bytes_up": versions[-1]["bytes_up"] if versions else 0,
        "bytes_up_dense": versions[-1]["bytes_up_dense"] if versions else 0,
        "virtual_seconds": versions[-1]["time"] if versions else 0.0,
        "energy2": sum(versions[-1]["energy"][:2]) if versions else None,
        "worst_client": min(clients),
        "mean_client": sum(clients) / len(clients),
        "run_hash": hashed(run),
        "machine": manifest.machine()["cpu"],
    }


def reproduce(grid: Grid, cell: str) -> Line:
    """Re-run the start of a committed cell; compare each version's training loss, and scores of the same examples."""
    committed = next((line for line in lines(grid.name) if line["cell"] == cell), None)
    if committed is None:
        return {"reproduced": False, "cell": cell, "why": "no committed result"}
    run = grid.cells[cell](committed["seed"])
    short = grid.shorten(run)
    if hashed(run) != committed["run_hash"]:
        return {"reproduced": False, "cell": cell, "why": "the committed result had other settings"}
    again = carry_out(cell, committed["seed"], short)
    pairs = list(zip(committed.get("losses", ()), again["losses"], strict=False))
    if short.test_limit == run.test_limit:
        known = {version: accuracy for version, _, accuracy in committed["curve"]}
        pairs += [(known[version], accuracy) for version, _, accuracy in again["curve"] if version in known]
    gap = max(abs(old - new) for old, new in pairs)
    same = again["machine"] == committed["machine"]
    print(f"{cell}, seed {committed['seed']}: {len(pairs)} losses and accuracies, largest difference {gap:.6f}")
    return {"reproduced": gap <= TOLERANCE, "cell": cell, "largest_difference": gap, "same_kind_of_machine": same}


def rounds_to(line: Line, target: float) -> int | None:
    """The first scored version at or above the target accuracy."""
    return next((version for version, _, accuracy in line["curve"] if accuracy >= target), None)


def table(found: Sequence[Line], cells: Sequence[str], target: float) -> str:
    """A Markdown table: a row a cell, mean and range over seeds."""
    rows = [
        "| method | seeds | final accuracy (range) | versions to target | worst client | MB up (head) | first 2 directions |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        own = [line for line in found if line["cell"] == cell]
        if not own:
            continue
        accuracy = [100 * line["accuracy"] for line in own]
        reached = [rounds_to(line, target) for line in own]
        energy = [line["energy2"] for line in own]
        rows.append(
            f"| {cell} | {len(own)} | {sum(accuracy) / len(own):.1f} % ({min(accuracy):.1f}–{max(accuracy):.1f}) "
            f"| {', '.join('never' if r is None else str(r) for r in reached)} "
            f"| {100 * sum(line['worst_client'] for line in own) / len(own):.0f} % "
            f"| {own[0]['bytes_up'] / 1e6:.2f} ({own[0]['bytes_up_dense'] / 1e6:.2f}) "
            f"| {sum(energy) / len(energy):.2f} |"
        )
    return "\n".join(rows)
