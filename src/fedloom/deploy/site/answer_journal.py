"""The journal of a site: the answers that it gave, so that no task is trained twice, and what stayed behind at its clients.

One file per task, `RUN_HASH/TASK.safetensors`, written at once or not at all before the answer is given out. A server that restarts
asks again and gets the same bytes. The digest of the request tells whether it is the same task: a restarted server may give the
number of a task that never left to another one. Each request names the last task of its client that the server accepted: what
that one left behind is where the next one begins, and what a later one left is void.

What is forgotten goes by the order in which runs were worked for, `order.json`, and in a run by the start of the server and the
number of the task, `tasks.json`. A message that comes late has a lower start or a lower number than those that came before it, so it
never makes the journal forget the newest task or the one that this names as accepted. A server that is itself hostile can; it loses
the state of its own run by that, and no task is trained with the same draws again (`request_record`). No clock is asked: one that
was set back would make the answer that was just given look old. Folders are their owner's alone, whatever the umask.

The files are the site's own and are read as checkpoints are (`runs.checkpoint`); a damaged one counts as none, and its task is
trained again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from logging import getLogger
from pathlib import Path

import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.files import private_folder, read_json, write_json
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientState
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint

LOG = getLogger("fedloom.worker")
ORDER = "order.json"
INDEX = "tasks.json"
RUNS = 8
"""How many runs are remembered."""
TASKS = 4
"""How many of the newest tasks of a run are remembered, besides the one just answered and those that were accepted last: a server may
ask for any of them again.
"""


@dataclass(frozen=True, slots=True)
class CompletedTask:
    """A task that was done.

    Fields:
        request_digest: names what was asked.
        answer: the bytes that were given back.
        client_state: what stayed at the client.
    """

    request_digest: str
    answer: Tensor
    client_state: ClientState

    @classmethod
    def of_bytes(cls, request_digest: str, data: bytes, client_state: ClientState) -> CompletedTask:
        """Return the task to whose request these bytes were given back."""
        return cls(request_digest, torch.frombuffer(bytearray(data), dtype=torch.uint8), client_state)

    @property
    def data(self) -> bytes:
        """The bytes that were given back."""
        return self.answer.numpy().tobytes()


@dataclass(frozen=True, slots=True)
class StoredTask:
    """What is known of a stored task beside its file.

    Fields:
        incarnation: number of the latest start of the server that asked for it.
        last_accepted: the task that its request named as accepted last (0: none).
        request_digest: names what was asked ("": not known).
    """

    incarnation: int = 0
    last_accepted: int = 0
    request_digest: str = ""


@dataclass(frozen=True, slots=True)
class AnswerJournal:
    """The completed tasks of a site.

    Fields:
        folder: where they are kept.
    """

    folder: Path

    def find(self, run: str, task: int) -> CompletedTask | None:
        """The task, if it was done and is remembered. A damaged file counts as none."""
        path = self._path(run, task)
        if not path.exists():
            return None
        try:
            completed: CompletedTask = read_checkpoint(path).read({"done": CompletedTask})["done"]
        except Malformed as error:
            LOG.error("%s cannot be used: %s", path, error)
            return None
        return completed

    def record(self, run: str, task: int, done: CompletedTask, last_accepted: int, incarnation: int = 0) -> None:
        """Remember a task, unless it came late and another of its number is stored; forget what nobody will ask for again.

        Args:
            run: hash of the run.
            task: number of the task; of two tasks with one number, the one of the later start of the server is kept.
            done: what was asked and answered.
            last_accepted: the task that the request named as accepted last (0: none).
            incarnation: number of the server's start.
        """
        private_folder(self.folder)
        path = self._path(run, task)
        private_folder(path.parent)
        stored = self._stored(run)
        before, accepted = stored.get(task), _named_by_newest(stored)
        # no start of a server gives the number of an accepted task to another one
        other = before is not None and before.request_digest != done.request_digest
        if before is not None and other and incarnation < before.incarnation + (task == accepted):
            return
        latest = max(incarnation, before.incarnation if before else 0)
        stored[task] = StoredTask(latest, last_accepted, done.request_digest)
        newest = sorted(stored, key=lambda number: (stored[number].incarnation, number))[-TASKS:]
        kept = {task, last_accepted, *newest, _named_by_newest(stored)}
        write_checkpoint(path, {"done": done})
        self._write_index(run, {number: one for number, one in stored.items() if number in kept})
        for number in stored.keys() - kept:
            self._path(run, number).unlink(missing_ok=True)
        self._forget_runs(run)

    def note_repeated(self, run: str, task: int, incarnation: int) -> None:
        """Write down that a later start of the server asked for a stored task again: from then on it is as new as that start."""
        stored = self._stored(run)
        if task in stored and stored[task].incarnation < incarnation:
            self._write_index(run, stored | {task: replace(stored[task], incarnation=incarnation)})

    def _write_index(self, run: str, stored: Mapping[int, StoredTask]) -> None:
        write_json(self.folder / run / INDEX, {str(number): astuple(stored[number]) for number in sorted(stored)})

    def _stored(self, run: str) -> dict[int, StoredTask]:
        """The tasks of a run whose files are there; where the index is damaged or too old, only their numbers are known."""
        folder = self.folder / run
        try:
            index = read_json(folder / INDEX)
        except (FileNotFoundError, Refused):
            index = {}
        numbers = [int(one.stem) for one in folder.glob("*.safetensors") if one.stem.isdecimal()]
        return {number: _stored_task(index.get(str(number))) for number in numbers}

    def _forget_runs(self, run: str) -> None:
        """Write down that this run was worked for last, and forget those that were not for longest."""
        order = self._order()
        if order[-1:] == [run]:
            return
        there = {one.name for one in self.folder.iterdir() if one.is_dir() and not one.is_symlink()} - {run}
        unknown = sorted(there.difference(order))  # of an earlier version: nothing says when it was
        order = [*unknown, *(one for one in order if one in there), run]
        for old in order[:-RUNS]:
            shutil.rmtree(self.folder / old)
        write_json(self.folder / ORDER, {"runs": order[-RUNS:]})

    def _order(self) -> list[str]:
        """The runs, the one that was worked for last at the end; a damaged file says nothing."""
        try:
            runs = read_json(self.folder / ORDER).get("runs")
        except (FileNotFoundError, Refused):
            return []
        return [one for one in runs if isinstance(one, str)] if isinstance(runs, list) else []

    def _path(self, run: str, task: int) -> Path:
        return self.folder / run / f"{task}.safetensors"


def _named_by_newest(stored: Mapping[int, StoredTask]) -> int:
    """Return the task that the newest one names as accepted last (0: none)."""
    return max(((one.incarnation, number, one.last_accepted) for number, one in stored.items()), default=(0, 0, 0))[2]


def _stored_task(facts: object) -> StoredTask:
    """Return what an index says of a task; nothing where it is damaged."""
    match facts:
        case [int(incarnation), int(last_accepted), str(digest)]:
            return StoredTask(incarnation, last_accepted, digest)
        case _:
            return StoredTask()
