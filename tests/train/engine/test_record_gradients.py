"""Gradients of single examples in one pass: those of each example alone, clipped and summed; and the models that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedloom.train import loss, peft_weights
from fedloom.train.base_model import Base, initial_adapter
from fedloom.train.engine.batched_clients import gradients_of
from fedloom.train.engine.record_gradients import ExamplePass, clipped_sum, passes, tells_examples_apart
from fedloom.train.tokenised import EncodedTexts
from tests.support.families import FAMILIES, Family
from tests.support.tiny_runs import base_of, frozen, lively, trainer_of, writer_of, writing_trainer

ROWS = (0, 3, 5, 9, 11)


def model_of(request: pytest.FixtureRequest, kind: str) -> tuple[Base, EncodedTexts]:
    folder: Path = request.getfixturevalue(kind)
    base = writer_of(folder) if kind == "generator" else base_of(folder)
    return base, (writing_trainer(base) if kind == "generator" else trainer_of(base)).texts


def pass_of(base: Base, texts: EncodedTexts) -> tuple[ExamplePass, Losses]:
    slot = base.put(lively(initial_adapter(base, 4)))
    weights = peft_weights.slot_parameters(base.model, slot)
    base.model.eval()
    return ExamplePass(base, slot, weights, [*weights], base.lora.scaling), Losses(base, texts)


class Losses:
    def __init__(self, base: Base, texts: EncodedTexts) -> None:
        self.base, self.texts = base, texts

    def __call__(self, rows: Sequence[int]) -> Tensor:
        return loss.example_losses(self.base, self.texts.batch(rows, self.base.device))


def alone(one_pass: ExamplePass, losses: Losses, row: int) -> dict[str, Tensor]:
    for weight in one_pass.weights.values():
        weight.requires_grad_(True)
    return gradients_of(losses([row]), one_pass.weights)


@pytest.mark.parametrize("kind", ["encoder", "decoder", "generator"])
def test_gradients_are_those_of_each_example_alone(request: pytest.FixtureRequest, kind: str) -> None:
    base, texts = model_of(request, kind)
    before = frozen(base)
    one_pass, losses = pass_of(base, texts)
    together = one_pass.gradients(losses, ROWS)
    for k, row in enumerate(ROWS):
        for name, slope in alone(one_pass, losses, row).items():
            assert float((together[name][k] - slope).abs().max()) <= 3e-6 * float(slope.abs().max())
    after = frozen(base)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_sum_is_that_of_clipped_examples_whatever_the_passes(encoder: Path) -> None:
    base = base_of(encoder)
    one_pass, losses = pass_of(base, trainer_of(base).texts)
    slopes = [alone(one_pass, losses, row) for row in ROWS]
    norms = [float(torch.cat([slope.flatten() for slope in each.values()]).double().norm()) for each in slopes]
    clip = sorted(norms)[2]  # some are cut, some are not
    for most in (2, 5, 100):
        found = one_pass.clipped_sum(losses, ROWS, clip, most)
        for name, tensor in found.items():
            pairs = zip(slopes, norms, strict=True)
            expected = sum(min(1.0, clip / norm) * each[name].double() for each, norm in pairs)
            assert tensor.dtype == torch.float64
            assert float((tensor - expected).abs().max()) <= 3e-6 * float(expected.abs().max())  # type: ignore[union-attr]


def test_an_empty_batch_adds_nothing(encoder: Path) -> None:
    base = base_of(encoder)
    one_pass, losses = pass_of(base, trainer_of(base).texts)
    found = one_pass.clipped_sum(losses, [], 1.0, 8)
    assert found.keys() == one_pass.weights.keys()
    assert not any(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_no_example_adds_more_than_the_clip(size: float) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = {"a": size * torch.randn(4, 5, 6, generator=draw), "b": size * torch.randn(4, 3, generator=draw)}
    rows = [clipped_sum({name: g[k : k + 1] for name, g in gradients.items()}, 0.7) for k in range(4)]
    for row in rows:
        assert float(torch.cat([tensor.flatten() for tensor in row.values()]).norm()) <= 0.7 * (1 + 1e-12)
    for name, tensor in clipped_sum(gradients, 0.7).items():
        assert torch.allclose(tensor, sum(row[name] for row in rows), rtol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_counts_as_none(broken: float) -> None:
    gradients = {"a": torch.ones(3, 4), "b": torch.ones(3, 2, 2)}
    gradients["a"][1, 2] = broken
    whole = {name: torch.stack([tensor[0], tensor[2]]) for name, tensor in gradients.items()}
    expected = clipped_sum(whole, 1.0)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in clipped_sum(gradients, 1.0).items())
    assert not clipped_sum({"a": torch.zeros(2, 3)}, 1.0)["a"].any(), "and one of zero is zero"


@pytest.mark.parametrize(("size", "most"), [(0, 4), (4, 4), (5, 4), (23, 7), (3, 1)])
def test_passes_cover_a_batch_in_nearly_equal_parts(size: int, most: int) -> None:
    parts = passes(range(size), most)
    assert [row for part in parts for row in part] == [*range(size)]
    lengths = [len(part) for part in parts]
    assert not lengths or (max(lengths) <= most and max(lengths) - min(lengths) <= 1)


class BatchNormed(nn.Module):
    """A layer behind which what a row gives depends on the others, in training alone."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm1d(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.inner(hidden).movedim(-1, 1)).movedim(1, -1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["encoder", "decoder", "generator"])
def test_models_that_keep_their_rows_apart_are_known(request: pytest.FixtureRequest, kind: str) -> None:
    base, _ = model_of(request, kind)
    assert tells_examples_apart(base)


@pytest.mark.slow
def test_a_model_that_normalises_over_a_batch_is_found_out_and_left_as_it_was(encoder: Path) -> None:
    base = base_of(encoder)
    model: Any = base.model.get_base_model()
    layer = model.bert.encoder.layer[0].output
    layer.dense = BatchNormed(layer.dense, layer.dense.out_features)
    before = {name: buffer.clone() for name, buffer in base.model.named_buffers()}
    assert not tells_examples_apart(base)
    assert all(torch.equal(before[name], buffer) for name, buffer in base.model.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets", "apart"),
    [
        ("DeBERTa-v3", None, False),  # positions are projected once for all rows
        ("XLNet", None, False),  # tokens before rows
        ("OPT", "all-linear", True),  # rows and tokens in one axis
        ("Mixtral", "all-linear", True),
    ],
)
def test_other_families_are_tried(name: str, targets: str | None, apart: bool, tmp_path: Path) -> None:
    assert tells_examples_apart(base_of(FAMILIES[name].save(tmp_path), target_modules=targets)) is apart


@pytest.mark.slow
def test_a_model_that_mixes_padding_with_words_is_found_out(tmp_path: Path) -> None:
    sizes = {k: v for k, v in FAMILIES["BERT"].sizes.items() if k != "num_attention_heads"}
    folder = Family("FNet", "encoder", "FNetConfig", "FNetModel", sizes, "encoder").save(tmp_path)
    assert not tells_examples_apart(base_of(folder, target_modules="all-linear"))
