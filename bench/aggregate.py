"""Exact aggregation against peft's `add_weighted_adapter(combination_type="svd")` and against a dense SVD.

    python -m bench.aggregate [--quick]

Both get the same clients, from a PEFT model of one Linear(d, d) with an adapter for each client (random A and B), and
must give the best approximation of rank q to their weighted sum. One thread; times are CPU seconds of the process
(wall seconds beside), interleaved A B A B, median (minimum - maximum). Extra memory is the peak resident set of a fresh
process above its level when the inputs were built and the method had run once at a small size; median over processes,
rough below a megabyte. The gap is error / optimal error - 1, the worst over all client ranks, all cut from the one
decomposition, against float64. `dense.py` has the cases against a dense SVD, and one of 1,000 clients; `blocks.py` one block of a
large language model as an asynchronous server merges it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from bench import blocks, dense
from bench.clients import ALPHA, MIXED, Case, make_clients, server_call, worst_gap
from bench.memory import HONEST_MALLOC, extra_peak
from bench.timing import Time, against, ratio, sample, show, spread, under
from fedloom.core.lora import Factor
from fedloom.core.truncated_svd import svd
from tests.support.degenerate import CASES, measure

CALLS = 10


@dataclass(frozen=True, slots=True)
class Peak:
    """Extra bytes of one call in a fresh process, and the time it took there."""

    extra: int
    time: Time


QUICK = (Case(768, (8,) * 10, time_bar=30), Case(4096, (8,) * 20, time_bar=300, memory_bar=100))
FULL = (*QUICK, Case(768, MIXED * 2), Case(1024, MIXED * 2), Case(1024, MIXED * 8))


def peft_call(case: Case) -> Callable[[], Factor]:
    """The aggregate as PEFT does it, on a real PEFT model."""
    from peft import LoraConfig, get_peft_model

    def config(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=int(ALPHA), target_modules=["0"])

    base = torch.nn.Sequential(torch.nn.Linear(case.d, case.d, bias=False))
    model: Any = get_peft_model(base, config(case.ranks[0]), adapter_name="c0")
    for k, rank in enumerate(case.ranks[1:], 1):
        model.add_adapter(f"c{k}", config(rank))
    layer = model.base_model.model[0]
    names = [f"c{k}" for k in range(len(case.ranks))]
    for name, client in zip(names, make_clients(case), strict=True):
        layer.lora_A[name].weight.data, layer.lora_B[name].weight.data = client.down, client.up
    weights = [1 / len(names)] * len(names)

    def call() -> Factor:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
        with torch.no_grad():
            model.add_weighted_adapter(names, weights, "merged", combination_type="svd", svd_rank=case.rank)
        return Factor(layer.lora_A["merged"].weight.data, layer.lora_B["merged"].weight.data)

    return call


METHODS = {"peft": peft_call, "fedloom": server_call}


def child(method: str, case: Case) -> Peak:
    """Extra memory and time of one call in a fresh process."""
    command = [sys.executable, "-m", "bench.aggregate", "--child", method, str(case.d), *map(str, case.ranks)]
    done = subprocess.run(command, env=os.environ | HONEST_MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    extra, cpu, wall = json.loads(done.stdout.splitlines()[-1])
    return Peak(extra, Time(cpu, wall))


def run_child(method: str, d: int, ranks: tuple[int, ...]) -> None:
    """The inside of `child`."""
    # the same clients at a small size: loads code and starts libraries, which neither method should pay for
    METHODS[method](Case(320, ranks))()
    call = METHODS[method](Case(d, ranks))
    times: list[Time] = []
    extra = extra_peak(lambda: times.append(sample(call)))
    print(json.dumps([extra, times[0].cpu, times[0].wall]))


def run_case(case: Case, repeats: int) -> dict[str, object]:
    """Measure one case, print its block of the table and return its figures.

    Where peft is slow its one run gives both its time and its memory, in a process of its own (in which the allocator
    setting of `memory.py` may cost it up to 10 % of time), with fedloom timed before and after; else both are timed
    here, in turn.
    """
    ours = server_call(case)
    ours()
    if case.slow:
        samples = [sample(ours, CALLS) for _ in range(repeats)]
        peaks, baseline = [child("peft", case)], "not measured"
        times, samples = [peaks[0].time], samples + [sample(ours, CALLS) for _ in range(repeats)]
    else:
        theirs = peft_call(case)
        baseline = f"{worst_gap(case, theirs()):.1e}"
        pairs = [(sample(theirs), sample(ours, CALLS)) for _ in range(repeats)]
        times, samples = [a for a, _ in pairs], [b for _, b in pairs]
        peaks = [child("peft", case) for _ in range(1 if repeats < 10 else 3)]
    figures = compare(case, times, samples, peaks, [child("fedloom", case) for _ in range(3)])
    gap = worst_gap(case, ours())
    if case.slow:
        print("            (peft ran once, in the process that measured its memory; fedloom before and after it)")
    print(f"  gap       {gap:.1e} fedloom {under(gap, 1e-6)}, peft {baseline}")
    return {**figures, "gap": gap}


def compare(
    case: Case, theirs: list[Time], ours: list[Time], their_peaks: list[Peak], our_peaks: list[Peak]
) -> dict[str, object]:
    """The table of one case, and its ratios of medians."""
    print(f"\n{case}")
    for name, times, peaks in (("peft svd", theirs, their_peaks), ("fedloom", ours, our_peaks)):
        show(name, times)
        print(f"  {'':9s} extra MiB {spread([peak.extra / 2**20 for peak in peaks])}")
    time_ratio = ratio(theirs, ours)
    memory_ratio = median(peak.extra for peak in their_peaks) / median(peak.extra for peak in our_peaks)
    print(f"  ratio     {time_ratio:.0f}x CPU time{against(time_ratio, case.time_bar)}")
    print(f"            {memory_ratio:.0f}x extra memory{against(memory_ratio, case.memory_bar)}")
    return {"baseline": "peft_svd", **case.facts, "time_ratio": time_ratio, "memory_ratio": memory_ratio}


def run_degenerate() -> dict[str, object]:
    """The automatic choice on every degenerate case."""
    measured = [measure(up, down, svd(up, down, rank)) for up, down, rank in (case.build() for case in CASES)]
    print("\ndegenerate inputs: error beyond the optimum, relative to the size of the input")
    for case, (finite, excess) in zip(CASES, measured, strict=True):
        print(f"  {case.name:28s} {excess:8.0e} {'' if finite else 'NOT FINITE'}")
    return {
        "cases": len(measured),
        "finite": sum(finite for finite, _ in measured),
        "worst_excess": max(excess for _, excess in measured),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.aggregate")
    parser.add_argument("--quick", action="store_true", help="the square cases with a bar, in under two minutes")
    parser.add_argument("--child", nargs="+", metavar=("METHOD", "NUMBER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        method, d, *ranks = options.child
        return run_child(method, int(d), tuple(int(rank) for rank in ranks))
    cases = [run_case(case, 5 if options.quick else 15) for case in (QUICK if options.quick else FULL)]
    cases += dense.run_dense(dense.QUICK if options.quick else dense.FULL, 5)
    many = {} if options.quick else {"many": dense.run_many()}
    block = blocks.run_block(3 if options.quick else 7)
    print(json.dumps({"cases": cases, **many, "degenerate": run_degenerate(), **block}))


if __name__ == "__main__":
    main()
