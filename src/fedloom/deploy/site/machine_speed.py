"""Speed and memory of a site's machine: measured, where the settings do not say."""

from __future__ import annotations

import hashlib
import json
import os
import time

import torch

from fedloom.core.errors import Refused
from fedloom.core.files import read_json, write_json
from fedloom.core.types import Budget, ClientState, Task, TaskStart
from fedloom.deploy.messages.messages import RunTerms
from fedloom.deploy.site.settings import Site
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.trainer import PeftTrainer

SPEED_FILE = "speed.json"
TIMED_STEPS = 2
"""Steps timed to measure speed, after one warm-up step."""


def training_flops(site: Site, terms: RunTerms, base: Base, trainer: PeftTrainer) -> float:
    """Return the training speed (FLOP/s, as `Shape.train_flops` counts them), measured once for a model and its settings."""
    path = site.folder / SPEED_FILE
    facts = [str(site.model.path), site.model.device, terms.threads, base.computation, terms.training.batch_size]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    try:
        entry = read_json(path)
        if entry["of"] == digest:
            return float(entry["flops"])
    except (OSError, ValueError, KeyError, TypeError, Refused):
        pass
    flops = _measured(base, trainer, site.name, min(terms.rank, site.limits.rank))
    write_json(path, {"of": digest, "flops": flops})
    return flops


def _measured(base: Base, trainer: PeftTrainer, client: str, rank: int) -> float:
    tokens, seconds = 0, 0.0
    for steps in (1, TIMED_STEPS):  # the first is a warm-up
        start = TaskStart(initial_adapter(base, rank), "")
        began = time.perf_counter()
        ((result, _),) = trainer.train([(Task(1, client, 0, start, Budget(rank, steps), 0.0), ClientState())])
        tokens, seconds = result.tokens, time.perf_counter() - began
    return base.shape().train_flops(tokens, rank) / seconds


def device_memory(device: torch.device) -> float:
    """Return the bytes that a device has."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
