"""The rates of the FedFa experiment: each method on the same small grid, on a seed that the experiment does not use.

    python experiments/fedfa_rates.py [--summary] [--workers N]

AG News and SST-2 (the methods of the first block, at two rates), log-normal devices, 300 uploads. Where a method has a server rate of
its own, two values of it. What is chosen is the earliest time to the experiment's target, and among those that never get there the
best end. The synchronous methods learn alike, whatever their clocks say: they share FedAvg's rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fedfa_speed import CLIENTS, Method, cell, final, reached
from grid import Grid, Line, main, start

from fedloom import (
    CA2FL,
    FADAS,
    Averaged,
    Constant,
    FedAsync,
    FedBuff,
    FedFa,
    FedIT,
    Immediate,
    Limits,
    Polynomial,
    Rounds,
    Run,
    uniform,
)

RATES, SEED, UPLOADS = (5e-3, 1e-2, 2e-2), 100, 300
TUNED = {"iid": RATES, "dir0.1": RATES, "sst2-iid": RATES[:2], "sst2-dir0.1": RATES[:2], "mrpc-iid": (1e-3, 3e-3, 1e-2)}
FEW = ("fedavg", "fedbuff", "fedasync", "fedfa", "ours-0.4")
VARIANTS = {
    "fedavg": Method(Rounds(20, weigh=uniform)),
    "fedbuff": Method(FedBuff(10)),
    "fedbuff-half": Method(FedBuff(10, server_learning_rate=0.5)),
    "fedasync": Method(FedAsync()),
    "fedasync-0.9": Method(FedAsync(0.9)),
    "fedfa": Method(FedFa(10)),
    "fedfa-delta": Method(FedFa(10, delta_rate=0.1)),
    "ca2fl": Method(FedBuff(10, discount=Constant()), CA2FL(FedIT(), CLIENTS)),
    "fadas-0.01": Method(FedBuff(10, discount=Constant(), delay_threshold=1), FADAS(FedIT(), 1e-2)),
    "fadas-0.001": Method(FedBuff(10, discount=Constant(), delay_threshold=1), FADAS(FedIT(), 1e-3)),
    "fadas-0.03": Method(FedBuff(10, discount=Constant(), delay_threshold=1), FADAS(FedIT(), 3e-2)),
    "ours-0.1": Method(Immediate(0.1), Averaged(FedIT())),
    "ours-0.4": Method(Immediate(0.4, discount=Polynomial(0.5)), Averaged(FedIT())),
}


def tried(name: str, split: str, rate: float, seed: int) -> Run:
    """A variant at a rate, shorter than in the experiment."""
    method = replace(VARIANTS[name], rates=(rate, rate))
    run = cell(method, split, "lognormal", f"{name}/{split}@{rate:g}", seed)
    versions = run.limits.versions * UPLOADS // 400
    limits = Limits(versions=versions, evaluate_every=run.limits.evaluate_every)
    return replace(run, limits=limits, training=replace(run.training, learning_rate=rate))


CELLS = {
    f"{name}/{split}@{rate:g}": partial(tried, name, split, rate)
    for split, rates in TUNED.items()
    for rate in rates
    for name in (VARIANTS if rates is RATES else FEW)
}


def summary(found: Sequence[Line]) -> Line:
    """Seconds to the target and the accuracy at the end, by variant, split and rate; the best rate of each."""
    best = {}
    for name in VARIANTS:
        for split in TUNED:
            told = {}
            for line in found:
                if line["cell"].startswith(f"{name}/{split}@"):
                    hit = reached({**line, "cell": f"{name}/{split}/lognormal"})
                    told[line["cell"].split("@")[1]] = (hit[0] if hit else float("inf"), final(line))
            if told:
                shown = "  ".join(f"{rate}: {time:.1f} s, {100 * end:.1f} %" for rate, (time, end) in told.items())
                print(f"{name:13s} {split:7s} {shown}")
                best[f"{name}/{split}"] = min(told, key=lambda rate: (told[rate][0], -told[rate][1]))
    return best


GRID = Grid("fedfa_rates", CELLS, (SEED,), 0.0, start, summary)

if __name__ == "__main__":
    main(GRID)
