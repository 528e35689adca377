"""The journal of a site: what it remembers goes by numbers and by use, not by a clock, and is its owner's alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedloom.core.types import ClientState
from fedloom.deploy.site.answer_journal import INDEX, ORDER, RUNS, TASKS, AnswerJournal, CompletedTask


def record(journal: AnswerJournal, run: str, task: int, accepted: int = 0, start: int = 1, named: str = "") -> None:
    done = CompletedTask(f"{run}/{task}{named}", torch.zeros(4, dtype=torch.uint8), ClientState())
    journal.record(run, task, done, accepted, start)


def remembered(journal: AnswerJournal, run: str, most: int = 30) -> list[int]:
    return [task for task in range(most) if journal.find(run, task)]


def test_the_latest_tasks_and_the_one_that_was_accepted_last_are_remembered(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    for task in range(1, 10):
        record(journal, "a", task, accepted=2)
    assert remembered(journal, "a") == [2, *range(10 - TASKS, 10)]


def test_a_server_that_goes_back_finds_its_own_tasks(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    for task in range(1, 10):
        record(journal, "a", task, accepted=task - 1)
    for task in (7, 8):
        record(journal, "a", task, accepted=task - 1, start=2, named=" again")
        found = journal.find("a", task)
        assert found is not None
        assert found.request_digest.endswith("again")
    record(journal, "a", 8, accepted=7)  # late, from before
    kept = journal.find("a", 8)
    assert kept is not None
    assert kept.request_digest == found.request_digest
    for task in range(9, 9 + TASKS):
        record(journal, "a", task, accepted=task - 1, start=2)
    assert remembered(journal, "a") == [*range(9, 9 + TASKS)]


def test_late_messages_cost_neither_what_was_accepted_nor_what_came_last(tmp_path: Path) -> None:
    journal = AnswerJournal(tmp_path)
    for task in range(1, 10):
        record(journal, "a", task, accepted=task - 1)
    for task in range(10, 10 + 2 * TASKS):
        record(journal, "a", task, accepted=9)  # refused by the server
    for task in (3, 4, 8, 5, 3, 9):
        record(journal, "a", task, accepted=task - 1, named=" late" * (task == 9))
    found = journal.find("a", 9)
    assert found is not None
    assert found.request_digest == "a/9", "what was accepted is not replaced"
    assert {9, *range(10 + TASKS, 10 + 2 * TASKS)} <= {*remembered(journal, "a")}


@dataclass(frozen=True)
class Message:
    """What a server asks of a site, as far as the journal is concerned."""

    start: int
    task: int
    accepted: int
    digest: str


class JournalAndServer(RuleBasedStateMachine):
    """A server that starts again, goes back to what it saved and refuses answers; and messages that come late."""

    def __init__(self) -> None:
        """Nothing was asked yet."""
        super().__init__()
        self.folder = TemporaryDirectory()
        self.journal = AnswerJournal(Path(self.folder.name))
        self.start, self.task, self.accepted, self.drawn = 1, 0, 0, 0
        self.sent: list[Message] = []
        self.saved = [(0, 0)]
        self.digests: dict[int, str] = {}

    def deliver(self, one: Message) -> None:
        """What a worker does with a message."""
        found = self.journal.find("a", one.task)
        if found is not None and found.request_digest == one.digest:
            self.journal.note_repeated("a", one.task, one.start)
        else:
            done = CompletedTask(one.digest, torch.zeros(1, dtype=torch.uint8), ClientState())
            self.journal.record("a", one.task, done, one.accepted, one.start)

    def is_stored(self, task: int) -> bool:
        """Whether the journal has what the server means by this number."""
        found = self.journal.find("a", task)
        return found is not None and found.request_digest == self.digests[task]

    @rule(refused=st.booleans())
    def ask(self, refused: bool) -> None:
        """Send a new task, which is answered; the answer is refused or accepted."""
        self.task, self.drawn = self.task + 1, self.drawn + 1
        self.digests[self.task] = f"{self.drawn}"
        self.sent.append(Message(self.start, self.task, self.accepted, f"{self.drawn}"))
        self.deliver(self.sent[-1])
        assert self.is_stored(self.task)
        if not refused:
            self.accepted = self.task
        self.saved.append((self.task, self.accepted))

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def come_late(self, data: st.DataObject) -> None:
        """A message comes once more: never does it cost the last answer or what was accepted last."""
        self.deliver(data.draw(st.sampled_from(self.sent)))

    @rule(back=st.integers(0, 3))
    def start_again(self, back: int) -> None:
        """Go back by some tasks, and ask again for the last one, which the server had sent before it saved."""
        self.start += 1
        self.task, self.accepted = self.saved[max(0, len(self.saved) - 1 - back)]
        self.saved = [one for one in self.saved if one[0] <= self.task]
        if self.accepted and not self.is_stored(self.accepted):
            self.accepted = 0  # too far back, which is no matter of late messages
        if self.task and self.is_stored(self.task):
            again = next(one for one in self.sent if one.digest == self.digests[self.task])
            self.sent.append(replace(again, start=self.start))
            self.deliver(self.sent[-1])
        else:
            self.task = self.accepted = 0

    @invariant()
    def nothing_needed_is_gone(self) -> None:
        """The last accepted task, the last task, and few files."""
        assert not self.accepted or self.is_stored(self.accepted)
        assert not self.task or self.is_stored(self.task)
        assert len([*Path(self.folder.name).rglob("*.safetensors")]) <= TASKS + 3

    def teardown(self) -> None:
        """Remove the files."""
        self.folder.cleanup()


JournalAndServer.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
test_no_late_message_costs_what_the_server_needs = pytest.mark.slow(JournalAndServer.TestCase)


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


@pytest.mark.parametrize("text", ["", "[]", "{", '{"9": [1, 2]}', '{"9": ["1", 2, ""], "x": 3}'])
def test_a_damaged_index_costs_no_task(tmp_path: Path, text: str) -> None:
    journal = AnswerJournal(tmp_path)
    for task in range(1, 10):
        record(journal, "a", task, accepted=1)
    (tmp_path / "a" / INDEX).write_text(text)
    record(journal, "a", 10, accepted=1)
    assert remembered(journal, "a") == [1, 7, 8, 9, 10]
