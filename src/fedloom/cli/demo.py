"""The demo: a help desk of eight companies that cannot share their tickets fine-tunes one encoder together."""

from __future__ import annotations

from dataclasses import replace

from fedloom.aggregate.fedit import FedIT
from fedloom.core.server import Limits
from fedloom.data.partition import ByClient
from fedloom.data.tickets import Tickets
from fedloom.plan.budget import Plan
from fedloom.plan.rank import RankByCapability
from fedloom.runs.run import Run
from fedloom.schedule.rounds import Rounds
from fedloom.train.demo_model import minilm
from fedloom.train.settings import Training


def demo_run() -> Run:
    """Ranks 2, 4 and 8 by device, synchronous rounds, ProductDelta; 144 steps of 16 tickets in all."""
    return Run(
        name="demo-product-delta",
        model=str(minilm()),
        data=Tickets(tangled=0.1, alpha=3.0),
        partition=ByClient(),
        schedule=Rounds(cohort_size=3),
        plan=Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=0.5), local_steps=8),
        training=Training(learning_rate=5e-3, max_length=64),
        limits=Limits(versions=6, evaluate_every=2),
        test_limit=240,
        threads=2,
    )


def baseline_run(run: Run) -> Run:
    """The same federation with the factors averaged apart (FedIT)."""
    return replace(run, name="demo-fedit", aggregator=FedIT())
