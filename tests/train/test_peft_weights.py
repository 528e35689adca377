"""PEFT's weights and ours: what goes in comes out."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, Factor
from fedloom.plan.depth import FixedDepth, check_blocks
from fedloom.train import peft_weights
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.settings import Engine, LoRA
from tests.support.families import FAMILIES, Family
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


def test_an_adapter_goes_to_a_device_as_one_buffer_where_it_has_several_tensors(encoder: Path) -> None:
    """The device "meta" has no numbers, but takes copies."""
    adapter, meta = lively(initial_adapter(base_of(encoder), 4)), torch.device("meta")
    there = peft_weights.copy_adapter(adapter, meta)
    assert {name: f.up.shape for name, f in there.factors.items()} == {
        n: f.up.shape for n, f in adapter.factors.items()
    }
    assert there.flat is not None
    assert there.flat.buffer.device == meta
    assert peft_weights.copy_adapter(adapter, torch.device("cpu")) is adapter
    name = next(iter(adapter.factors))
    small = peft_weights.copy_adapter(Adapter({name: adapter.factors[name]}), meta)
    assert small.factors[name].down.device == meta


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


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_fold_far_smaller_than_the_weights_is_not_rounded_away(encoder: Path, bfloat16: bool) -> None:
    base = load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine("torch", bfloat16=bfloat16))
    start, x = lively(initial_adapter(base, 4)), torch.randn(5, 32)
    layer = next(iter(peft_weights.lora_layers(base.model).values())).get_base_layer()
    small = [Adapter({n: Factor(f.down, f.up * size) for n, f in start.factors.items()}) for size in (1e-3, 3e-3)]

    def output(fold: Adapter | None) -> Tensor:
        base.put(start, fold=fold)
        found: Tensor = layer(x).detach()
        return found

    plain = output(None)
    for fold in small:  # the second in place of the first
        change = x @ next(iter(fold.factors.values())).down.T @ next(iter(fold.factors.values())).up.T
        assert float((output(fold) - plain - change).norm()) < 1e-3 * float(change.norm())
    assert torch.equal(output(None), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "depths"),
    [
        ("BERT", "bert.encoder.layer", {0, 1, 2, 3, 4}),  # the pooler lies above
        ("T5", "transformer.decoder.block", {1, 2, 3, 4, 5}),  # the encoder lies below the decoder
        ("BART", "model.decoder.layers", {1, 2, 3, 4, 5}),
        ("OPT", "model.decoder.layers", {1, 2, 3, 4}),
        ("Mixtral", "model.layers", {1, 2, 3, 4}),
        ("Gemma 3, vision", "model.language_model.layers", {1, 2, 3, 4, 5, 6}),
    ],
)
def test_blocks_are_those_that_text_passes_last(name: str, path: str, depths: set[int], tmp_path: Path) -> None:
    base = base_of(FAMILIES[name].save(tmp_path), target_modules="all-linear")
    found = peft_weights.transformer_blocks(base.model)
    assert found is not None
    assert found[0] == path
    assert {*peft_weights.layer_depths(base.model).values()} == depths
    assert (base.shape().layers, base.shape().hidden) == (len(found[1]), 32)


@pytest.mark.slow
def test_no_list_of_blocks_where_blocks_are_not_passed_once_each(tmp_path: Path) -> None:
    """ALBERT passes one block many times; XLM has a list of attentions and one of the rest of its blocks."""
    sizes = {"vocab_size": 30, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "pad_index": 0, "unk_index": 1}
    for family in (FAMILIES["ALBERT"], Family("XLM", "encoder", "XLMConfig", "XLMModel", sizes, "encoder")):
        base = base_of(family.save(tmp_path / family.name), target_modules="all-linear")
        assert peft_weights.transformer_blocks(base.model) is None
        assert base.shape().depths == {}
        kind = type(base.model.get_base_model()).__name__
        with pytest.raises(Refused, match=f"{kind} has no list of blocks, each passed once; leave plan.depth out"):
            check_blocks(FixedDepth(1), base.shape(), kind)


def test_layers_are_looked_for_once_a_model_and_a_copy_has_its_own(encoder: Path) -> None:
    model = base_of(encoder).model
    copied = copy.deepcopy(model)
    for find in (peft_weights.lora_layers, peft_weights.layer_depths, peft_weights.transformer_blocks):
        assert find(model) is find(model)
        assert find(copied) is not find(model)
    assert not {map(id, peft_weights.lora_layers(copied).values())} & {
        map(id, peft_weights.lora_layers(model).values())
    }
    gone = weakref.ref(copied)
    del copied
    gc.collect()
    assert gone() is None
