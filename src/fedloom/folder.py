"""The run folder: `manifest.json`, `metrics.jsonl`, `trace.jsonl`, `adapter/`, `report.html`. Never overwritten silently."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from fedloom import payload
from fedloom.aggregate.combine import energy_shares
from fedloom.errors import Refused
from fedloom.types import (
    Cancel,
    ClientLost,
    Command,
    Dispatch,
    Event,
    Publish,
    Reject,
    Scored,
    Stop,
    Task,
    TaskFailed,
    Update,
    UpdateArrived,
)


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


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write at once or not at all."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


@dataclass(slots=True)
class Traffic:
    """Bytes so far, in float32: whole adapters, and the share of their dense part (the head)."""

    up: int = 0
    down: int = 0
    dense_up: int = 0
    dense_down: int = 0


@dataclass(slots=True)
class Metrics:
    """An observer that writes `metrics.jsonl`: a line a task, a version, a score; see docs/run-folder.md for the fields."""

    file: TextIO
    traffic: Traffic = field(default_factory=Traffic)
    tasks: dict[int, Task] = field(default_factory=dict)
    arrived: dict[int, float] = field(default_factory=dict)
    uploaded: dict[int, payload.Bytes] = field(default_factory=dict)
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
                self.tasks[task.id] = task
                size = payload.down(task.start)
                self.traffic.down += size.total
                self.traffic.dense_down += size.dense
            case Cancel(number, _):
                self.cancelled += 1
                self.arrived[number] = now
                self._ended(number, "cancelled", "the round was closed without it")
            case Reject():
                self.rejected += 1
            case Publish():
                for update in command.updates:
                    if update.task.id in self.tasks:
                        self._ended(update.task.id, "merged", "", update)
                self._version(now, command)
            case Stop():
                for number in [number for number in self.arrived if number in self.tasks]:
                    self._ended(number, "unused", "the run ended before it was merged")

    def _ended(self, number: int, status: str, reason: str, update: Update | None = None) -> None:
        task = self.tasks.pop(number, None)
        if task is None:
            return
        line: dict[str, object] = {"kind": "task", "id": number, "client": task.client, "version": task.version}
        line |= {"rank": task.budget.rank, "sent": task.sent, "arrived": self.arrived.pop(number, None)}
        down, up = payload.down(task.start), self.uploaded.pop(number, payload.Bytes(0, 0))
        line |= {"status": status, "reason": reason, "bytes_down": down.total, "bytes_down_dense": down.dense}
        line |= {"bytes_up": up.total, "bytes_up_dense": up.dense}
        if update:
            took = {part: update.result.metrics.get(f"seconds_{part}", 0.0) for part in ("down", "train", "up")}
            line |= {"seconds": took, "loss": update.result.metrics.get("loss")}
            line |= {"tokens": update.result.tokens, "steps": update.result.steps}
        self.write(line)

    def _version(self, now: float, publish: Publish) -> None:
        losses = [update.result.metrics["loss"] for update in publish.updates if "loss" in update.result.metrics]
        ranks: dict[str, int] = {}
        for update in publish.updates:
            rank = str(update.task.budget.rank)
            ranks[rank] = ranks.get(rank, 0) + 1
        self.write(
            {
                "kind": "version",
                "version": publish.version,
                "time": now,
                "loss": sum(losses) / len(losses) if losses else None,
                "updates": len(publish.updates),
                "cancelled": self.cancelled,
                "rejected": self.rejected,
                "bytes_up": self.traffic.up,
                "bytes_down": self.traffic.down,
                "bytes_up_dense": self.traffic.dense_up,
                "bytes_down_dense": self.traffic.dense_down,
                "energy": energy_shares(publish.model),
                "discarded": publish.model.discarded,
                "ranks": dict(sorted(ranks.items(), key=lambda item: int(item[0]))),
            }
        )
