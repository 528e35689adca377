"""The run folder: `manifest.json`, `metrics.jsonl`, `trace.jsonl`, `adapter/`, `report.html`. Never overwritten silently."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from fedloom import payload
from fedloom.aggregate.combine import energy_shares
from fedloom.errors import Refused
from fedloom.lora import Factor, cut, stack
from fedloom.types import (
    Cancel,
    ClientLost,
    Command,
    Dispatch,
    Evaluate,
    Event,
    Model,
    Publish,
    Reject,
    Scored,
    Start,
    Stop,
    Task,
    TaskFailed,
    Update,
    UpdateArrived,
)

DRAFT = ".draft"
"""How the name of a file ends that is not written to its end."""


def vacant(path: Path) -> Path:
    """The path, if a run folder can be made there: asked before long work, and again when it is made."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Refused("--out", str(path), "it exists already; choose another folder or remove it first")
    return path


def create(path: Path) -> Path:
    """A new, empty run folder. Raises Refused if there is something at `path` already."""
    vacant(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused("--out", str(path), f"it cannot be made ({error.strerror})") from error
    return path


def free(parent: Path, name: str) -> Path:
    """The first of parent/name-001, -002, ... that does not exist."""
    number = 1
    while (path := parent / f"{name}-{number:03d}").exists():
        number += 1
    return path


@contextmanager
def at_once(path: Path) -> Iterator[Path]:
    """A draft to write, which then takes the place of `path`, whole or not at all, also where the power fails."""
    draft = path.with_suffix(DRAFT)
    yield draft
    for place in (draft, path.parent):
        opened = os.open(place, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
        if place is draft:
            draft.replace(path)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write at once or not at all."""
    with at_once(path) as draft:
        draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def energy(model: Model) -> float:
    """Squared Frobenius norm of adapter and fold together, over all layers, in float64."""
    fold = model.fold.factors if model.fold else {}
    both = (stack([(1.0, own), *_apart(fold.get(name), None)]) for name, own in model.adapter.factors.items())
    return sum(map(_squares, both))


def kept(model: Model, start: Start, whole: float) -> float | None:
    """1 - |model - start|^2 / |model|^2: the share of the model's energy that a client receives, folds included.

    For the leading directions of a sorted model it is their share, 1 where nothing is missing, and below 0 where the start is
    further from the model than nothing would be. `whole` is the model's energy; None where it has none.
    """
    if not whole > 0:
        return None
    missing, (mine, sent) = 0.0, (fold.factors if fold else {} for fold in (model.fold, start.fold))
    for name, factor in model.adapter.factors.items():
        terms = [(1.0, factor), (-1.0, start.train.factors[name]), *_apart(mine.get(name), sent.get(name))]
        missing += _squares(stack(terms))
    return round(1.0 - missing / whole, 9)


def _apart(mine: Factor | None, sent: Factor | None) -> list[tuple[float, Factor]]:
    """mine - sent as terms, without the directions that `sent` has copied from `mine`: a fold may be as wide as its layer."""
    if mine is None or sent is None:
        return [(sign, fold) for sign, fold in ((1.0, mine), (-1.0, sent)) if fold is not None]
    if mine is sent:
        return []
    same = cut(sent, mine.rank)
    if same.rank == mine.rank and same.down.equal(mine.down) and same.up.equal(mine.up):
        return [(-1.0, Factor(sent.down[mine.rank :], sent.up[:, mine.rank :]))]
    return [(1.0, mine), (-1.0, sent)]


def _squares(factor: Factor) -> float:
    """Squared Frobenius norm of the product in float64: from the Gram matrices of a thin one, else from the product."""
    up, down = factor.up.double(), factor.down.double()
    if factor.rank * (len(up) + down.shape[1]) < len(up) * down.shape[1]:
        return max(0.0, float(((up.T @ up) * (down @ down.T)).sum()))
    return float((up @ down).square().sum())


@dataclass(slots=True)
class Traffic:
    """Bytes so far, in the run's codec: whole messages, and the shares of the dense part (the head) and of folds."""

    up: int = 0
    down: int = 0
    dense_up: int = 0
    dense_down: int = 0
    fold_down: int = 0


@dataclass(frozen=True, slots=True)
class Sent:
    """What a dispatch was: its bytes, those of its fold, the share of the model's energy in it."""

    size: payload.Bytes
    fold: int
    kept: float | None


@dataclass(slots=True)
class Metrics:
    """An observer that writes `metrics.jsonl`: a line a task, a version, a score; see docs/run-folder.md for the fields."""

    file: TextIO
    traffic: Traffic = field(default_factory=Traffic)
    tasks: dict[int, Task] = field(default_factory=dict)
    arrived: dict[int, float] = field(default_factory=dict)
    uploaded: dict[int, payload.Bytes] = field(default_factory=dict)
    sent: dict[int, Sent] = field(default_factory=dict)
    model: Model | None = None
    energy: float = 0.0
    cancelled: int = 0
    rejected: int = 0

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Turn one step into lines."""
        rejected = {command.task for command in commands if isinstance(command, Reject)}
        match event:
            case UpdateArrived(_, number, _) if number in self.tasks:
                if number not in rejected:
                    self.arrived[number] = now
                size = payload.up(self.tasks[number], event.result)
                self.uploaded[number] = size
                self.traffic.up += size.total
                self.traffic.dense_up += size.dense
            case TaskFailed(_, number, reason):
                self._ended(number, "failed", reason)
            case ClientLost(client):
                for number in [n for n, task in self.tasks.items() if task.client == client and n not in self.arrived]:
                    self._ended(number, "lost", "the client is gone")
            case Scored(version, figures):
                self.write({"kind": "score", "version": version, "time": now, **figures})
        for command in commands:
            self._command(now, command)

    def write(self, values: Mapping[str, object]) -> None:
        """Append a line and flush it."""
        self.file.write(json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n")
        self.file.flush()

    def _command(self, now: float, command: Command) -> None:
        match command:
            case Dispatch(task):
                self.tasks[task.id], self.sent[task.id] = task, self._sent(task.start)
                self.traffic.down += self.sent[task.id].size.total
                self.traffic.dense_down += self.sent[task.id].size.dense
                self.traffic.fold_down += self.sent[task.id].fold
            case Cancel(number, _):
                self.cancelled += 1
                self.arrived[number] = now
                self._ended(number, "cancelled", "the round was closed without it")
            case Reject():
                self.rejected += 1
            case Evaluate(_, model):
                self._hold(model)
            case Publish():
                self._hold(command.model)
                for update in command.updates:
                    if update.task.id in self.tasks:
                        self._ended(update.task.id, "merged", "", update)
                self._version(now, command)
            case Stop():
                for number in [number for number in self.arrived if number in self.tasks]:
                    self._ended(number, "unused", "the run ended before it was merged")

    def _hold(self, model: Model) -> None:
        """The model that tasks start from now."""
        if model is not self.model:
            self.model, self.energy = model, energy(model)

    def _sent(self, start: Start) -> Sent:
        size = payload.down(start)
        fold = size.total - payload.down(replace(start, fold=None)).total
        return Sent(size, fold, kept(self.model, start, self.energy) if self.model else None)

    def _ended(self, number: int, status: str, reason: str, update: Update | None = None) -> None:
        task = self.tasks.pop(number, None)
        if task is None:
            return
        line: dict[str, object] = {"kind": "task", "id": number, "client": task.client, "version": task.version}
        line |= {"rank": task.budget.rank, "sent": task.sent, "arrived": self.arrived.pop(number, None)}
        sent, up = self.sent.pop(number), self.uploaded.pop(number, payload.Bytes(0, 0))
        line |= {"status": status, "reason": reason, "kept": sent.kept}
        line |= {"bytes_down": sent.size.total, "bytes_down_dense": sent.size.dense, "bytes_down_fold": sent.fold}
        line |= {"bytes_up": up.total, "bytes_up_dense": up.dense}
        if update:
            took = {part: update.result.metrics.get(f"seconds_{part}", 0.0) for part in ("down", "train", "up")}
            line |= {"seconds": took, "loss": update.result.metrics.get("loss")}
            line |= {"tokens": update.result.tokens, "steps": update.result.steps}
        self.write(line)

    def _version(self, now: float, publish: Publish) -> None:
        ranks: dict[str, int] = {}
        for update in publish.updates:
            rank = str(update.task.budget.rank)
            ranks[rank] = ranks.get(rank, 0) + 1
        self.write(
            {
                "kind": "version",
                "version": publish.version,
                "time": now,
                **{name: _mean(publish.updates, name) for name in ("loss", "rounding", "rounding_change")},
                "updates": len(publish.updates),
                "cancelled": self.cancelled,
                "rejected": self.rejected,
                "bytes_up": self.traffic.up,
                "bytes_down": self.traffic.down,
                "bytes_up_dense": self.traffic.dense_up,
                "bytes_down_dense": self.traffic.dense_down,
                "bytes_down_fold": self.traffic.fold_down,
                "energy": energy_shares(publish.model),
                "discarded": publish.model.discarded,
                "ranks": dict(sorted(ranks.items(), key=lambda item: int(item[0]))),
            }
        )


def _mean(updates: Sequence[Update], metric: str) -> float | None:
    """Over the updates that tell it."""
    values = [update.result.metrics[metric] for update in updates if metric in update.result.metrics]
    return sum(values) / len(values) if values else None
