"""The page of a run with very many tasks and clients, made by `fedloom report`'s own function in a process of its own.

    python -m bench.report [--quick]

The run folder is generated: lines of `metrics.jsonl` with the fields that a run writes, ten tasks a client, ten answers a version,
each hundredth version scored, and at the end a score for each client. CPU seconds and the peak of the resident set are those of the
process that reads the folder and writes the page, imports included. `--quick` leaves out the million.

Then the lines of a trace of FedFa with the smallest adapter are written again, one by one, each flushed: plain, and compressed as
`compress_trace` does it, at its own level and at others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench.memory import peak
from fedloom.core.schema import jsonable
from fedloom.report.page import write_report
from fedloom.simulate.devices import World

SIZES = (10_000, 100_000, 1_000_000)
A_CLIENT, A_VERSION, SCORED = 10, 10, 100
PAGE_BAR, PEAK_BAR = 3.0, 1.0
EVENTS = 3000
RANKS = {"phone": 4, "laptop": 8, "workstation": 16}
WAYS = ("bytes_up", "bytes_down", "bytes_up_dense", "bytes_down_dense", "bytes_down_fold")


def write_folder(folder: Path, tasks: int) -> None:
    """A finished asynchronous run of so many tasks."""
    folder.mkdir()
    profiles = World().profiles({f"c{k:06d}": 10 + k % 90 for k in range(max(1, tasks // A_CLIENT))}, 0)
    clients = {profile.client: jsonable(profile) for profile in profiles}
    about = {"name": "many", "status": "finished", "seed": 0, "clients": clients, "model": {"labels": 2}}
    (folder / "manifest.json").write_text(json.dumps(about))
    ranks = {client: RANKS.get(profile["tier"], 8) for client, profile in clients.items()}
    with (folder / "metrics.jsonl").open("w") as file:
        for line in lines(ranks, tasks):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")


def lines(ranks: dict[str, int], tasks: int) -> Iterator[dict[str, Any]]:
    """The lines of such a run, in the order in which it writes them."""
    dice, names = random.Random(0), list(ranks)
    totals = dict.fromkeys(WAYS, 0)
    yield score(0, 0.0)
    for number in range(1, tasks + 1):
        version, client = (number - 1) // A_VERSION, dice.choice(names)
        line = task(dice, number, client, ranks[client], max(0, version - dice.randrange(9)))
        for way in WAYS:
            totals[way] += line[way]
        yield line
        if number % A_VERSION == 0:
            yield made(dice, version + 1, number, totals)
            if (version + 1) % SCORED == 0:
                yield score(version + 1, number / 7)
    for client, rank in ranks.items():
        share = min(1.0, max(0.0, dice.gauss(0.8, 0.1)))
        yield {
            "kind": "client", "client": client, "tier": "phone", "rank": rank, "held_out": 7, "accuracy": share, "loss": 0.5,
            "f1": share, "base_accuracy": 0.6,
        }  # fmt: skip


def task(dice: random.Random, number: int, client: str, rank: int, start: int) -> dict[str, Any]:
    """The line of a task, nine of ten merged."""
    sent, size, good = number / 7 - 3, 66_000 + 600 * rank, dice.random() < 0.9
    parts = {"down": dice.random(), "train": 5 * dice.random(), "up": dice.random()}
    line = {
        "kind": "task", "id": number, "client": client, "version": start, "rank": rank, "depth": None, "sent": sent,
        "arrived": sent + sum(parts.values()), "status": "merged" if good else "failed",
        "reason": "" if good else "the client stopped: out of memory",
        "kept": 1 - dice.random() / rank if start % SCORED == 0 and start else None, "bytes_down": size,
        "bytes_down_dense": 1542, "bytes_down_fold": 0, "bytes_up": size if good else 0, "bytes_up_dense": 1542 if good else 0,
    }  # fmt: skip
    if not good:
        return line
    return line | {"seconds": parts, "loss": dice.random(), "tokens": 640, "steps": 8, "staleness": dice.randrange(9)}


def made(dice: random.Random, version: int, number: int, totals: dict[str, int]) -> dict[str, Any]:
    """The line of a version."""
    energy = sorted((dice.random() for _ in range(16)), reverse=True) if version % SCORED == 0 else None
    return {
        "kind": "version", "version": version, "time": number / 7, "loss": dice.random(), "rounding": 1e-4 * dice.random(),
        "rounding_change": 1e-3 * dice.random(), "updates": A_VERSION, "staleness": 8 * dice.random(),
        "staleness_max": dice.randrange(4, 9), "uploads": number, "outstanding": 40, "working_seconds": 40 * number / 7,
        "waiting_seconds": 0.0, "held_seconds": 0.0, "cancelled": 0, "rejected": number // 100, **totals,
        "energy": energy and [share / sum(energy) for share in energy], "discarded": 1e-3 * dice.random(),
        "ranks": {"4": 5, "8": 3, "16": 2},
    }  # fmt: skip


def score(version: int, when: float) -> dict[str, Any]:
    """The line of a score."""
    share = 0.9 - 0.4 / (1 + version / 500)
    figures = {"accuracy": share, "f1": share, "loss": 1 - share, "examples": 2000, "base_accuracy": 0.5}
    return {"kind": "score", "version": version, "time": when, **figures}


def report(folder: Path) -> None:
    """In a process of its own: the page, and what it cost."""
    page = folder / "report.html"
    _, highest = peak(lambda: write_report([folder], page))
    print(json.dumps([time.process_time(), highest / 2**30, page.stat().st_size / 1e6]))


def measured(tasks: int) -> tuple[float, float, float]:
    """CPU seconds, peak (GiB) and page (MB) of a run of so many tasks; prints them."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        write_folder(folder, tasks)
        command = [sys.executable, "-m", "bench.report", "--folder", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        log = (folder / "metrics.jsonl").stat().st_size / 1e6
    cpu, highest, page = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{tasks:9,d} tasks, {log:7.1f} MB of metrics: {cpu:6.1f} CPU s, {highest:.2f} GiB at its peak, page {page:.2f} MB",
        flush=True,
    )
    return cpu, highest, page


