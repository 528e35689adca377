"""The last block of a model that writes, where answers are: the same losses and gradients, in every family."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedloom.core.types import ClientState
from fedloom.train import loss
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.engine import answer_tokens
from fedloom.train.settings import PLAIN, Engine, LoRA
from tests.support.families import FAMILIES
from tests.support.family_law import EXAMPLES, Case, Scene, has_class, load_scene
from tests.support.tiny_runs import lively, same, task_of

ALONE = replace(PLAIN, answer_tokens=True)
ONE_OF_EACH = ("Llama", "Gemma 2", "Qwen3-MoE", "Mamba 2", "Qwen3.5, linear alone", "Gemma 3, vision", "GPT-2")
WRITE = [name for name, one in FAMILIES.items() if one.kind not in ("encoder", "encoder-decoder")]
FOUND = {
    "Llama": {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "GPT-2": {"c_fc", "c_proj"},
    "Mamba 2": {"out_proj"},
}
"""What may be left out where nobody reads it: not keys, values, or what a recurrence reads."""


def scene_of(name: str, place: Path) -> Scene:
    case = Case(FAMILIES[name], True, "all-linear")
    assert has_class(case)
    scene = load_scene(case, case.family.save(place / "model"), place)
    scene.base.read_alone = answer_tokens.find_layers(scene.base.model, scene.base.tokenizer)
    return scene


@contextmanager
def everywhere(base: Base) -> Iterator[None]:
    """Inside, all tokens are computed."""
    layers, base.read_alone = base.read_alone, ()
    try:
        yield
    finally:
        base.read_alone = layers


def losses_and_gradients(scene: Scene) -> tuple[Tensor, Mapping[str, Mapping[str, Tensor]]]:
    scene.base.put(scene.adapter)
    with torch.no_grad():
        losses = loss.example_losses(scene.base, scene.texts.batch(range(EXAMPLES), scene.base.device))
    ((_, state),) = scene.trainer().train([(task_of(scene.adapter), ClientState())])
    return losses, state.moments


def check(scene: Scene) -> None:
    losses, moments = losses_and_gradients(scene)
    with everywhere(scene.base):
        plain, expected = losses_and_gradients(scene)
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    largest = max(float(moment["exp_avg"].norm()) for moment in expected.values())
    for name, moment in expected.items():
        gap = float((moments[name]["exp_avg"] - moment["exp_avg"]).norm())
        assert gap <= 1e-3 * max(float(moment["exp_avg"].norm()), 1e-3 * largest), name


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_losses_and_gradients_stay(tmp_path: Path, name: str) -> None:
    scene = scene_of(name, tmp_path)
    names = {id(module): path.rpartition(".")[2] for path, module in scene.base.model.named_modules()}
    found = {names[id(layer)] for layer in scene.base.read_alone}
    assert found == FOUND.get(name, found)
    assert found or name == "Qwen3.5, linear alone"
    check(scene)


@pytest.mark.storms
@pytest.mark.parametrize("name", sorted({*WRITE} - {*ONE_OF_EACH}))
def test_losses_and_gradients_stay_in_every_family(tmp_path: Path, name: str) -> None:
    check(scene_of(name, tmp_path))


def test_only_tokens_that_are_read_are_computed(tmp_path: Path) -> None:
    scene, rows = scene_of("Llama", tmp_path), list[tuple[int, ...]]()
    inputs = scene.texts.batch(range(4), scene.base.device)
    read = int((inputs["labels"][:, 1:] != -100).sum())
    block: Any = scene.base.model.get_base_model().model.layers[-1]  # type: ignore[union-attr, operator]
    for layer in (block.mlp.up_proj, block.self_attn.k_proj):
        layer.base_layer.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape[:-1])))
    loss.example_losses(scene.base, inputs)
    assert sorted(rows, key=len) == [(read,), tuple(inputs["input_ids"].shape)]
    assert "forward" not in vars(block.mlp.up_proj)


class Doubled(nn.Linear):
    """A layer whose forward is seen."""


@pytest.mark.parametrize(("count", "alone"), [(0, False), (3, True), (9, True), (10, False), (12, False)])
def test_nothing_is_gathered_where_it_saves_nothing(count: int, alone: bool) -> None:
    layer, places = Doubled(2, 2), torch.arange(count)
    whole = torch.randn(3, 4, 2)
    with answer_tokens.computed_at([layer], places // 4, places % 4, (3, 4)):
        assert ("forward" in vars(layer)) is alone
        found = layer(whole)
    assert bool((found[places // 4, places % 4] == layer(whole)[places // 4, places % 4]).all())
    assert bool((found.flatten(0, 1)[count:] == 0).all()) is alone or count == 12


def test_other_shapes_are_computed_whole() -> None:
    layer = Doubled(2, 2)
    with answer_tokens.computed_at([layer], torch.tensor([0]), torch.tensor([1]), (3, 4)):
        for shape in ((12, 2), (4, 3, 2), (3, 4, 1, 2)):
            x = torch.ones(*shape)
            assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_what_is_put_together_in_another_way_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of("Llama", tmp_path)
    monkeypatch.setattr(answer_tokens.peft_weights, "transformer_blocks", lambda _: None)
    assert answer_tokens.find_layers(scene.base.model, scene.base.tokenizer) == ()


def test_a_base_says_whether_it_does_and_can_be_sent(tmp_path: Path) -> None:
    folder = FAMILIES["Llama"].save(tmp_path / "model")
    bases = [
        load_base(str(folder), labels, LoRA(), 4, 3, engine=engine)
        for labels, engine in ((None, ALONE), (None, PLAIN), (2, ALONE), (None, replace(ALONE, checkpointing=True)))
    ]
    assert [base.computation["answer_tokens"] for base in bases] == [True, False, False, False]
    assert Engine().answer_tokens
    again = pickle.loads(pickle.dumps(bases[0]))
    inside = {id(module) for module in again.model.modules()}
    assert again.read_alone
    assert all(id(layer) in inside for layer in again.read_alone)
    assert same(lively(initial_adapter(bases[0], 4)), lively(initial_adapter(again, 4)))
