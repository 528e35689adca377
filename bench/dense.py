"""The part of `bench.aggregate` that compares with a dense float32 SVD, and the one about very many clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import groupby

import torch

from bench.clients import Case, draw_ranks, server_call, weighted, worst_gap
from bench.memory import HONEST_MALLOC, peak
from bench.timing import Time, against, ratio, sample, show, under
from fedloom.core.lora import stack

QUICK = (Case(4096, draw_ranks(50), time_bar=40), Case(4096, (8,) * 50, time_bar=100))
FULL = (*QUICK, Case(4096, draw_ranks(50), time_bar=80, wide=11008))
MANY = Case(4096, draw_ranks(1000))
MANY_BYTES = 1.5e9


def run_dense(cases: Sequence[Case], repeats: int) -> list[dict[str, object]]:
    """Each case against the SVD of a matrix of its shape, which does not depend on the clients and is timed once.

    Forming the sum is left out of the dense time, in its favour. Ours is the aggregate as a server does it, with the
    energy before and after for its log; timed before and after the dense SVD.
    """
    figures: list[dict[str, object]] = []
    for _, shaped in groupby(cases, key=lambda case: (case.d, case.d_in)):
        alike = [(case, server_call(case)) for case in shaped]
        for _, call in alike:
            call()
        before = [[sample(call) for _ in range(repeats)] for _, call in alike]
        sum_ = stack(weighted(alike[0][0]))
        theirs = sample(partial(torch.linalg.svd, sum_.up @ sum_.down, full_matrices=False))
        for (case, call), times in zip(alike, before, strict=True):
            times += [sample(call) for _ in range(repeats)]
            figures.append(_compare(case, theirs, times, worst_gap(case, call())))
    return figures


def _compare(case: Case, theirs: Time, ours: list[Time], gap: float) -> dict[str, object]:
    print(f"\n{case}")
    show("dense svd", [theirs])
    show("fedloom", ours)
    time_ratio = ratio([theirs], ours)
    print(f"  ratio     {time_ratio:.0f}x CPU time{against(time_ratio, case.time_bar)}")
    print(f"  gap       {gap:.1e} fedloom {under(gap, 1e-6)}")
    return {"baseline": "dense_svd", **case.facts, "time_ratio": time_ratio, "gap": gap}


def run_many() -> dict[str, object]:
    """The server's merge of a thousand clients, once, in a process of its own: the whole resident set at its highest."""
    command = [sys.executable, "-m", "bench.dense"]
    done = subprocess.run(command, env=os.environ | HONEST_MALLOC, stdout=subprocess.PIPE, text=True, check=True)
    highest, before, cpu, wall, gap = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{MANY}")
    show("fedloom", [Time(cpu, wall)])
    print(f"  peak MB   {highest / 1e6:.0f} {under(highest, MANY_BYTES)}, of which {before / 1e6:.0f} before the merge")
    print(f"  gap       {gap:.1e} {under(gap, 1e-6)}")
    return {**MANY.facts, "cpu": cpu, "peak_bytes": highest, "bytes_before": before, "gap": gap}


def main() -> None:
    """The inside of `run_many`."""
    torch.set_num_threads(1)
    server_call(Case(320, MANY.ranks[:20]))()
    call, results, times = server_call(MANY), [], []
    before, highest = peak(lambda: times.append(sample(lambda: results.append(call()))))
    print(json.dumps([highest, before, times[0].cpu, times[0].wall, worst_gap(MANY, results[0])]))


if __name__ == "__main__":
    main()
