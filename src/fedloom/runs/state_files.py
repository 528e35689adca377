"""The states of idle clients in files: what a client would keep on its own disk needs no memory here, and is written once.

The folder of a run holds a file for each state that lasts (`fedloom.simulate.client_states` says which), in the form of a checkpoint
and called by its digest. The checkpoint names the files that go with it, so it stays small, however many clients have answered. A
file is on the disk before a checkpoint names it, and goes once the last checkpoint and the run have no use for it: a run that was
killed at any moment finds all that its checkpoint names.

Those of a private run are sealed, as its checkpoint is. The number of the task is sealed with a state: sealing is a function of what
is sealed, and equal states of two tasks would show.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.core.errors import Refused
from fedloom.core.files import sub_folder, sync_path
from fedloom.core.schema import Malformed
from fedloom.core.types import ClientState
from fedloom.runs.checkpoint import path_by_digest, read_checkpoint, write_by_digest

STATES = "clients"
"""Folder of a run with the states of its clients."""
LEAST_FILES = 64
"""Fewer files than these are not looked through between two checkpoints."""


@dataclass(slots=True)
class StateFiles:
    """A store of client states in the folder of a run.

    Fields:
        folder: where they lie; it is made with the first of them.
        secret: seals those of a private run (empty: it is none).
        needed: gives the names of the states that the run needs now.
        present: names of the files that are there.
        unsynced: names of those that a power cut could damage.
        checkpointed: names of those that the last checkpoint needs.
        most: number of files at which those go that neither it nor the run needs; with rare checkpoints they would fill the disk.
    """

    folder: Path
    secret: bytes = field(default=b"", repr=False)
    needed: Callable[[], Set[str]] = frozenset
    present: set[str] = field(default_factory=set)
    unsynced: set[str] = field(default_factory=set)
    checkpointed: Set[str] = frozenset()
    most: int = LEAST_FILES

    def reopen(self) -> None:
        """Begin where a checkpoint stands. Raises Refused where a file that it names is gone."""
        self.checkpointed = self.needed()
        if os.path.lexists(self.folder):
            self.present = {path.stem for path in sub_folder(self.folder).glob("*.safetensors")}
        if missing := self.checkpointed - self.present:
            raise _lost(self.folder, f"{len(missing)} files are gone")

    def put(self, state: ClientState, task: int) -> str:
        """Write the state that this task left, and return the name of the file."""
        if len(self.present) >= self.most:  # after as many new ones as were left, so an answer costs no more with many
            self._remove_all_but(self.needed() | self.checkpointed)
            self.most = max(LEAST_FILES, 2 * len(self.present))
        sub_folder(self.folder)
        name = write_by_digest(self.folder, {"state": state}, {"task": task}, self.secret)
        self.present.add(name)
        self.unsynced.add(name)
        return name

    def get(self, name: str) -> ClientState:
        """Return the state in this file. Raises Refused where it is damaged or gone."""
        try:
            stored = read_checkpoint(path_by_digest(self.folder, name), self.secret, name)
            state: ClientState = stored.read({"state": ClientState})["state"]
        except Malformed as error:
            raise _lost(self.folder, str(error)) from error
        return state

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let the block write a checkpoint: the disk has all that it names before, and what nothing names is removed after it."""
        names = self.needed()
        for name in self.unsynced & names:
            sync_path(path_by_digest(self.folder, name))
        if self.unsynced:
            sync_path(self.folder)
        self.checkpointed |= names  # until it is known which one lies there: Ctrl-C may come just after the new one
        yield
        self.unsynced.clear()
        self.checkpointed = names
        self.remove_others()

    def remove_others(self) -> None:
        """Remove what the last checkpoint does not name: no run goes on from it."""
        self._remove_all_but(self.checkpointed)
        if not self.present:
            with suppress(OSError):  # it was never made, or somebody put something into it
                self.folder.rmdir()

    def _remove_all_but(self, names: Set[str]) -> None:
        for name in self.present - names:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
        self.present &= names


def _lost(folder: Path, why: str) -> Refused:
    remedy = f"what a client keeps between its tasks cannot be read: {why}; put it back, or remove the checkpoint to begin again"
    return Refused(STATES, str(folder), remedy)
