"""Where torch computes: on which device, and in how many threads, where a run leaves that open."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fedloom.core.errors import Refused
from fedloom.core.text import first_line

AUTO = "auto"
"""The device that is chosen here: an NVIDIA or AMD GPU if torch finds one, else the CPU."""
MOST_BY_CORES = 8
"""Threads that are chosen at most: the batches of one client are small, and more clients at once (`--workers`) pay better."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""What a container may use of the processors: microseconds of a period, or "max", and the period."""


def find_device(name: str) -> torch.device:
    """Return the device of this name, or for "auto" the one that is chosen here. Raises Refused where there is no such device."""
    if name == AUTO:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        remedy = "choose auto, cpu, cuda, cuda:1 (the second GPU) or mps (Apple)"
        if "Expected one of" not in str(error):
            remedy = f"this machine has no such device ({first_line(error)}); {remedy}"
        raise Refused("device", name, remedy) from error


def choose_threads(processes: int = 1) -> int:
    """Return the number of threads of each of these processes: OMP_NUM_THREADS if it is set, else its share of the cores, at most 8.

    More threads than cores is many times slower: those that wait keep a core busy.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    return max(1, min(usable_cores() // processes, MOST_BY_CORES))


def usable_cores() -> int:
    """Return how many cores this process may use: those that it is bound to, or the share of a container, if that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no container, or one without a limit
        return cores


def describe_device(name: str, threads: int) -> str:
    """Describe a device in words for a person: "NVIDIA H200 (cuda)", or "CPU, 2 threads"."""
    device = torch.device(name)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({name})"
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}" if device.type == "cpu" else name
