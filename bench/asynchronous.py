"""An upload in an asynchronous federation of ten thousand clients, with adapters of a real size and without training.

    python -m bench.asynchronous [--quick]

As `bench.simulate`, with adapters of all-MiniLM-L6-v2's shape: rank 8 on query and value of six layers, 384 x 384 each (73,728
numbers). FedFa with a window of ten: every upload makes a version; 100 clients are always at work. In factor space (FedIT) and
in product space (ProductDelta), with 1,000 clients and with 10,000. One thread; CPU seconds of an upload after 120 of warming up,
runs interleaved, median (minimum - maximum). Memory is the highest point of the resident set above its level before the clients
were made, in a fresh process; the store from which the trainer answers (64 adapters, 19 MB) is counted. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.memory import HONEST_MALLOC, extra_peak
from bench.simulate import Case, compare, per_event, say
from fedloom.aggregate.fedit import FedIT
from fedloom.aggregate.product_delta import ProductDelta
from fedloom.core.policies import Aggregator

FEW, MANY, RATIO_BAR = 1_000, 10_000, 1.3
METHODS: dict[str, Aggregator] = {"FedIT": FedIT(), "ProductDelta": ProductDelta()}


def case(method: str, clients: int) -> Case:
    """This many clients under this method."""
    return Case(f"{method}, {clients:,} clients", clients, width=384, rank=8, layers=12, warm=120, how=METHODS[method])


def memory(method: str, clients: int) -> None:
    """In a process of its own: bytes at the highest point of a run."""
    with tempfile.TemporaryDirectory() as folder:
        print(extra_peak(lambda: per_event(case(method, clients), 30, Path(folder))))


def peak(method: str, clients: int) -> int:
    """What `memory` says."""
    command = [sys.executable, "-m", "bench.asynchronous", "--memory", method, str(clients)]
    done = subprocess.run(command, env=os.environ | HONEST_MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bench.asynchronous")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, within two minutes")
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        return memory(options.memory[0], int(options.memory[1]))
    lengths = {"FedIT": 300, "ProductDelta": 30} if options.quick else {"FedIT": 2000, "ProductDelta": 200}
    figures: dict[str, float] = {}
    for method, events in lengths.items():
        few, many = case(method, FEW), case(method, MANY)
        cost = compare((few, many), events, 2 if options.quick else 5)
        ratio, highest = cost[many.name] / cost[few.name], peak(method, MANY) / 1e6
        say(f"cost of an upload, {MANY:,} to {FEW:,} clients", ratio, RATIO_BAR, ratio <= RATIO_BAR)
        print(f"memory, {MANY:,} clients: {highest:.0f} MB\n")
        figures[f"uploads_per_second_{method}"] = 1 / cost[many.name]
        figures[f"cost_ratio_{method}"] = ratio
        figures[f"peak_mb_{method}"] = highest
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
