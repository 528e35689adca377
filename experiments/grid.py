"""What experiments share: a grid of cells and seeds, kept as `results/NAME.jsonl`, and the check that it reproduces.

A cell is a function from a seed to a `Run`. Without flags the missing (cell, seed) pairs are run, `--workers` at a time, each
in its own process with one BLAS thread. `--quick` re-runs the first versions of one cell, which are the same as in the whole
run because nothing in a run depends on where it ends, and compares their scores with the committed ones.

A line is a result as long as the settings of its cell are those of today. Results of an earlier version, whose figures do not come
again, lie in `results/archive/` and are quoted only as history; `made_by.json` there has the last commit that made some of them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from claims import Claim, judged

from fedloom.core.mean_interval import half_width
from fedloom.core.schema import RENAMED, jsonable

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from fedloom import Job, Run, prepare
from fedloom.core.events import Command, Event
from fedloom.report.run_log import RunLog, read_run_log
from fedloom.runs import manifest

RESULTS = Path(__file__).parents[1] / "results"
ARCHIVE = RESULTS / "archive"
SHARED = Path(__file__).parents[2] / "shared"
TOLERANCE = 0.02
"""By how much an accuracy or a loss may differ on another kind of machine; on the same kind it must not differ at all."""

Line = dict[str, Any]


class Probe(Protocol):
    """An observer of a run, with figures of its own for the run's line of results."""

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """As any observer."""

    def figures(self) -> Line:
        """What it found."""


@dataclass(frozen=True)
class Grid:
    """Cells by name, the seeds to run them with, the start of a run that `--quick` re-runs, and what to print of the lines.

    `target` is an accuracy fixed before the runs; `usual` the cells that are run without `--only`, where a whole grid would
    take a machine with an accelerator (None: all). `table` writes the results down (None: `rows_of`), `probe` makes what looks on
    at a run (None: nobody). `claims` are what the results are to decide; `seeds_of` says how many of the seeds a cell is run
    with (None: all), `quick` which cells `--quick` draws from, where the start of some takes longer than two minutes (None: all).
    """

    name: str
    cells: Mapping[str, Callable[[int], Run]]
    seeds: Sequence[int]
    target: float
    shorten: Callable[[Run], Run]
    summary: Callable[[Sequence[Line]], Line]
    usual: Sequence[str] | None = None
    table: Callable[[Sequence[Line], Iterable[str], float], str] | None = None
    probe: Callable[[Job], Probe] | None = None
    claims: Callable[[Sequence[Line]], Sequence[Claim]] | None = None
    seeds_of: Callable[[str], int] | None = None
    quick: Sequence[str] | None = None


def main(grid: Grid) -> None:
    """The command line of an experiment; the last line it prints is one JSON object."""
    parser = argparse.ArgumentParser(description=f"The {grid.name} experiment; results in results/{grid.name}.jsonl.")
    parser.add_argument("--quick", action="store_true", help="re-run the start of one cell and compare, then summarise")
    parser.add_argument("--cell", choices=[*grid.cells], help="with --quick: which cell (default: drawn at random)")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each (default 2)")
    parser.add_argument("--summary", action="store_true", help="only summarise what is in results/")
    parser.add_argument("--archive", action="store_true", help="only summarise what is in results/archive/")
    parser.add_argument(
        "--rehash", action="store_true", help="name the lines by today's names of policies, then summarise"
    )
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="run the cells whose names fit: 'hlora*', or '*'")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"run the first N seeds (default {len(grid.seeds)})")
    parser.add_argument("--device", default="cpu", help="where to train, for instance cuda (default cpu)")
    given = parser.parse_args()
    if not SHARED.is_dir():
        parser.exit(2, f"this experiment needs the data in {SHARED}, which is not there; see the .md beside it\n")
    verdict: Line = {}
    if given.rehash:
        verdict = {"rehashed": rehash(grid)}
    elif given.quick:
        verdict = reproduce(grid, given.cell, given.device)
    elif not given.summary and not given.archive:
        run_missing(grid, given.workers, given.only, given.seeds, given.device)
    found = archived(grid) if given.archive else current(grid)
    print((grid.table or rows_of)(found, grid.cells, grid.target))
    print(json.dumps(verdict | grid.summary(found) | ({} if given.archive else decided(grid, found))))


