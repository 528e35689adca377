"""What a site remembers of the tasks that it did: the answer, so that none is trained twice, and what stayed behind of each.

A file a task, `RUN_HASH/TASK.safetensors`, written at once or not at all before the answer is given out. The server says which of a
client's tasks was the last to be accepted: what it left behind is where the next one begins, and what a later one left is void.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from torch import Tensor

from fedloom.core.schema import Malformed
from fedloom.core.types import ClientState
from fedloom.runs import checkpoint

LOG = getLogger("fedloom.worker")
RUNS = 8
"""Runs that are remembered."""
TASKS = 4
"""Tasks of a run that are remembered beside the last one that was accepted: a server may ask for any of them again."""


@dataclass(frozen=True, slots=True)
class CompletedTask:
    """A task that was done: `mark` names what was asked, `answer` are the bytes that were given back, `local` is what stayed."""

    mark: str
    answer: Tensor
    local: ClientState


@dataclass(frozen=True, slots=True)
class AnswerJournal:
    """The tasks done at a site."""

    folder: Path

    def done(self, run: str, task: int) -> CompletedTask | None:
        """This task of this run, if it was done and is remembered. A damaged file counts as none."""
        path = self._path(run, task)
        if not path.exists():
            return None
        try:
            found: CompletedTask = checkpoint.read_checkpoint(path).read({"done": CompletedTask})["done"]
        except Malformed as error:
            LOG.error("%s cannot be used: %s", path, error)
            return None
        return found

    def keep(self, run: str, task: int, done: CompletedTask, settled: int) -> None:
        """Remember it, and `settled`, the last one that was accepted; forget what nobody will ask for again."""
        path = self._path(run, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_checkpoint(path, {"done": done})
        needed = {path, self._path(run, settled)}
        for old in _latest(path.parent)[TASKS:]:
            if old not in needed:
                old.unlink()
        for old in _latest(self.folder)[RUNS:]:
            shutil.rmtree(old)

    def _path(self, run: str, task: int) -> Path:
        return self.folder / run / f"{task}.safetensors"


def _latest(folder: Path) -> list[Path]:
    """What is in a folder, the youngest first."""
    return sorted(folder.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
