"""The demo's federation as a file to copy and change: `fedloom run experiments/tickets.py --set schedule.cohort_size=2`."""

from __future__ import annotations

from fedloom import ByClient, Limits, Plan, ProductDelta, RankByCapability, Rounds, Run, Tickets, Training
from fedloom.train.demo_model import minilm

run = Run(
    name="tickets",
    model=str(minilm()),
    data=Tickets(clients=8, tangled=0.1, alpha=3.0),
    partition=ByClient(),
    aggregator=ProductDelta(),
    schedule=Rounds(cohort_size=3, over_selection=1.3),
    plan=Plan(RankByCapability(ranks=(2, 4, 8), upload_seconds=0.5), local_steps=8),
    training=Training(learning_rate=5e-3, max_length=64),
    limits=Limits(versions=6, evaluate_every=2),
    test_limit=240,
    transfer=None,
)
