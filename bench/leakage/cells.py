"""What is measured: attacks at settings that a site allows by default, and at those where they succeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.leakage import labels, places, rows, words
from bench.leakage.scene import Scene, Setting
from fedloom.deploy.site.limits import SiteLimits, is_allowed

MEASURES: Mapping[str, Callable[..., dict[str, float]]] = {
    "words": words.measure,
    "places": places.measure,
    "rows": rows.measure,
    "labels": labels.measure,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One attack at one setting.

    Fields:
        kind: "words", "places", "rows" or "labels".
        setting: how the clients train.
        size: arguments of the attack: numbers of clients and shadow clients.
        seeds: seeds that are collected.
        ordinary: whether the figures of the last line are taken from it: within the default limits, at the usual learning rate.
        dropout: of the adapter's inputs.
    """

    kind: str
    setting: Setting
    size: Mapping[str, Any]
    seeds: int = 3
    ordinary: bool = False
    dropout: float = 0.05
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        facts = {"kind": self.kind, **asdict(self.setting), **self.size, "dropout": self.dropout}
        facts["frozen"] = list(self.setting.frozen)
        object.__setattr__(self, "facts", facts)

    def measure(self, scene: Scene) -> dict[str, float]:
        """Train the clients, attack them and return the figures."""
        return MEASURES[self.kind](scene, self.setting, **self.size)


def allowed(setting: Setting) -> bool:
    """Return whether a site with default limits would train so (answers that are summed are none of its limits)."""
    limits = SiteLimits()
    asked = {
        "rank": setting.rank,
        "least_rows": setting.rows_used,
        "least_batch": setting.batch,
        "least_steps": setting.steps,
        "epochs": setting.epochs,
        "learning_rate": setting.learning_rate,
        "clip": setting.clip,
        "least_clip": setting.clip,
        "length": setting.length,
    }
    return all(is_allowed(name, getattr(limits, name), value) for name, value in asked.items())


FEW, MANY = {"shadows": 3, "targets": 4}, {"shadows": 6, "targets": 8}
CLIENTS = {"clients": 12, "sums": True}
ONE_ROW = Setting(rows=1, batch=1, steps=1, seed_known=True)
FOUR = Setting(rows=20, batch=4, steps=1)
LINEAR = Setting(rows=1, batch=1, steps=1, seed_known=True, length=16, learning_rate=1e10, clip=1e-16)

CELLS = {
    "words, an epoch": Cell("words", Setting(), FEW, 5, ordinary=True),
    "rows, an epoch": Cell("rows", Setting(), CLIENTS, 5, ordinary=True),
    "places, an epoch": Cell("places", Setting(), {"targets": 3}, 5, ordinary=True),
    "labels, an epoch": Cell("labels", Setting(), {"targets": 5}, 5, ordinary=True),
    "words, two steps": Cell("words", Setting(steps=2), MANY),
    "words, two steps of 16": Cell("words", Setting(batch=16, steps=2), FEW),
    "words, two steps of 32": Cell("words", Setting(batch=32, steps=2), FEW),
    "words, one step of 4": Cell("words", FOUR, MANY),
    "words, one step of 4, noise": Cell("words", replace(FOUR, noise=0.01), MANY),
    "words, first task, one step": Cell("words", Setting(rows=20, batch=4, steps=1, later=False), FEW),
    "labels, two steps": Cell("labels", Setting(steps=2), {"targets": 8}),
    "places, one row, rank 16": Cell("places", Setting(16, 1, 1, 1, seed_known=True), {"targets": 4}),
    "places, one row": Cell("places", ONE_ROW, {"targets": 4}),
    "places, one row, seed unknown": Cell("places", Setting(rows=1, batch=1, steps=1), {"targets": 4}),
    "places, two steps": Cell("places", Setting(steps=2), {"targets": 3}),
    "places, linear": Cell("places", LINEAR, {"targets": 4}, dropout=0.0),
    "rows, four epochs": Cell("rows", Setting(rows=20, batch=4, steps=20), CLIENTS),
    "rows, rate of 1e-2": Cell("rows", Setting(learning_rate=1e-2), CLIENTS),
    "words, 20 rows": Cell("words", Setting(rows=20, batch=4, steps=5), FEW),
    "words, rank 2": Cell("words", Setting(rank=2, rows=20, batch=4, steps=1), MANY),
    "places, one row, rank 2": Cell("places", Setting(2, 1, 1, 1, seed_known=True), {"targets": 4}),
    "words, sum of five": Cell("words", Setting(rows=20, batch=4, steps=5, summed=5), {"shadows": 3, "targets": 3}),
    "rows, 20 rows": Cell("rows", Setting(rows=20, batch=4, steps=5), CLIENTS),
    "rows, depth 1": Cell("rows", Setting(rows=20, batch=4, steps=20, depth=1), CLIENTS),
    "rows, frozen down": Cell("rows", Setting(rows=20, batch=4, steps=20, frozen=("down",)), CLIENTS),
    "words, two steps of 48": Cell("words", Setting(batch=48, steps=2), FEW),
}
QUICK = "words, two steps"
"""The cell that `--quick` measures again."""
