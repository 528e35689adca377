"""Metrics: one line for each task, version and score, and every byte counted once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from fedloom.aggregate.fedit import FedIT
from fedloom.core.events import (
    ClientJoined,
    ClientLost,
    Command,
    Dispatch,
    Event,
    ScoresReady,
    TaskFailed,
    TimerFired,
    UpdateArrived,
)
from fedloom.core.types import Task
from fedloom.runs.metrics import Metrics
from fedloom.runs.slot_usage import SlotUsage
from fedloom.schedule.rounds import Rounds
from tests.support import toys


class Book:
    """A server and the metrics of its steps."""

    def __init__(self, schedule: Rounds, clients: int = 3) -> None:
        self.server = toys.server(schedule, FedIT())
        self.file = io.StringIO()
        self.metrics = Metrics(self.file, SlotUsage(schedule.max_in_flight))
        for profile in toys.profiles(clients).values():
            self.step(0.0, ClientJoined(profile))
        self.tasks = [command.task for command in self.step(0.0, TimerFired()) if isinstance(command, Dispatch)]

    def step(self, now: float, event: Event) -> list[Command]:
        commands = self.server.handle(now, event)
        self.metrics(now, event, commands)
        return commands

    def answer(self, now: float, task: Task, **more: Any) -> list[Command]:
        result = replace(toys.make_result(toys.changed(task.start, task.id)), **more)
        return self.step(now, UpdateArrived(task.client, task.id, result))

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.file.getvalue().splitlines()) if line["kind"] == kind]


PAYLOAD = 4 * (2 * (4 + 3) + 3)
HEAD = 4 * 3


def test_a_merged_task_has_one_line_with_its_times_and_bytes() -> None:
    book = Book(Rounds(3))
    for now, task in enumerate(book.tasks, 1):
        book.answer(float(now), task, metrics={"loss": 0.5, "seconds_up": 0.25})
    lines = book.lines("task")
    assert [(line["id"], line["status"], line["arrived"]) for line in lines] == [
        (task.id, "merged", float(now)) for now, task in enumerate(book.tasks, 1)
    ]
    assert lines[0]["seconds"] == {"down": 0.0, "train": 0.0, "up": 0.25}
    (version,) = book.lines("version")
    assert version["updates"] == 3
    assert version["loss"] == 0.5
    assert version["bytes_up"] == version["bytes_down"] == 3 * PAYLOAD
    assert version["bytes_up_dense"] == 3 * HEAD
    assert version["ranks"] == {"2": 3}


def test_lost_failed_cancelled_and_rejected_work_has_a_line_and_its_bytes_count() -> None:
    book = Book(Rounds(cohort_size=1, over_selection=4.0), clients=4)
    first, second, third, fourth = book.tasks
    book.step(1.0, ClientLost(first.client))
    book.step(2.0, TaskFailed(second.client, second.id, "out of memory"))
    book.answer(3.0, third, examples=-1)
    book.answer(4.0, third)
    assert {line["id"]: line["status"] for line in book.lines("task")} == {
        first.id: "lost",
        second.id: "failed",
        third.id: "merged",
        fourth.id: "cancelled",
    }
    assert [line["reason"] for line in book.lines("task") if line["id"] == second.id] == ["out of memory"]
    (version,) = book.lines("version")
    assert (version["cancelled"], version["rejected"], version["updates"]) == (1, 1, 1)
    assert version["bytes_up"] == 2 * PAYLOAD
    assert version["bytes_down"] == 4 * PAYLOAD


def test_a_score_has_its_time() -> None:
    book = Book(Rounds(3))
    book.step(1.0, ScoresReady(0, {"accuracy": 0.5}))
    assert book.lines("score") == [{"kind": "score", "version": 0, "time": 1.0, "accuracy": 0.5}]


def test_a_number_that_is_not_finite_stops_the_writer_and_not_the_reader() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        Metrics(io.StringIO(), SlotUsage(1)).write({"loss": float("nan")})
