"""What happened in a run as lines of `metrics.jsonl`: one for each task, version and score; docs/run-folder.md has their fields."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TextIO

from fedloom.aggregate.averaged import last_version
from fedloom.aggregate.robust import left_out
from fedloom.aggregate.shared.product_space import energy_shares
from fedloom.core import message_size
from fedloom.core.canary import mean_score
from fedloom.core.events import Command, Evaluate, Event, Move, Moved, Regroup, ScoresReady, SetAside
from fedloom.core.lora import Factor, cut_factor, stack
from fedloom.core.types import Model, Task, TaskStart, Update
from fedloom.hierarchy.edge import trained_part
from fedloom.runs.observation import CanaryChecked, Fact, RunObservation, TaskAnswered, TaskEnded, TaskSent, VersionMade
from fedloom.runs.slot_usage import SlotUsage


def model_energy(model: Model) -> float:
    """Squared Frobenius norm of adapter and fold together, over all layers, in float64."""
    fold = model.fold.factors if model.fold else {}
    both = (stack([(1.0, factor), *_apart(fold.get(name), None)]) for name, factor in model.adapter.factors.items())
    return sum(map(_squares, both))


def energy_share(model: Model, start: TaskStart, whole: float) -> float | None:
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
    same = cut_factor(sent, mine.rank)
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
class ByteCounts:
    """Bytes so far, in the run's codec: whole messages, and the shares of the dense part (the head) and of folds."""

    up: int = 0
    down: int = 0
    dense_up: int = 0
    dense_down: int = 0
    fold_down: int = 0


@dataclass(frozen=True, slots=True)
class DispatchRecord:
    """Record of a dispatch: bytes of the task, those of its fold, the share of the model's energy in it (None: not computed)."""

    size: message_size.MessageSize
    fold: int
    energy_share: float | None


