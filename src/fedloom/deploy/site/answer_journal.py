"""The journal of a site: the answers that it gave, so that no task is trained twice, and what stayed behind at its clients.

One file per task, `RUN_HASH/TASK.safetensors`, written at once or not at all before the answer is given out. A server that restarts
asks again and gets the same bytes. The digest of the request tells whether it is the same task: a restarted server may give the
number of a task that never left to another one. Each request names the last task of its client that the server accepted: what
that one left behind is where the next one begins, and what a later one left is void.

The files are the site's own and are read as checkpoints are (`runs.checkpoint`); a damaged one counts as none, and its task is
trained again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from torch import Tensor

from fedloom.core.schema import Malformed
from fedloom.core.types import ClientState
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint

LOG = getLogger("fedloom.worker")
RUNS = 8
"""How many runs are remembered."""
TASKS = 4
"""How many tasks of a run are remembered besides the last one that was accepted: a server may ask for any of them again."""


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

    def record(self, run: str, task: int, done: CompletedTask, last_accepted: int) -> None:
        """Remember a task, and the one that was accepted last; forget what nobody will ask for again."""
        path = self._path(run, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, {"done": done})
        needed = {path, self._path(run, last_accepted)}
        for old in _latest(path.parent)[TASKS:]:
            if old not in needed:
                old.unlink()
        for old in _latest(self.folder)[RUNS:]:
            shutil.rmtree(old)

    def _path(self, run: str, task: int) -> Path:
        return self.folder / run / f"{task}.safetensors"


def _latest(folder: Path) -> list[Path]:
    """The entries of a folder, the youngest first."""
    return sorted(folder.iterdir(), key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
