"""Ray's one door: workers as actors, on this machine or a cluster of machines, each with a warm base of its own.

Every machine needs the same versions of fedloom and its libraries; same bytes from different kinds of processors are not to be had.
"""

from __future__ import annotations

import math
import os
import socket
from concurrent.futures import Future
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError

from fedloom.core.errors import Refused
from fedloom.core.policies import Trainer
from fedloom.train.workers.pool import Workers
from fedloom.train.workers.shared_memory import dumps, loads
from fedloom.train.workers.worker import Worker, carry_out


class Actors:
    """A crew of actors: each has as many processors as the run has threads, and a share of a GPU if the base lies on one."""

    died = (RayActorError, NodeDiedError, OutOfMemoryError)

    def __init__(self, trainer: Trainer, asked: Workers) -> None:
        body = dumps(trainer)
        self.threads, on_gpu = torch.get_num_threads(), _on_gpu(trainer)
        self.began = not ray.is_initialized()
        try:
            if self.began:
                _connect(asked)
            self.size, self.gpus = _shares(asked, self.threads, on_gpu)
            self.trainer = ray.put(body)
        except BaseException:
            self.close()
            raise

    def hire(self) -> Worker:
        """A new actor, wherever the cluster has room."""
        made: Any = ray.remote(_Actor)
        return Actor(made.options(num_cpus=self.threads, num_gpus=self.gpus).remote(self.trainer, self.threads))

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.began:
            ray.shutdown()


class Actor:
    """One actor, seen from here."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def submit(self, group: bytes) -> Future[bytes]:
        """The group travels through Ray's object store."""
        future: Future[bytes] = self.handle.train.remote(group).future()
        return future

    def stop(self) -> None:
        """At once; Ray restarts nothing, `Cohorts` hires anew."""
        ray.kill(self.handle)


class _Actor:
    """One actor, inside."""

    def __init__(self, trainer: bytes, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trainer: Trainer = loads(trainer)

    def train(self, group: bytes) -> bytes:
        return carry_out(self.trainer, group)


def _connect(asked: Workers) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody of itself
    host, _, port = asked.ray.removeprefix("ray://").rpartition(":") if asked.ray else ("", "", "")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=asked.ray or "local", log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray has many ways to say that nobody answers
        raise Refused("workers", str(asked), f"no Ray cluster can be reached there ({error})") from error


def _shares(asked: Workers, threads: int, on_gpu: bool) -> tuple[int, float]:
    """How many actors, and each one's share of a GPU. Raises Refused for more than the cluster has room for."""
    has = ray.cluster_resources()
    cpus, gpus = int(has.get("CPU", 0) / threads), int(has.get("GPU", 0))
    count = asked.count or (min(cpus, gpus) if on_gpu else cpus)
    if not 1 <= count <= cpus or (on_gpu and not gpus):
        room = f"{int(has.get('CPU', 0))} processors and {gpus} GPUs, an actor takes {threads} threads"
        raise Refused("workers", str(asked), f"the cluster has {room}" + (" and a share of a GPU" if on_gpu else ""))
    return count, 1 / math.ceil(count / gpus) if on_gpu else 0.0


def _on_gpu(trainer: Trainer) -> bool:
    base = getattr(trainer, "base", None)
    return base is not None and base.device.type == "cuda"