def decided(grid: Grid, found: Sequence[Line]) -> Line:
    """The claims of an experiment with their verdicts, and the fewest seeds of any; empty where it has none."""
    claims = grid.claims(found) if grid.claims else ()
    return {"seeds": min(claim.seeds for claim in claims), "claims": judged(claims)} if claims else {}


def current(grid: Grid) -> list[Line]:
    """The results of cells as they are defined now; what had other settings does not count."""
    known = [line for line in lines_of(RESULTS / f"{grid.name}.jsonl") if line["cell"] in grid.cells]
    return [line for line in known if line["run_hash"] == hashed(grid.cells[line["cell"]](line["seed"]))]


def archived(grid: Grid) -> list[Line]:
    """The results of an earlier version, whatever the settings of their cells are today; of several of a cell and seed the last."""
    return [*{(line["cell"], line["seed"]): line for line in lines_of(ARCHIVE / f"{grid.name}.jsonl")}.values()]


def lines_of(path: Path) -> list[Line]:
    """The lines of a file of results; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def made_by(grid: Grid) -> str:
    """The last commit that made archived results of this experiment."""
    commits: dict[str, str] = json.loads((ARCHIVE / "made_by.json").read_text())
    return commits[f"{grid.name}.jsonl"]


def hashed(run: Run) -> str:
    """The hash that names the run's settings, wherever it is computed."""
    return manifest.settings_hash(jsonable(on_device(run)))


def on_device(run: Run, device: str = "cpu") -> Run:
    """The run on this device, with one thread unless it says how many: results are compared over machines.

    Activations of frozen layers are kept in the folder that the variable FEDLOOM_CACHE names, if any, for all cells.
    """
    folder, engine = os.environ.get("FEDLOOM_CACHE"), run.engine
    if folder and engine and engine.cache:
        engine = replace(engine, cache_dir=folder)
    return replace(run, device=device, threads=run.threads or 1, engine=engine)


def rehash(grid: Grid) -> int:
    """Replace the hash of each line whose run had it under the earlier names of policies (`RENAMED`); returns how many it were.

    A policy that is renamed changes the hash of a run and nothing that happens in it. Lines with any other hash stay as they are.
    """
    path, count = RESULTS / f"{grid.name}.jsonl", 0
    lines = path.read_text().splitlines()
    for number, text in enumerate(lines):
        line = json.loads(text)
        if line["cell"] not in grid.cells:
            continue
        run = on_device(grid.cells[line["cell"]](line["seed"]))
        if line["run_hash"] == manifest.settings_hash(with_earlier_names(jsonable(run))) != hashed(run):
            lines[number] = text.replace(f'"run_hash": "{line["run_hash"]}"', f'"run_hash": "{hashed(run)}"')
            count += 1
    path.write_text("\n".join(lines) + "\n")
    return count


def with_earlier_names(data: Any) -> Any:
    """Settings as JSON with the names that policies had before they were renamed."""
    if isinstance(data, dict):
        earlier = {new: old for old, new in RENAMED.items()}
        return {
            key: earlier.get(item, item) if key == "type" else with_earlier_names(item) for key, item in data.items()
        }
    return [with_earlier_names(item) for item in data] if isinstance(data, list) else data


def missing(grid: Grid, wanted: Iterable[str], seeds: int | None) -> list[tuple[str, int]]:
    """The wanted cells and seeds that have no result yet, of the first seeds if it is said how many."""
    have, most = {(line["cell"], line["seed"]) for line in current(grid)}, grid.seeds_of or (lambda _: len(grid.seeds))
    places = [(place, cell, seed) for place, seed in enumerate(grid.seeds[:seeds]) for cell in wanted]
    return [(cell, seed) for place, cell, seed in places if place < most(cell) and (cell, seed) not in have]


