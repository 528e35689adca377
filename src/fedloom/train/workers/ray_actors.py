"""Workers as Ray actors, on this machine or a cluster, each with a base model of its own. Ray is imported here alone.

Every machine needs the same versions of fedloom and its libraries; different kinds of processors give different last digits.
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
from fedloom.train.workers.shared_memory import pickle_object, unpickle_object
from fedloom.train.workers.worker import Workers, train_pickled

DETECTION = 60.0
"""Seconds within which a cluster notices that a machine is dead: five checks, three seconds apart, of up to ten seconds each."""


class RayActors:
    """Ray actors: each has as many processors as the run has threads, and a share of a GPU if the base model lies on one."""

    death_errors = (RayActorError, NodeDiedError, OutOfMemoryError)

    def __init__(self, trainer: Trainer, workers: Workers) -> None:
        body = pickle_object(trainer)
        self.threads, on_gpu = torch.get_num_threads(), _on_gpu(trainer)
        self.owns_cluster = not ray.is_initialized()
        try:
            if self.owns_cluster:
                _connect(workers)
            self.most_workers, self.gpus = _shares(workers, self.threads, on_gpu)
            self.trainer = ray.put(body)
        except BaseException:
            self.close()
            raise

    def start_worker(self) -> RayActor:
        """Start an actor wherever the cluster has room."""
        actor_class: Any = ray.remote(_ActorBody)
        return RayActor(
            actor_class.options(num_cpus=self.threads, num_gpus=self.gpus).remote(self.trainer, self.threads)
        )

    def replace_worker(self) -> RayActor | None:
        """Start an actor in the place of one that died, unless its machine left no room.

        A dead machine counts as room for a while, and an actor that was to run there would wait for ever. So an actor that does not
        begin within `DETECTION` seconds counts only if the cluster still has room for all.
        """
        actor = self.start_worker()
        if ray.wait([actor.handle.ready.remote()], timeout=DETECTION)[0]:
            return actor
        room = _room(self.threads)
        if room >= self.most_workers:
            return actor
        actor.stop()
        self.most_workers = room
        return None

    def close(self) -> None:
        """Shut the cluster down if it was started here."""
        if self.owns_cluster:
            ray.shutdown()


class RayActor:
    """The handle of one actor."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def submit(self, group: bytes) -> Future[bytes]:
        """Submit a group, which travels through Ray's object store."""
        future: Future[bytes] = self.handle.train.remote(group).future()
        return future

    def stop(self) -> None:
        """Kill the actor at once; Ray restarts nothing, the pool starts a new one."""
        ray.kill(self.handle)


class _ActorBody:
    """What runs inside an actor."""

    def __init__(self, trainer: bytes, threads: int) -> None:
        torch.set_num_threads(threads)
        self.trainer: Trainer = unpickle_object(trainer)

    def ready(self) -> None:
        """Return once the actor is there."""

    def train(self, group: bytes) -> bytes:
        return train_pickled(self.trainer, group)


def _connect(workers: Workers) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    host, _, port = workers.ray.removeprefix("ray://").rpartition(":") if workers.ray else ("", "", "")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=workers.ray or "local", log_to_driver=False, logging_level="error")
    except Exception as error:  # Ray raises many kinds of errors where nobody answers
        raise Refused("workers", str(workers), f"no Ray cluster can be reached there ({error})") from error


def _shares(workers: Workers, threads: int, on_gpu: bool) -> tuple[int, float]:
    """Return how many actors to start, and each one's share of a GPU. Raises Refused for more than the cluster has room for."""
    resources = ray.cluster_resources()
    cpus, gpus = _room(threads), int(resources.get("GPU", 0))
    count = workers.count or (min(cpus, gpus) if on_gpu else cpus)
    if not 1 <= count <= cpus or (on_gpu and not gpus):
        room = f"{int(resources.get('CPU', 0))} processors and {gpus} GPUs, an actor takes {threads} threads"
        raise Refused("workers", str(workers), f"the cluster has {room}" + (" and a share of a GPU" if on_gpu else ""))
    return count, 1 / math.ceil(count / gpus) if on_gpu else 0.0


def _room(threads: int) -> int:
    return int(ray.cluster_resources().get("CPU", 0) / threads)


def _on_gpu(trainer: Trainer) -> bool:
    base = getattr(trainer, "base", None)
    return base is not None and base.device.type == "cuda"
