"""The journal of a site: the answers that it gave, so that no task is trained twice, and what stayed behind at its clients.

One file per task, `RUN_HASH/TASK.safetensors`, written at once or not at all before the answer is given out. A server that restarts
asks again and gets the same bytes. The digest of the request tells whether it is the same task: a restarted server may give the
number of a task that never left to another one. Each request names the last task of its client that the server accepted: what
that one left behind is where the next one begins, and what a later one left is void.

What is forgotten goes by the numbers of tasks and by the order in which runs were worked for, `order.json`. No clock is asked: one
that was set back would make the answer that was just given look old. Folders are their owner's alone, whatever the umask.

The files are the site's own and are read as checkpoints are (`runs.checkpoint`); a damaged one counts as none, and its task is
trained again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.files import private_folder, read_json, write_json
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientState
from fedloom.runs.checkpoint import read_checkpoint, write_checkpoint

LOG = getLogger("fedloom.worker")
ORDER = "order.json"
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
        private_folder(self.folder)
        path = self._path(run, task)
        private_folder(path.parent)
        write_checkpoint(path, {"done": done})
        files = {int(one.stem): one for one in path.parent.glob("*.safetensors") if one.stem.isdecimal()}
        # the numbers after this one are of a server that has since gone back to an earlier checkpoint
        latest = sorted((number for number in files if number <= task), reverse=True)[:TASKS]
        for number in files.keys() - {*latest, last_accepted}:
            files[number].unlink()
        self._forget_runs(run)

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
