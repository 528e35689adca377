"""What happened in a run, a line a task, a version and a score: `metrics.jsonl`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from fedloom.aggregate.averaged import last
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core import message_size
from fedloom.core.events import (
    Cancel,
    ClientLost,
    Command,
    Discard,
    Dispatch,
    Evaluate,
    Event,
    Moved,
    Publish,
    Regroup,
    Reject,
    Scored,
    Stop,
    TaskFailed,
    UpdateArrived,
    Within,
)
from fedloom.core.lora import Factor, cut, stack
from fedloom.core.types import ClientId, Model, Start, Task, Update
from fedloom.hierarchy.tree_state import BLOCK
from fedloom.runs.edge_metrics import EdgeTasks, answered, regrouped
from fedloom.runs.slot_usage import Places


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
        trained = [(-1.0, start.train.factors[name])] if name in start.train.factors else []
        terms = [(1.0, factor), *trained, *_apart(mine.get(name), sent.get(name))]
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

    size: message_size.Bytes
    fold: int
    kept: float | None


@dataclass(slots=True)
class Metrics:
    """An observer that writes `metrics.jsonl`: a line a task, a version, a score; see docs/run-folder.md for the fields.

    `places` are the schedule's, `Places(schedule.max_in_flight)`. Energies are told where they cost little beside the work between
    two of them: for a version that ends a round (nobody is at work when it is made), and for one that is scored. An asynchronous
    run makes a version with every answer, and would spend more on them than on merging.

    `edges_by_number` names the edges (empty: there are none), which the numbers of tasks tell. Members' staleness is then counted in
    the versions of their edge, and what a member receives is not compared with the run's model, which it was not cut from.
    """

    file: TextIO
    places: Places
    edges_by_number: Sequence[ClientId] = ()
    edges: EdgeTasks = field(default_factory=EdgeTasks)
    traffic: Traffic = field(default_factory=Traffic)
    tasks: dict[int, Task] = field(default_factory=dict)
    arrived: dict[int, float] = field(default_factory=dict)
    uploaded: dict[int, message_size.Bytes] = field(default_factory=dict)
    sent: dict[int, Sent] = field(default_factory=dict)
    model: Model | None = None
    energy: float = 0.0
    version: int = 0
    uploads: int = 0
    cancelled: int = 0
    rejected: int = 0

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Turn one step into lines."""
        rejected = {command.task for command in commands if isinstance(command, Reject)}
        match event:
            case UpdateArrived(_, number, _) if number in self.tasks:
                if number not in rejected:
                    self.arrived[number] = now
                    self.uploads += 1
                task = self.tasks[number]
                size = message_size.up(answered(task, event), event.result)
                self.uploaded[number] = size
                self.traffic.up += size.total
                self.traffic.dense_up += size.dense
            case TaskFailed(_, number, reason) if number not in rejected:
                self._dropped(now, number, "failed", reason)
            case ClientLost(client):
                for number in [n for n, task in self.tasks.items() if task.client == client and n not in self.arrived]:
                    self._dropped(now, number, "lost", "the client is gone")
            case Scored(version, figures):
                self.write({"kind": "score", "version": version, "time": now, **figures})
        self._write_all(self.edges.heard(now, event, bool(rejected)))
        self.places.take(now, event, refused=bool(rejected))
        scored = {command.version for command in commands if isinstance(command, Evaluate)}
        merged = max((k for k, command in enumerate(commands) if isinstance(command, Publish)), default=0)
        for k, command in enumerate(commands):
            self.places.follow(command)
            self._write_all(self.edges.told(now, command))
            if isinstance(command, Cancel):
                self.cancelled += 1
                self._dropped(now, command.task, "cancelled", self._why(command.task, ended=k >= merged))
            else:
                self._command(now, command, scored)

    def write(self, values: Mapping[str, object]) -> None:
        """Append a line and flush it."""
        self.file.write(json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n")
        self.file.flush()

    def _command(self, now: float, command: Command, scored: Collection[int]) -> None:
        match command:
            case Dispatch(task):
                self.tasks[task.id], self.sent[task.id] = task, self._sent(task)
                self.traffic.down += self.sent[task.id].size.total
                self.traffic.dense_down += self.sent[task.id].size.dense
                self.traffic.fold_down += self.sent[task.id].fold
            case Reject():
                self.rejected += 1
            case Evaluate(_, model):
                self._hold(model)
            case Publish(version, model, updates):
                self._hold(model if version in scored or not self.places.working else None)
                self._merged(now, updates, self.version)
                self._version(now, command)
                self.version = version
            case Within(_, _, Publish(version, _, updates)):
                self._merged(now, updates, version - 1)
            case Within(_, _, Discard(number, _, reason)):
                self._ended(number, "unused", reason)
            case Within():
                self._write_all(self.edges.follow(now, command))
            case Regroup() | Moved():
                self.write(regrouped(now, command))
            case Stop():
                for number in [number for number in self.arrived if number in self.tasks]:
                    self._ended(number, "unused", "the run ended before it was merged")
                self._write_all(self.edges.left(now))

    def _write_all(self, lines: Iterable[Mapping[str, object]]) -> None:
        for line in lines:
            self.write(line)

    def _merged(self, now: float, updates: Sequence[Update], version: int) -> None:
        """Updates that are in the version after this one, some of them for the first time."""
        for update in updates:
            behind = version - update.task.version
            self._ended(update.task.id, "merged", "", update, behind)
            self._write_all(self.edges.merged(now, update, behind))

    def _why(self, number: int, ended: bool) -> str:
        """Why a task was cancelled: a merge cancels before its version is published, the end of a run after the last one."""
        if self.edges_by_number:
            return "its edge does not wait for it any more"
        if ended:
            return "the run ended before it was answered"
        behind = self.version + 1 - self.tasks[number].version
        return "the round was closed without it" if behind == 1 else f"its answer would have been {behind} versions old"

    def _hold(self, model: Model | None) -> None:
        """The model that tasks start from now, which is not the published one where that is an average; None: not told."""
        start = last(model) if model else None
        if not start or not self.model or start.adapter is not self.model.adapter or start.fold is not self.model.fold:
            self.model, self.energy = start, energy(start) if start else 0.0

    def _sent(self, task: Task) -> Sent:
        start = task.start
        size = message_size.down(start)
        fold = size.total - message_size.down(replace(start, fold=None)).total
        return Sent(
            size, fold, kept(self.model, start, self.energy) if self.model and not self.edges_by_number else None
        )

    def _dropped(self, now: float, number: int, status: str, reason: str) -> None:
        self.arrived[number] = now
        self._ended(number, status, reason)

    def _ended(self, number: int, status: str, reason: str, update: Update | None = None, behind: int = 0) -> None:
        task = self.tasks.pop(number, None)
        if task is None:
            return
        line: dict[str, object] = {"kind": "task", "id": number, "client": task.client, "version": task.version}
        line |= {"edge": self.edges_by_number[(number - 1) // BLOCK]} if self.edges_by_number else {}
        line |= {
            "rank": task.budget.rank,
            "depth": task.budget.depth,
            "sent": task.sent,
            "arrived": self.arrived.pop(number, None),
        }
        sent, up = self.sent.pop(number), self.uploaded.pop(number, message_size.Bytes(0, 0))
        line |= {"status": status, "reason": reason, "kept": sent.kept}
        line |= {"bytes_down": sent.size.total, "bytes_down_dense": sent.size.dense, "bytes_down_fold": sent.fold}
        line |= {"bytes_up": up.total, "bytes_up_dense": up.dense}
        if update:
            took = {part: update.result.metrics.get(f"seconds_{part}", 0.0) for part in ("down", "train", "up")}
            line |= {"seconds": took, "loss": update.result.metrics.get("loss")}
            line |= {
                "tokens": update.result.tokens,
                "steps": update.result.steps,
                "staleness": behind,
            }
        self.write(line)

    def _version(self, now: float, publish: Publish) -> None:
        ranks = Counter(update.task.budget.rank for update in publish.updates)
        stale = [self.version - update.task.version for update in publish.updates]
        self.write(
            {
                "kind": "version",
                "version": publish.version,
                "time": now,
                **{name: _mean(publish.updates, name) for name in ("loss", "rounding", "rounding_change")},
                "updates": len(publish.updates),
                "staleness": sum(stale) / len(stale) if stale else None,
                "staleness_max": max(stale, default=None),
                "uploads": self.uploads,
                "outstanding": len(self.places.working),
                "working_seconds": self.places.working_seconds,
                "waiting_seconds": self.places.waiting_seconds,
                "held_seconds": self.places.held_seconds,
                "cancelled": self.cancelled,
                "rejected": self.rejected,
                "bytes_up": self.traffic.up,
                "bytes_down": self.traffic.down,
                "bytes_up_dense": self.traffic.dense_up,
                "bytes_down_dense": self.traffic.dense_down,
                "bytes_down_fold": self.traffic.fold_down,
                "energy": energy_shares(publish.model) if self.model else None,
                "discarded": publish.model.discarded,
                "ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
            }
        )


def _mean(updates: Sequence[Update], metric: str) -> float | None:
    """Over the updates that tell it."""
    values = [update.result.metrics[metric] for update in updates if metric in update.result.metrics]
    return sum(values) / len(values) if values else None
