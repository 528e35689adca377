"""Where torch computes where a run leaves it open: the device, and threads by cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fedloom.core.errors import Refused
from fedloom.train import device
from fedloom.train.device import choose_threads, describe_device, find_device, usable_cores


def test_threads_follow_the_environment_else_the_cores_which_processes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "usable_cores", lambda: 6)
    for wanted in ("", "0", "-1", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        assert [choose_threads(processes) for processes in (1, 2, 4, 100)] == [6, 3, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [choose_threads(processes) for processes in (1, 2)] == [3, 3]
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(device, "usable_cores", lambda: 64)
    assert choose_threads() == device.MOST_BY_CORES


@pytest.mark.parametrize(
    ("limit", "cores"), [("150000 100000", 2), ("20000 100000", 1), ("max 100000", None), ("9900000 100000", None)]
)
def test_a_container_may_use_its_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, cores: int | None
) -> None:
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "cpu.max")
    assert usable_cores() == (cores or 16)
    monkeypatch.setattr(device, "CPU_QUOTA", tmp_path / "nothing")
    assert usable_cores() == 16


def test_a_gpu_is_taken_if_there_is_one() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert str(find_device("cpu")) == "cpu"
    assert describe_device("cpu", 1) == "CPU, 1 thread"
    assert describe_device("cpu", 8) == "CPU, 8 threads"


def test_a_device_that_is_none_is_refused_with_those_there_are() -> None:
    for name in ("gpu", "cuda:99", "cuda:x", ""):
        with pytest.raises(Refused, match=r"choose auto, cpu, cuda, cuda:1"):
            find_device(name)