def run_missing(grid: Grid, workers: int, only: Sequence[str] | None, seeds: int | None, device: str) -> None:
    """Run what is not in the results yet and append it, as it comes."""
    fits = [cell for cell in grid.cells if any(fnmatch.fnmatch(cell, pattern) for pattern in only or ())]
    wanted = fits if only else grid.usual or [*grid.cells]
    if not wanted:
        raise SystemExit(f"no cell fits {only}; there are: {', '.join(grid.cells)}")
    todo, failed = missing(grid, wanted, seeds), []
    RESULTS.mkdir(exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, (RESULTS / f"{grid.name}.jsonl").open("a") as file:
        runs = [(cell, seed, on_device(grid.cells[cell](seed), device)) for cell, seed in todo]
        futures = {pool.submit(carry_out, *one, grid.probe): one[:2] for one in runs}
        for done, future in enumerate(as_completed(futures), 1):
            if future.exception():
                failed.append(futures[future])
                print(f"{done}/{len(todo)}  {futures[future]} failed: {future.exception()!r}", flush=True)
                continue
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(
                f"{done}/{len(todo)}  {line['cell']}  seed {line['seed']}  accuracy {line['accuracy']:.4f}", flush=True
            )
    if failed:
        raise SystemExit(f"failed: {failed}")


def carry_out(cell: str, seed: int, run: Run, probe: Callable[[Job], Probe] | None = None) -> Line:
    """One run as a line of results."""
    with tempfile.TemporaryDirectory() as scratch:
        job = prepare(run)
        looking = [probe(job)] if probe else []
        outcome = job.execute(Path(scratch) / "run", looking, report=False)
        log = read_run_log(outcome.folder)
    last, versions = outcome.scores[-1], log.versions
    clients = sorted(float(line["accuracy"]) for line in log.clients) or [0.0]
    return {
        **{name: value for one in looking for name, value in one.figures().items()},
        "cell": cell,
        "seed": seed,
        "accuracy": last["accuracy"],
        **({"f1": last.get("f1", last.get("f1_macro"))} if "perplexity" not in last else {}),
        **answered(log),
        "curve": [[line["version"], line["time"], line["accuracy"]] for line in log.scores],
        "scores": [metrics(line) for line in log.scores],
        "losses": [line["loss"] for line in versions],
        "bytes_up": versions[-1]["bytes_up"] if versions else 0,
        "bytes_up_dense": versions[-1]["bytes_up_dense"] if versions else 0,
        "bytes_down": versions[-1]["bytes_down"] if versions else 0,
        **(
            {"bytes_edges": sum(line["bytes_down"] + line.get("bytes_up", 0) for line in log.edges)}
            if log.edges
            else {}
        ),
        "virtual_seconds": versions[-1]["time"] if versions else 0.0,
        "energy2": next((sum(line["energy"][:2]) for line in reversed(versions) if line["energy"]), None),
        "uploads": versions[-1]["uploads"] if versions else 0,
        "waiting": versions[-1]["waiting_seconds"] if versions else 0.0,
        "staleness": statistics.mean(line["staleness"] for line in versions) if versions else 0.0,
        "worst_client": clients[0],
        "worst_tenth": statistics.mean(clients[: max(1, len(clients) // 10)]),
        "mean_client": sum(clients) / len(clients),
        "run_hash": hashed(run),
        "machine": processor() if run.device == "cpu" else f"{run.device} ({processor()})",
    }


def metrics(line: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a scored version: loss, accuracy and others."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, float) and name not in ("time", "base_accuracy")
    }


def answered(log: RunLog) -> Line:
    """Of a run that writes text: the perplexity of each scored version, the base first, and the figures of its answers."""
    if "perplexity" not in log.scores[-1]:
        return {}
    return {"perplexities": [line["perplexity"] for line in log.scores], "written": log.generation}


def start(run: Run) -> Run:
    """Until the first scored version."""
    return replace(run, limits=replace(run.limits, versions=run.limits.evaluate_every))


def processor() -> str:
    """The kind of processor, with its instructions."""
    about = manifest.machine_kind()
    return f"{about['cpu']}, {about['instructions']}"


def reproduce(grid: Grid, cell: str | None, device: str) -> Line:
    """Re-run the start of a committed cell; compare each version's training loss, and scores of the same examples.

    It reproduces where nothing differs on the same kind of machine, and nothing by more than `TOLERANCE` on another kind.
    """
    drawn = [cell] if cell else grid.quick or [*grid.cells]
    found = [line for line in current(grid) if line["cell"] in drawn]
    if not found:
        return {"reproduced": False, "cell": cell, "why": "no committed result of these settings"}
    committed = random.choice(found)
    cell = str(committed["cell"])
    run = grid.cells[cell](committed["seed"])
    short = on_device(grid.shorten(run), device)
    again = carry_out(cell, committed["seed"], short)
    gaps = [*differences(committed, again, same_tests=short.test_limit == run.test_limit)]
    gap = max(gaps, default=math.inf)
    same = again["machine"] == committed["machine"]
    about = "the same kind of machine" if same else f"another kind of machine, tolerance {TOLERANCE}"
    print(f"{cell}, seed {committed['seed']}: {len(gaps)} losses and scores, largest difference {gap:.6f} ({about})")
    reproduced = gap <= (0.0 if same else TOLERANCE)
    return {
        "reproduced": reproduced,
        "cell": cell,
        "largest_difference": gap if math.isfinite(gap) else None,
        "same_kind_of_machine": same,
    }


def differences(committed: Line, again: Line, same_tests: bool) -> Iterator[float]:
    """By how much each training loss of a repeated start differs, and with the same test examples each score.

    Private runs and sums tell no training losses. A loss that is no number in both is no difference.
    """
    pairs = [*zip(committed.get("losses", ()), again["losses"], strict=False)]
    if same_tests:
        old = scored(committed)
        pairs += [
            (old[version][name], value)
            for version, scores in scored(again).items()
            for name, value in scores.items()
            if name in old.get(version, ())
        ]
    for before, now in pairs:
        if (before is None) != (now is None) or (before is not None and math.isnan(before) != math.isnan(now)):
            yield math.inf
        elif before is not None:
            yield 0.0 if math.isnan(before) else abs(before - now)


def scored(line: Line) -> dict[int, dict[str, float]]:
    """The metrics of each scored version; of a line from before they were kept the accuracy alone."""
    scores = line.get("scores") or [{"accuracy": accuracy} for *_, accuracy in line["curve"]]
    return {int(version): score for (version, *_), score in zip(line["curve"], scores, strict=True)}


def rounds_to(line: Line, target: float) -> int | None:
    """The first scored version at or above the target accuracy."""
    return next((version for version, _, accuracy in line["curve"] if accuracy >= target), None)


def rows_of(found: Sequence[Line], cells: Iterable[str], target: float) -> str:
    """A Markdown table: a row a cell, mean and range over seeds."""
    rows = [
        f"| method | seeds | final accuracy (range) | F1 | rounds to {100 * target:.0f} % | clients: mean, worst "
        "| MB up (head) | MB down | energy in 2 directions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        own = [line for line in found if line["cell"] == cell]
        if own:
            rows.append(row(cell, own, target))
    return "\n".join(rows)


def row(cell: str, own: Sequence[Line], target: float) -> str:
    """One method's line of the table."""

    def mean(key: str) -> float:
        values = [line[key] for line in own if line.get(key) is not None]
        return sum(values) / len(values) if values else float("nan")

    def told(value: float, form: str) -> str:
        return "–" if math.isnan(value) else format(value, form)

    accuracy = [100 * line["accuracy"] for line in own]
    spread = f"{sum(accuracy) / len(own):.1f} % ({min(accuracy):.1f}–{max(accuracy):.1f})"
    reached = ", ".join("never" if r is None else str(r) for r in (rounds_to(line, target) for line in own))
    columns = (
        cell,
        str(len(own)),
        *(("–", "–", "–") if personal(cell) else (spread, f"{mean('f1'):.3f}", reached)),
        f"{100 * mean('mean_client'):.0f} %, {100 * mean('worst_client'):.0f} %",
        f"{mean('bytes_up') / 1e6:.2f} ({mean('bytes_up_dense') / 1e6:.2f})",
        told(mean("bytes_down") / 1e6, ".2f"),
        told(mean("energy2"), ".2f"),
    )
    return f"| {' | '.join(columns)} |"


def personal(cell: str) -> bool:
    """Whether every client has a model of its own there (FedSA): the global accuracy says nothing, the clients' mean does."""
    return cell.startswith("fedsa")


def paired(found: Sequence[Line], one: str, other: str) -> list[float]:
    """Points by which `one` is better than `other`, seed by seed; by the clients' mean if one of them is personal."""
    figure = "mean_client" if personal(one) or personal(other) else "accuracy"
    by = {(line["cell"], line["seed"]): line[figure] for line in found}
    seeds = sorted({line["seed"] for line in found})
    return [100 * (by[one, s] - by[other, s]) for s in seeds if (one, s) in by and (other, s) in by]


def interval(points: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean of paired differences (Student's t); None with fewer than two."""
    if len(points) < 2:
        return None
    middle, width = statistics.mean(points), half_width(points)
    return [round(middle - width, 2), round(middle + width, 2)]
