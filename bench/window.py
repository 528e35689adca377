"""A sliding window of updates, one replaced at a time, against computing its sum anew.

    python -m bench.window [--quick]

Clients are those of `bench.aggregate`. Recomputing is timed twice: the decomposition alone (`stack`, `svd`), and as a
merge does it (`truncate_sum`), which like the window also gives the energy of the sum. One thread; CPU seconds of the
process, interleaved A B A B, median (minimum - maximum). The difference is of the products, relative to the recomputed
one, after the last update. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice

import torch

from bench.clients import Case, weighted
from bench.timing import Time, against, ratio, sample, show
from fedloom.lora import Factor, norm, stack, truncate, truncate_sum
from fedloom.window import Window

BAR = 2.0
QUICK = ((4096, 50, 16), (4096, 10, 16))
FULL = (*QUICK, (384, 10, 8), (1024, 20, 16), (4096, 20, 32))


def run_case(d: int, clients: int, rank: int, updates: int = 12) -> dict[str, float]:
    """Print the block of one shape and return its figures."""
    arriving = iter(weighted(Case(d, (rank,) * (clients + updates))))
    held = list(islice(arriving, clients))
    weights = [weight for weight, _ in held]
    window = Window(clients, rank, held[0][1])
    for slot, (_, update) in enumerate(held):
        window.put(slot, update)
    results: dict[str, Factor] = {}
    times: dict[str, list[Time]] = {"window": [], "svd alone": [], "merge": []}
    for step, (weight, update) in enumerate(arriving):
        slot = step % clients
        held[slot] = weight, update

        def moved(slot: int = slot, update: Factor = update) -> None:
            window.put(slot, update)
            results["window"] = window.best(weights, rank)[0]

        def anew() -> None:
            results["anew"] = truncate(stack(held), rank)

        taken = sample(moved), sample(anew), sample(lambda: truncate_sum(held, rank))
        for name, time in zip(times, taken, strict=True):
            times[name].append(time)
    difference = norm(stack([(1.0, results["window"]), (-1.0, results["anew"])])) / norm(results["anew"])
    print(f"\nd={d}  clients={clients}  rank={rank}")
    for name, taken_ in times.items():
        show(name, taken_)
    alone, merge = (ratio(times[name], times["window"]) for name in ("svd alone", "merge"))
    bar = BAR if (d, clients, rank) == QUICK[0] else None
    print(
        f"  ratio     {alone:.1f}x to the svd alone{against(alone, bar)}, {merge:.1f}x to a merge{against(merge, bar)}"
    )
    print(f"  differs   by {difference:.0e}")
    figures = {"d": d, "clients": clients, "rank": rank, "svd_ratio": alone, "merge_ratio": merge}
    return {**figures, "difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.window")
    parser.add_argument("--quick", action="store_true", help="the shape with a bar, and a thin one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"cases": [run_case(*shape) for shape in (QUICK if options.quick else FULL)]}))


if __name__ == "__main__":
    main()