def packing(folder: Path) -> dict[str, float]:
    """CPU microseconds that compressing a step adds, and how many times smaller the trace is; prints other levels beside it."""
    from bench.simulate import SMALLEST, per_event  # what the page's process does not need
    from fedloom.core import packed_log

    per_event(SMALLEST, EVENTS, folder)
    steps = (folder / "trace.jsonl").read_text().splitlines(keepends=True)
    own, figures = packed_log.LEVEL, dict[str, float]()
    plain, size = written(folder, steps, packed=False)
    print(f"\n{len(steps):,} steps of a trace, {size / len(steps):.0f} bytes each, written in {plain:.1f} CPU us each")
    for level in sorted({1, 6, 9, own}):
        packed_log.LEVEL = level
        cost, small = written(folder, steps, packed=True)
        print(f"compressed at level {level}: {cost - plain:.1f} CPU us more, {size / small:.1f} times smaller")
        if level == own:
            figures = {"trace_compression_us_per_step": cost - plain, "trace_compression_ratio": size / small}
    packed_log.LEVEL = own
    return figures


def written(folder: Path, steps: list[str], packed: bool) -> tuple[float, int]:
    """CPU microseconds of a step that is written and flushed, the median of five times, and the bytes of all."""
    from fedloom.runs.resume import open_log

    times = []
    for _ in range(5):
        with open_log(folder / "again.jsonl", 0, packed) as log:
            begun = time.process_time()
            for step in steps:
                log.write(step)
                log.flush()
            times.append((time.process_time() - begun) / len(steps) * 1e6)
    return median(times), (folder / "again.jsonl").stat().st_size


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without the million tasks")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        return report(options.folder)
    sizes = SIZES[:2] if options.quick else SIZES
    figures: dict[str, float] = {}
    for tasks in sizes:
        cpu, highest, page = measured(tasks)
        name = f"report_{tasks // 1000}k"
        figures |= {f"{name}_cpu_seconds": cpu, f"{name}_peak_gib": highest, f"{name}_page_mb": page}
        met = page <= PAGE_BAR and highest <= PEAK_BAR
        print(f"          page under {PAGE_BAR:g} MB, peak under {PEAK_BAR:g} GiB: {'met' if met else 'MISSED'}")
    with tempfile.TemporaryDirectory() as place:
        figures |= packing(Path(place))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
