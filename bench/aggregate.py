"""Exact aggregation (stack, then truncate) against peft's `add_weighted_adapter(combination_type="svd")`.

    python -m bench.aggregate [--quick]

Both get the same clients, from a PEFT model of one Linear(d, d) with an adapter for each client (random A and B), and
must give the best approximation of rank q to their weighted sum. One thread; times are CPU seconds of the process
(wall seconds beside), interleaved A B A B, median (minimum - maximum). Extra memory is the peak resident set of a fresh
process above its level when the inputs were built and the method had run once at a small size; median over processes,
rough below a megabyte. The gap is error / optimal error - 1, the worst over all client ranks, all cut from the one
decomposition, against float64 (dense up to d = 1024, QR of the factors above). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.degenerate import CASES, measure
from bench.memory import HONEST_MALLOC, extra_peak
from fedloom.aggregate.combine import best
from fedloom.lora import Factor, cut, energy, norm, stack
from fedloom.lowrank import svd

ALPHA = 16.0
MIXED = (2, 4, 8, 16, 32, 64)
CALLS = 10


@dataclass(frozen=True, slots=True)
class Case:
    """One Linear(d, d) and the LoRA rank of each client; `slow` if peft takes so long that one run must do."""

    d: int
    ranks: tuple[int, ...]
    time_bar: float | None = None
    memory_bar: float | None = None

    @property
    def slow(self) -> bool:
        return self.d > 2048

    @property
    def rank(self) -> int:
        return max(self.ranks)


@dataclass(frozen=True, slots=True)
class Time:
    """CPU and wall seconds of one call."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Peak:
    """Extra bytes of one call in a fresh process, and the time it took there."""

    extra: int
    time: Time


QUICK = (Case(768, (8,) * 10, time_bar=30), Case(4096, (8,) * 20, time_bar=300, memory_bar=100))
FULL = (*QUICK, Case(768, MIXED * 2), Case(1024, MIXED * 2), Case(1024, MIXED * 8))


def make_clients(case: Case) -> list[Factor]:
    """A (r, d) and B (d, r) of each client, as PEFT holds them: the scaling alpha/r is not yet in B.

    Each is a decaying signal that all clients share, plus noise of its own: the slow decay past q is what an inexact
    method gets wrong.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = torch.arange(1, 65).float().rsqrt()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / sqrt(case.d)

    down, up = sizes[:, None] * normal(64, case.d), sizes * normal(case.d, 64)
    return [Factor(down[:r] + 0.3 * normal(r, case.d), up[:, :r] + 0.3 * normal(case.d, r)) for r in case.ranks]


def weighted(case: Case) -> list[tuple[float, Factor]]:
    """The clients with their coefficients: equal weights times alpha/r."""
    return [(ALPHA / client.rank / len(case.ranks), client) for client in make_clients(case)]


def fedloom_call(case: Case) -> Callable[[], Factor]:
    """The aggregate as a server does it: one stack, one truncation at the highest rank, energy before and after for its log."""
    terms = weighted(case)
    return lambda: best(terms, case.rank)[0]


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


METHODS = {"peft": peft_call, "fedloom": fedloom_call}


def sample(call: Callable[[], object], calls: int = 1) -> Time:
    """The mean of some calls in a row; a millisecond alone is too short for the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return Time((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


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


def worst_gap(case: Case, result: Factor) -> float:
    """error / optimal error - 1 in float64, the worst over the client ranks, each a cut of `result`."""
    total = wide(stack([(weight, wide(client)) for weight, client in weighted(case)]))
    dense = None if case.slow else total.up @ total.down
    squares = energy(total) if dense is None else torch.linalg.svdvals(dense).square()

    def error(rank: int) -> float:
        part = cut(wide(result), rank)
        if dense is None:
            return norm(stack([(1.0, total), (-1.0, part)]))
        return float((dense - part.up @ part.down).norm())

    return max(error(rank) / float(squares[rank:].sum().sqrt()) - 1 for rank in set(case.ranks))


def wide(factor: Factor) -> Factor:
    """In float64."""
    return Factor(factor.down.double(), factor.up.double())


def run_case(case: Case, repeats: int) -> dict[str, object]:
    """Measure one case, print its block of the table and return its figures.

    Where peft is slow its one run gives both its time and its memory, in a process of its own (in which the allocator
    setting of `memory.py` may cost it up to 10 % of time), with fedloom timed before and after; else both are timed
    here, in turn.
    """
    ours = fedloom_call(case)
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
    print(f"  gap       {gap:.1e} fedloom (bar 1e-06: {'met' if gap <= 1e-6 else 'MISSED'}), peft {baseline}")
    return {**figures, "gap": gap}


def compare(
    case: Case, theirs: list[Time], ours: list[Time], their_peaks: list[Peak], our_peaks: list[Peak]
) -> dict[str, object]:
    """The table of one case, and its ratios of medians."""
    spread_of_ranks = "..".join(str(rank) for rank in sorted({min(case.ranks), case.rank}))
    shape = {"d": case.d, "clients": len(case.ranks), "rank": case.rank, "sum_rank": sum(case.ranks)}
    print(f"\nd={case.d}  clients={len(case.ranks)}  ranks={spread_of_ranks}  sum of ranks={sum(case.ranks)}")
    for name, times, peaks in (("peft svd", theirs, their_peaks), ("fedloom", ours, our_peaks)):
        print(f"  {name:9s} CPU ms    {spread([t.cpu * 1e3 for t in times])}")
        print(f"  {'':9s} wall ms   {spread([t.wall * 1e3 for t in times])}")
        print(f"  {'':9s} extra MiB {spread([peak.extra / 2**20 for peak in peaks])}")
    time_ratio = median(t.cpu for t in theirs) / median(t.cpu for t in ours)
    memory_ratio = median(peak.extra for peak in their_peaks) / median(peak.extra for peak in our_peaks)
    print(f"  ratio     {time_ratio:.0f}x CPU time{against(time_ratio, case.time_bar)}")
    print(f"            {memory_ratio:.0f}x extra memory{against(memory_ratio, case.memory_bar)}")
    return {"baseline": "peft_svd", **shape, "time_ratio": time_ratio, "memory_ratio": memory_ratio}


def spread(values: Sequence[float]) -> str:
    """Median (minimum - maximum)."""
    return f"{median(values):10.2f} ({min(values):.2f} - {max(values):.2f}, n={len(values)})"


def against(ratio: float, bar: float | None) -> str:
    """Whether a bar, if there is one, was reached."""
    return "" if bar is None else f" (bar {bar:.0f}x: {'met' if ratio >= bar else 'MISSED'})"


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
    parser.add_argument("--quick", action="store_true", help="the two cases with a bar, in under two minutes")
    parser.add_argument("--child", nargs="+", metavar=("METHOD", "NUMBER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        method, d, *ranks = options.child
        return run_child(method, int(d), tuple(int(rank) for rank in ranks))
    cases = [run_case(case, 5 if options.quick else 15) for case in (QUICK if options.quick else FULL)]
    print(json.dumps({"cases": cases, "degenerate": run_degenerate()}))


if __name__ == "__main__":
    main()
