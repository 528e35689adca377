"""Frozen layers through oneDNN: the same numbers to rounding, and the layer stays what it was to everybody else."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.types import ClientState, TaskStart
from fedloom.train import base_model
from fedloom.train.base_model import initial_adapter
from fedloom.train.engine import linear_kernel
from fedloom.train.settings import Engine, LoRA
from tests.support.families import FAMILIES
from tests.support.tiny_runs import base_of, lively, same, task_of, trainer_of, writing_trainer
from tests.support.toys import factor

pytestmark = pytest.mark.skipif(
    not linear_kernel.onednn_available(), reason="this build of torch has no oneDNN linear operator"
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5), (1, 5)])
def test_values_and_gradients_are_those_of_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain = nn.Linear(5, 7, bias).requires_grad_(False)
    fast = copy.deepcopy(plain)
    assert linear_kernel.install_linear_kernel(fast) == 1
    x, slope = torch.randn(shape), torch.randn(*shape[:-1], 7)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(fast(other), plain(one))
    plain(one).backward(slope)
    fast(other).backward(slope.transpose(0, -2).contiguous().transpose(0, -2) if len(shape) > 2 else slope)
    torch.testing.assert_close(one.grad, other.grad)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x))


def test_the_transposed_weight_follows_a_weight_that_was_written_to() -> None:
    layer = nn.Linear(4, 3).requires_grad_(False)
    linear_kernel.install_linear_kernel(layer)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    layer.weight.copy_(torch.ones(3, 4))
    x.grad = None
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 4), 3.0))


def test_a_trained_layer_and_other_types_compute_as_before() -> None:
    trained = nn.Linear(4, 3)
    assert linear_kernel.install_linear_kernel(trained) == 0
    frozen = nn.Linear(4, 3).requires_grad_(False)
    linear_kernel.install_linear_kernel(frozen)
    assert frozen.double()(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    frozen.float().requires_grad_(True)
    frozen(torch.randn(2, 4)).sum().backward()
    assert frozen.weight.grad is not None


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_task_trains_to_the_same_adapter_also_over_a_fold(request: pytest.FixtureRequest, kind: str) -> None:
    adapters = []
    for fast in (False, True):
        base = base_of(request.getfixturevalue(kind))
        if fast:
            linear_kernel.install_linear_kernel(base.model)
        start = lively(initial_adapter(base, 4))
        fold = Adapter({n: factor(2, len(f.up), f.down.shape[1], 9) for n, f in start.factors.items()})
        task = task_of(start)
        object.__setattr__(task.start, "fold", fold)
        ((result, _),) = trainer_of(base).train([(task, ClientState())])
        adapters.append(result.adapter)
    for name, f in adapters[0].factors.items():
        torch.testing.assert_close(f.up, adapters[1].factors[name].up, rtol=1e-3, atol=1e-4)
    assert not same(adapters[0], start)


def test_a_base_is_loaded_with_it_and_copied_whole(encoder: Path) -> None:
    fast = base_model.load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine("onednn"))
    assert any(isinstance(module, linear_kernel.FrozenLinear) for module in fast.model.modules())
    assert not any(isinstance(m, linear_kernel.FrozenLinear) and m.weight.requires_grad for m in fast.model.modules())
    copy.deepcopy(fast.model).merge_and_unload()


def test_a_torch_without_the_operator_is_told(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kernel, "onednn_available", lambda: False)
    with pytest.raises(Refused, match="kernel"):
        base_model.load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine("onednn"))


def test_the_fastest_kernel_is_one_that_exists() -> None:
    assert linear_kernel.fastest_kernel() in ("torch", "onednn")


def test_a_base_in_bfloat16_takes_half_the_memory_and_learns_the_same_roughly(encoder: Path) -> None:
    exact, half = (
        base_model.load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine("torch", bfloat16=b)) for b in (False, True)
    )
    frozen = [m for m in half.model.modules() if isinstance(m, linear_kernel.HalfLinear)]
    assert frozen
    assert all(layer.weight.dtype == torch.bfloat16 for layer in frozen)
    assert all(p.dtype == torch.float32 for p in half.model.parameters() if p.requires_grad)
    start = lively(initial_adapter(exact, 4))
    fold = Adapter({n: factor(2, len(f.up), f.down.shape[1], 9) for n, f in start.factors.items()})
    tasks = [replace(task_of(start), start=TaskStart(start, "0", fold=fold)) for _ in (exact, half)]
    ((one, _),), ((other, _),) = (
        trainer_of(b).train([(t, ClientState())]) for b, t in zip((exact, half), tasks, strict=True)
    )
    assert other.metrics["first_loss"] == pytest.approx(one.metrics["first_loss"], rel=0.1)
    assert all(f.up.dtype == torch.float32 for f in other.adapter.factors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "spared"), [("GPT-2", ()), ("Mamba", ("dt_proj",)), ("Qwen3-Next", ()), ("T5", ()), ("Falcon", ())]
)
def test_bfloat16_computes_in_every_kind_of_model(name: str, spared: tuple[str, ...], tmp_path: Path) -> None:
    """GPT-2 and Falcon have linear layers of their own kinds; Mamba reads the weight of a layer that it does not call."""
    family = FAMILIES[name]
    labels = 2 if family.kind == "encoder-decoder" else None
    base = base_model.load_base(str(family.save(tmp_path)), labels, LoRA(), 4, 0, engine=Engine("torch", bfloat16=True))
    halves = [m for m in base.model.modules() if isinstance(m, linear_kernel.HalfLinear | linear_kernel.HalfConv1D)]
    assert len(halves) >= len(initial_adapter(base, 4).factors)
    for path, module in base.model.named_modules():
        if path.endswith(spared):
            assert module.weight.dtype == torch.float32
    trainer = trainer_of(base) if labels else writing_trainer(base)
    ((result, _),) = trainer.train([(task_of(initial_adapter(base, 4)), ClientState())])
    assert result.metrics["loss"] > 0


def test_bfloat16_is_refused_where_it_would_change_nothing() -> None:
    class Router(nn.Linear):
        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
            logits = super().forward(input)
            return logits, logits.argmax(-1)

    router = Router(4, 3).requires_grad_(False)
    with pytest.raises(Refused, match=r"engine\.bfloat16"):
        linear_kernel.install_linear_kernel(nn.Sequential(router), bfloat16=True)
    assert linear_kernel.install_linear_kernel(nn.Sequential(router, nn.Linear(4, 3).requires_grad_(False)), True) == 1
