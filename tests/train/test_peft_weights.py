"""PEFT's weights and ours: what goes in comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedloom.train import peft_weights
from fedloom.train.base_model import initial_adapter
from tests.support.tiny_runs import base_of, lively, same


@pytest.mark.parametrize("scaling", [0.5, 1.0, 2.0, 4.0])
def test_a_round_trip_is_exact_when_scaling_is_a_power_of_two(encoder: Path, scaling: float) -> None:
    base = base_of(encoder, scaling=scaling)
    adapter = lively(initial_adapter(base, 4))
    slot = base.put(adapter)
    assert same(peft_weights.read_adapter(base.model, slot), adapter)


@pytest.mark.parametrize("scaling", [0.3, 3.0, 16 / 7])
def test_a_round_trip_rounds_once_at_odd_scalings(decoder: Path, scaling: float) -> None:
    base = base_of(decoder, scaling=scaling)
    adapter = lively(initial_adapter(base, 4))
    read = peft_weights.read_adapter(base.model, base.put(adapter))
    for name, factor in adapter.factors.items():
        assert torch.equal(read.factors[name].down, factor.down)
        assert torch.allclose(read.factors[name].up, factor.up, rtol=1e-6, atol=0)


def test_an_adapter_that_was_read_has_memory_of_its_own(encoder: Path) -> None:
    base = base_of(encoder)
    adapter = lively(initial_adapter(base, 4))
    read = peft_weights.read_adapter(base.model, base.put(adapter))
    base.put(lively(adapter, seed=1))
    assert same(read, adapter)


def test_names_are_those_of_the_base_model_at_any_rank(encoder: Path) -> None:
    base = base_of(encoder)
    low, high = initial_adapter(base, 2), initial_adapter(base, 8)
    plain = dict(base.model.get_base_model().named_modules())
    assert list(low.factors) == list(high.factors) == [name for name in low.factors if name in plain]
    assert list(low.dense) == ["classifier.weight", "classifier.bias"]
