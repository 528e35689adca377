"""The bench of the accelerator, on a machine without one."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main([])
    *_, said, last = capsys.readouterr().out.splitlines()
    assert "no accelerator" in said
    assert json.loads(last) == {"accelerator": None}


@pytest.mark.slow
def test_a_tiny_model_on_the_cpu_is_measured_in_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["--quick", "--device", "cpu", "--shapes", "tiny"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["tiny"]
    assert min(found["clients_an_hour_one"], found["clients_an_hour_stacked"], found["merge_seconds_device"]) > 0
    assert found["clients_a_device"] is None  # memory is that of a GPU
