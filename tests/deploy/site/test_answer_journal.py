"""The journal of a site: what it remembers goes by numbers and by use, not by a clock, and is its owner's alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fedloom.core.types import ClientState
from fedloom.deploy.site.answer_journal import ORDER, RUNS, TASKS, AnswerJournal, CompletedTask


def record(journal: AnswerJournal, run: str, task: int, accepted: int = 0) -> None:
    done = CompletedTask(f"{run}/{task}", torch.zeros(4, dtype=torch.uint8), ClientState())
    journal.record(run, task, done, accepted)


def remembered(journal: AnswerJournal, run: str, most: int = 30) -> list[int]:
    return [task for task in range(most) if journal.find(run, task)]


def test_the_latest_tasks_and_the_one_that_was_accepted_last_are_remembered(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    for task in range(1, 10):
        record(journal, "a", task, accepted=2)
    assert remembered(journal, "a") == [2, *range(10 - TASKS, 10)]


def test_a_server_that_goes_back_finds_its_own_tasks_and_none_of_the_future(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    for task in range(1, 10):
        record(journal, "a", task)
    for task in (7, 8):
        record(journal, "a", task, accepted=6)
        assert remembered(journal, "a") == [6, *range(7, task + 1)] or task in remembered(journal, "a")
    assert {6, 7, 8} <= {*remembered(journal, "a")}
    assert 9 not in remembered(journal, "a")


def test_the_run_that_was_not_worked_for_longest_is_forgotten(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    for run in range(RUNS):
        record(journal, f"run{run}", 1)
    record(journal, "run0", 2)
    record(journal, "new", 1)
    assert remembered(journal, "run0") == [1, 2]
    assert remembered(journal, "new") == [1]
    assert not (tmp_path / "run1").exists()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"runs": [1, null, "../x"]}', '{"runs": "a"}'])
def test_a_damaged_order_costs_nothing_but_the_order(tmp_path: Path, text: str) -> None:
    journal = AnswerJournal(tmp_path / "journal")
    (tmp_path / "x").mkdir()
    for run in range(RUNS):
        record(journal, f"run{run}", 1)
    (journal.folder / ORDER).write_text(text)
    record(journal, "new", 1)
    assert remembered(journal, "new") == [1]
    assert (tmp_path / "x").is_dir()
    assert len(json.loads((journal.folder / ORDER).read_text())["runs"]) == RUNS
