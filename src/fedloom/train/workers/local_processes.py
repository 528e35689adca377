"""Workers as local processes over one copy of the base model in memory.

Processes are spawned, not forked: torch's threads do not survive a fork. The base lies in a file that all of them map.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fedloom.core.errors import Refused
from fedloom.core.policies import Trainer
from fedloom.train.workers.shared_memory import SharedObject, share_object
from fedloom.train.workers.worker import TrainingWorker, Workers, train_pickled

MEMORY = Path("/dev/shm")
"""Folder of the shared base if it has room; else the folder for temporary files, of which memory holds one copy too."""


class LocalProcesses:
    """Local processes over one shared trainer."""

    death_errors = (BrokenProcessPool,)

    def __init__(self, trainer: Trainer, workers: Workers) -> None:
        self.most_workers = workers.count or 1
        places = (MEMORY, Path(tempfile.gettempdir()))
        try:
            self.shared = share_object(trainer, places)
        except OSError as error:
            remedy = (
                f"no room for the shared base in {' or '.join(map(str, places))} ({error}); start a container "
                "with a larger --shm-size, or set TMPDIR to a folder with room, or train with 1 worker"
            )
            raise Refused("workers", str(workers), remedy) from error

        self.started: list[LocalProcess] = []

    def start_worker(self) -> TrainingWorker:
        """Start a process."""
        self.started.append(LocalProcess(self.shared))
        return self.started[-1]

    def replace_worker(self) -> TrainingWorker:
        """Start a process in the place of one that died."""
        return self.start_worker()

    def close(self) -> None:
        """Free the shared memory, as far as this process itself does not use it."""
        for process in self.started:
            process.pool.shutdown()
        self.shared.file.close()


class LocalProcess:
    """Worker process, in an executor of its own, so that its death ends no other. It lives while this process holds the `leash`."""

    def __init__(self, shared: SharedObject) -> None:
        context = get_context("spawn")
        held, self.leash = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(1, context, _begin, (shared, held, torch.get_num_threads()))

    def submit(self, group: bytes) -> Future[bytes]:
        """Submit a group; the first one starts the process."""
        try:
            with interrupts_blocked():
                return self.pool.submit(_train, group)
        except BrokenProcessPool as error:
            dead: Future[bytes] = Future()
            dead.set_exception(error)
            return dead

    def stop(self) -> None:
        """End the process by closing the leash."""
        self.leash.close()


@contextmanager
def interrupts_blocked() -> Iterator[None]:
    """Inside, start processes that ignore Ctrl-C, which a terminal sends to all: this process ends them by other means."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Inside a worker process --------------------------------------------------------------------------------------------------

_trainer: Trainer


def _begin(shared: SharedObject, leash: Connection, threads: int) -> None:
    global _trainer
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()
    torch.set_num_threads(threads)
    with shared.file:
        _trainer = shared.get()


def _end_with(leash: Connection) -> None:
    """End this process when the leash can be read: nothing is ever sent, so its other end was closed, on purpose or by death."""
    leash.poll(None)
    os._exit(1)


def _train(group: bytes) -> bytes:
    return train_pickled(_trainer, group)