@dataclass(slots=True)
class Metrics:
    """An observer that writes `metrics.jsonl`.

    Energies are computed where they cost little compared with the work between: for a version that ends a round (nobody is at
    work when it is made), and for one that is evaluated. An asynchronous run makes a version with every answer, and would spend
    more on them than on merging. With edges in this process, what a member receives is not compared with the run's model, which
    it was not cut from.

    Fields:
        file: the open log.
        slots: how the schedule's slots are used, `SlotUsage(schedule.max_in_flight)`.
        observation: what was seen of the run; with edges in this process `RunObservation(names)`, in the order of their numbers.
        traffic: bytes so far.
        sent: what went out with each task that has not ended, by its number.
        uploaded: bytes of the answer to each of them that has one.
        model: the model that tasks start from now (None: its energy is not computed).
        energy: that of `model`.
        majority: accuracy of always answering the commonest label, written beside every score (None: text is written).
        listener: is shown each line too (None: nobody is).
    """

    file: TextIO
    slots: SlotUsage
    observation: RunObservation = field(default_factory=RunObservation)
    traffic: ByteCounts = field(default_factory=ByteCounts)
    sent: dict[int, DispatchRecord] = field(default_factory=dict)
    uploaded: dict[int, message_size.MessageSize] = field(default_factory=dict)
    model: Model | None = None
    energy: float = 0.0
    majority: float | None = None
    listener: Callable[[Mapping[str, object]], None] | None = None

    def __call__(self, now: float, event: Event, commands: list[Command]) -> None:
        """Turn one step into lines."""
        self.slots.advance(now)
        for fact in self.observation.read(now, event, commands):
            self.slots.follow(fact)
            self._take(now, fact)

    def write(self, values: Mapping[str, object]) -> None:
        """Append a line and flush it."""
        self.file.write(json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n")
        self.file.flush()
        if self.listener is not None:
            self.listener(values)

    def _take(self, now: float, fact: Fact) -> None:
        match fact:
            case TaskSent(task):
                record = self.sent[task.id] = self._record(task)
                self.traffic.down += record.size.total
                self.traffic.dense_down += record.size.dense
                self.traffic.fold_down += record.fold
            case TaskAnswered(_, number, result, task) if task is not None:  # also of an answer that is refused
                size = message_size.upload_size(task, result) if result else message_size.summed_size(task.start)
                self.uploaded[number] = size
                self.traffic.up += size.total
                self.traffic.dense_up += size.dense
            case TaskEnded():
                self.write(self._edge_line(now, fact) if fact.by_edge else self._task_line(now, fact))
            case VersionMade():
                self._set_model(fact.model if fact.evaluated or not self.observation.sent else None)
                self.write(self._version_line(now, fact))
            case Evaluate(_, model):
                self._set_model(model)
            case ScoresReady(version, figures):
                beside = {} if self.majority is None else {"base_accuracy": self.majority}
                self.write({"kind": "score", "version": version, "time": now, **figures, **beside})
            case CanaryChecked(check, scores):
                of = {"check": check.check, "version": check.version, "without": check.without}
                self.write({"kind": "canary", "time": now, **of, "score": mean_score(scores), "examples": len(scores)})
            case SetAside(client, number, reason):
                line = {"kind": "set_aside", "time": now, "client": client, "id": number}
                self.write({**line, "version": self.observation.version + 1, "reason": reason})
            case Regroup():
                line = {"kind": "regroup", "version": fact.version, "time": now, "drift": fact.drift}
                self.write({**line, "threshold": fact.threshold, "moves": [_move(move) for move in fact.moves]})
            case Moved(move):
                self.write({"kind": "move", "time": now, **_move(move)})

    def _set_model(self, model: Model | None) -> None:
        """Set the model that tasks start from, which is not the published one where that is an average."""
        start = last_version(model) if model else None
        if not start or not self.model or start.adapter is not self.model.adapter or start.fold is not self.model.fold:
            self.model, self.energy = start, model_energy(start) if start else 0.0

    def _record(self, task: Task) -> DispatchRecord:
        start = task.start
        size = message_size.download_size(start)
        fold = size.total - message_size.download_size(replace(start, fold=None)).total
        compared = self.model is not None and not self.observation.edge_names
        return DispatchRecord(
            size, fold, energy_share(self.model, start, self.energy) if self.model and compared else None
        )

    def _task_line(self, now: float, ended: TaskEnded) -> dict[str, object]:
        """The line of a client's task. Where no answer was accepted, it "arrived" when it ended."""
        task, edge, update = ended.open.task, ended.open.edge, ended.update
        arrived = now if ended.open.answered is None else ended.open.answered
        line: dict[str, object] = {"kind": "task", "id": task.id, "client": task.client, "version": task.version}
        line |= {"edge": edge} if edge else {}
        line |= {"rank": task.budget.rank, "depth": task.budget.depth, "sent": task.sent, "arrived": arrived}
        sent, up = self.sent.pop(task.id), self.uploaded.pop(task.id, message_size.MessageSize(0, 0))
        line |= {"status": ended.status, "reason": ended.reason, "kept": sent.energy_share}
        line |= {"bytes_down": sent.size.total, "bytes_down_dense": sent.size.dense, "bytes_down_fold": sent.fold}
        line |= {"bytes_up": up.total, "bytes_up_dense": up.dense}
        if update:
            line |= {"seconds": _seconds(update), "loss": update.result.metrics.get("loss")}
            line |= {"tokens": update.result.tokens, "steps": update.result.steps, "staleness": ended.staleness}
        return line

    def _edge_line(self, now: float, ended: TaskEnded) -> dict[str, object]:
        """The line of an edge's task: its budget and what the edge did. `work` is the weight that `by_work` gives it."""
        task, result = ended.open.task, ended.open.result
        line: dict[str, object] = {"kind": "edge", "id": task.id, "edge": ended.open.edge, "version": task.version}
        line |= {name: getattr(task.budget, name) for name in ("rank", "depth", "why")}
        line |= {"sent": task.sent, "reported": ended.open.answered, "ended": now}
        line |= {
            "status": ended.status,
            "reason": ended.reason,
            "bytes_down": message_size.download_size(task.start).total,
        }
        if result is not None:
            line |= {name: result.metrics.get(name) for name in ("members", "rounds", "loss", "cut")}
            line |= {"examples": result.examples, "steps": result.steps, "work": result.examples * result.steps}
            line |= {"bytes_up": message_size.upload_size(trained_part(task, result), result).total}
        return line | ({"seconds": _seconds(ended.update), "staleness": ended.staleness} if ended.update else {})

    def _version_line(self, now: float, made: VersionMade) -> dict[str, object]:
        seen, traffic, slots = self.observation, self.traffic, self.slots
        ranks = Counter(update.task.budget.rank for update in made.updates)
        return {
            "kind": "version",
            "version": made.version,
            "time": now,
            **{name: _mean(made.updates, name) for name in ("loss", "rounding", "rounding_change")},
            "updates": len(made.updates),
            "staleness": sum(made.staleness) / len(made.staleness) if made.staleness else None,
            "staleness_max": max(made.staleness, default=None),
            "uploads": seen.accepted,
            "outstanding": len(seen.sent),
            "working_seconds": slots.working_seconds,
            "waiting_seconds": slots.waiting_seconds,
            "held_seconds": slots.held_seconds,
            "cancelled": seen.cancelled,
            "rejected": seen.rejected,
            "bytes_up": traffic.up,
            "bytes_down": traffic.down,
            "bytes_up_dense": traffic.dense_up,
            "bytes_down_dense": traffic.dense_down,
            "bytes_down_fold": traffic.fold_down,
            "energy": energy_shares(made.model) if self.model else None,
            "discarded": made.model.discarded,
            "ranks": {str(rank): ranks[rank] for rank in sorted(ranks)},
            **({} if (judged := left_out(made.model)) is None else {"left_out": judged}),
        }


def _seconds(update: Update) -> dict[str, float]:
    """Seconds of the task on the links and in training, as its client reported them."""
    return {part: update.result.metrics.get(f"seconds_{part}", 0.0) for part in ("down", "train", "up")}


def _mean(updates: Sequence[Update], metric: str) -> float | None:
    """Mean of a metric over the updates that have it."""
    values = [update.result.metrics[metric] for update in updates if metric in update.result.metrics]
    return sum(values) / len(values) if values else None


def _move(move: Move) -> dict[str, object]:
    return {"client": move.client, "edge": move.edge, "to": move.to}
