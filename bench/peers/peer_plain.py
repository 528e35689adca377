"""A loop over a PEFT model, written by hand: the least that a simulation of federated averaging can cost."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.peers import job
from bench.peers.clock import Clock


def run(folder: Path, clock: Clock) -> job.Report:
    """Federated averaging in ten lines."""
    work = job.read(folder)
    model = job.load_model(work)
    shared = job.get(model)
    clock.mark("setup")
    losses: list[float] = []
    for cohort in work.rounds:
        states = []
        for task in cohort:
            job.put(model, shared)
            losses += job.train(model, work, task)
            states.append(job.get(model))
        shared = {name: torch.stack([state[name] for state in states]).mean(0) for name in shared}
    job.put(model, shared)
    clock.mark("train")
    return {"losses": job.by_round(work, losses), **job.score(model, work)}
