"""The whole job of one federated fine-tuning: fedloom, a hand-written loop, pfl, Flower's simulation, APPFL's simulator.

    python -m bench.peers [--jobs NAME ...] [--systems NAME ...] [--repeats 3] [--first N] [--cache DIR] [--shared DIR] [--summary]

Jobs: `tinybert-20` (a random BERT of two layers, 20 clients of 64 examples, 5 rounds of 4 clients, 4 steps of 16), `minilm-mrpc`
(all-MiniLM-L6-v2, 20 clients, 3 rounds of 4, 8 steps of 8), `minilm-mrpc-own` and `minilm-mrpc-dropout`. LoRA of rank 8 on query
and value and a head, AdamW, plain averaging, dropout off. All systems have the same start and the same cohorts; in the first two
jobs the same batches too, fedloom's own, so that training losses must agree to rounding; in `-own` the others have shuffled
batches, as their users have, padded to the longest; in `-dropout` dropout is on, as users have it, and each system drops other
numbers. All end by scoring 256 test examples. The others read token ids; fedloom tokenises, and writes its trace and adapter.
`fedloom_two` divides each cohort over two local processes. `fedloom_full` scores the start and every client besides (on a
held-out fifth) and draws its report.

Each run is a fresh process, A B C A B C; everything that it starts is counted (see `measure.py`). One thread in each process;
Flower uses two processors too. `appfl` has its fastest settings and sends the adapter alone, `appfl_default` is as it is shipped.
Peers are installed in environments of their own below `--cache`; one that cannot be is left out with a sentence. CPU seconds are
the primary figure: wall seconds depend on who else uses the machine.

Results go to results/peers.jsonl, one line a run; `--summary` prints the table of what is there. The last line is one JSON object:
for each job and system the ratio of medians to fedloom's in CPU and in wall seconds, and the largest difference of a round's loss.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers.venvs import Missing, python, version
from fedloom.runs.manifest import machine_kind

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "peers.jsonl"
JOBS = ("tinybert-20", "minilm-mrpc", "minilm-mrpc-own", "minilm-mrpc-dropout")
SYSTEMS = ("fedloom", "fedloom_two", "fedloom_full", "plain", "pfl", "flower", "appfl", "appfl_default")
BARS = {"pfl": 1.6, "flower": 3.0, "appfl_default": 4.0}
"""How many times faster the whole job is to be in fedloom."""

LOSS_BAR = 1e-3
OTHER_DRAWS = ("-own", "-dropout")
"""Jobs in which systems draw apart, so that their losses differ."""
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
}
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

Line = dict[str, Any]


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(prog="bench.peers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--first", type=int, default=0, metavar="N", help="first repetition; above 0, lines are appended"
    )
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "fedloom-peers")
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared", help="folder with data/mrpc")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the lines go")
    parser.add_argument("--summary", action="store_true", help="only print the table of what is there")
    given = parser.parse_args()
    if not given.summary:
        run_all(given)
    lines = [json.loads(line) for line in given.out.read_text().splitlines()]
    print(json.dumps({name: show(name, lines) for name in JOBS if any(line["job"] == name for line in lines)}))


def run_all(given: argparse.Namespace) -> None:
    """Every system on every job, in turn."""
    interpreters, folders = find_systems(given.systems, given.cache), build_jobs(given.jobs, given.cache, given.shared)
    about = machine_kind()
    given.out.parent.mkdir(exist_ok=True)
    with given.out.open("a" if given.first else "w") as file:
        for repetition in range(given.first, given.first + given.repeats):
            for name, folder in folders.items():
                for system, interpreter in interpreters.items():
                    line: Line = {"system": system, "version": version(system), "job": name, "repetition": repetition}
                    line |= run_one(system, interpreter, folder) | {"machine": about}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    print(
                        "{job:12s} {repetition} {system:15s} {cpu:8.2f} CPU s {wall:8.2f} s".format(**line), flush=True
                    )


def find_systems(systems: Sequence[str], cache: Path) -> dict[str, str]:
    """The interpreter of each system that can be had."""
    found = {}
    for system in systems:
        try:
            found[system] = python(system, cache)
        except Missing as why:
            print(f"{system} is left out: {why}", flush=True)
    return found


def build_jobs(jobs: Sequence[str], cache: Path, shared: Path) -> dict[str, Path]:
    """The folder of each job that can be made."""
    found = {}
    for name in jobs:
        command = [sys.executable, "-m", "bench.peers.build", name, str(cache / name), str(shared)]
        done = subprocess.run(command, cwd=ROOT, env=surroundings(), stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]}", flush=True)
        else:
            found[name] = cache / name
    return found


def run_one(system: str, interpreter: str, folder: Path) -> Line:
    """One measured run in an empty folder; raises RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "bench.peers.measure", interpreter, "-m", "bench.peers.child", system]
        env = surroundings() | {"FLWR_HOME": scratch, "RAY_TMPDIR": scratch}
        done = subprocess.run([*command, str(folder)], cwd=scratch, env=env, capture_output=True, text=True)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(reports) != 2 or reports[1]["code"]:
        raise RuntimeError(f"{system} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    report, taken = reports
    taken.pop("code")
    return {**taken, **report}


def surroundings() -> dict[str, str]:
    """The environment variables of every process: this tree first, one thread, no network."""
    paths = [str(ROOT), str(ROOT / "src")]
    return {**os.environ, **QUIET, **THREADS, "PYTHONPATH": os.pathsep.join(paths)}


def show(name: str, lines: Iterable[Line]) -> dict[str, Any]:
    """One job's block of the table, and its figures."""
    runs: dict[str, list[Line]] = {}
    for line in lines:
        if line["job"] == name:
            runs.setdefault(line["system"], []).append(line)
    print(f"\n{name}: whole process, median (minimum - maximum)")
    print(f"  {'system':24s} {'CPU s':>22s} {'wall s':>24s} {'MiB':>6s}   CPU s: import, set-up, training, rest")
    for system, own in runs.items():
        phases = [median(run["phases"][phase]["cpu"] for run in own) for phase in ("import", "setup", "train", "end")]
        peak = median(run["peak_bytes"] for run in own) / 2**20
        cells = f"{spread([run['cpu'] for run in own]):>22s} {spread([run['wall'] for run in own]):>24s} {peak:6.0f}"
        print(f"  {system + ' ' + own[0]['version']:24s} {cells}   {', '.join(f'{p:.2f}' for p in phases)}")
    for system, own in runs.items():
        print(f"  loss  {system:18s} " + " ".join(f"{loss:.6f}" for loss in own[0]["losses"]))
    others = {system: own for system, own in runs.items() if system != "fedloom" and "fedloom" in runs}
    return {system: compare(runs["fedloom"], own, system) for system, own in others.items()}


def compare(ours: Sequence[Line], theirs: Sequence[Line], system: str) -> dict[str, float]:
    """Ratios of medians to fedloom's, and the largest difference of a loss; says whether the bars are met."""
    ratios = {kind: median(run[kind] for run in theirs) / median(run[kind] for run in ours) for kind in ("cpu", "wall")}
    pairs = [zip(a["losses"], b["losses"], strict=True) for a in ours for b in theirs]
    difference = max(abs(x - y) for pair in pairs for x, y in pair)
    verdict = ""
    if system in BARS:
        verdict = f" (bar {BARS[system]:.1f}x: {'met' if ratios['cpu'] >= BARS[system] else 'MISSED'})"
    same = not ours[0]["job"].endswith(OTHER_DRAWS) and system != "fedloom_full"
    equal = f"bar {LOSS_BAR:.0e}: {'met' if difference <= LOSS_BAR else 'MISSED'}" if same else "other draws"
    print(
        f"  {system:15s} {ratios['cpu']:5.2f}x CPU seconds of fedloom{verdict}, {ratios['wall']:.2f}x wall seconds; "
        f"loss differs by {difference:.1e} ({equal})"
    )
    return {"cpu_ratio": round(ratios["cpu"], 2), "wall_ratio": round(ratios["wall"], 2), "loss_difference": difference}


def spread(values: Sequence[float]) -> str:
    """Median (minimum - maximum)."""
    return f"{median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    main()
