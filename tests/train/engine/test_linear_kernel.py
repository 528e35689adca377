"""Frozen layers through oneDNN: the same numbers to rounding, and the layer stays what it was to everybody else."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.types import ClientState, TaskStart
from fedloom.train import base_model, loss, peft_weights
from fedloom.train.base_model import initial_adapter
from fedloom.train.engine import linear_kernel
from fedloom.train.engine.batched_clients import rounding
from fedloom.train.engine.trial_texts import trial_texts
from fedloom.train.settings import PLAIN, Engine, LoRA
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
            assert linear_kernel.fuse_adapters(base.model)
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
    assert any(isinstance(module, linear_kernel.FusedLora) for module in fast.model.modules())
    assert not any(isinstance(m, linear_kernel.FrozenLinear) and m.weight.requires_grad for m in fast.model.modules())
    copy.deepcopy(fast.model).merge_and_unload()


def test_a_torch_without_the_operator_is_told(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_kernel, "onednn_available", lambda: False)
    with pytest.raises(Refused, match="kernel"):
        base_model.load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine("onednn"))


def test_the_fastest_kernel_is_one_that_exists() -> None:
    assert linear_kernel.fastest_kernel() in ("torch", "fused", "onednn")


@pytest.mark.slow
@pytest.mark.parametrize("found", ["torch", "fused", "onednn"])
def test_a_kernel_that_was_measured_computes_alike_when_it_is_named(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    """A run that goes on takes the kernel of its manifest, and no other last digits."""
    monkeypatch.setattr(linear_kernel, "fastest_kernel", lambda: found)
    measured = base_model.load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine())
    named = base_model.load_base(str(encoder), 2, LoRA(), 4, 0, engine=Engine(str(measured.computation["kernel"])))
    assert named.computation == measured.computation
    assert [*map(type, named.model.modules())] == [*map(type, measured.model.modules())]


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


# Layer and adapter in one node -----------------------------------------------------------------------------------------------

SLOT = "one"


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 20), nn.Linear(20, 7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(x)))
        return found


def adapted(rank: int = 3, dropout: float = 0.0) -> PeftModel:
    """Two layers with adapters that both change what comes out."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=6, lora_dropout=dropout, target_modules=["first", "second"])
    config.init_lora_weights = False
    return PeftModel(TwoLayers(), config, SLOT)  # type: ignore[arg-type]


def fused(model: PeftModel) -> PeftModel:
    made = copy.deepcopy(model)
    assert linear_kernel.fuse_adapters(made) == 2
    return made


def outcome(model: PeftModel, x: Tensor, trained: str = "lora_") -> dict[str, Tensor]:
    """Output, and the gradients of the input and of the parameters whose names hold `trained`; dropout always drops the same."""
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name and trained in name)
        weight.grad = None
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    found = model(x)
    found.backward(torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).to(found.dtype))
    slopes = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"output": found.detach(), "input": cast(Tensor, x.grad), **slopes}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest difference of a tensor, relative to its largest number."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - t).abs().max() / t.abs().max()) for n, t in expected.items())


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("trained", ["lora_", "lora_A", "lora_B"])
@pytest.mark.parametrize(("rank", "dropout"), [(1, 0.0), (3, 0.4), (12, 0.0)])
def test_gradients_of_a_fused_layer_are_those_of_peft(rank: int, dropout: float, trained: str, bfloat16: bool) -> None:
    model = adapted(rank, dropout)
    linear_kernel.install_linear_kernel(model, bfloat16)
    x = torch.randn(4, 5, 12)
    assert furthest(outcome(fused(model), x, trained), outcome(model, x, trained)) < 1e-5


def test_a_fused_layer_over_torchs_own_kernel_is_nearer_to_float64_than_rounding() -> None:
    model, x = adapted(), torch.randn(6, 12)
    exact = outcome(copy.deepcopy(model).double(), x.double())
    assert furthest({n: t.double() for n, t in outcome(fused(model), x).items()}, exact) < 1e-6


def test_in_half_precision_a_fused_layer_keeps_float32_gradients_and_rounds_as_peft_does() -> None:
    model = adapted().to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.float()
    found, exact = outcome(fused(model), torch.randn(6, 12).bfloat16()), adapted()
    assert all(t.dtype == torch.float32 for n, t in found.items() if "lora_" in n)
    assert found["output"].dtype == torch.bfloat16
    torch.manual_seed(0)
    x = torch.randn(40, 12)
    half, single = outcome(fused(model), x.bfloat16()), outcome(exact, x)
    assert furthest({n: t.float() for n, t in half.items()}, single) < 0.05


def test_a_fused_layer_passes_an_empty_batch_and_numbers_that_are_none() -> None:
    model = fused(adapted())
    assert model(torch.zeros(0, 12)).shape == (0, 7)
    for bad in (math.nan, math.inf):
        x = torch.zeros(2, 12)
        x[1] = bad
        assert model(x).isfinite().all(1).tolist() == [True, False]


def test_a_fused_layer_computes_as_peft_in_every_other_state() -> None:
    plain, x = adapted(), torch.randn(5, 12)
    made = fused(plain)

    def same_output() -> bool:
        return torch.equal(made(x), plain(x))

    with plain.disable_adapter(), made.disable_adapter():
        assert same_output()
    for model in (plain, made):
        model.add_adapter("two", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
        model.base_model.set_adapter([SLOT, "two"])
    for one, other in zip(plain.parameters(), made.parameters(), strict=True):
        other.data.copy_(one.data)
    assert same_output()
    for model in (plain, made):
        model.base_model.set_adapter([SLOT])
        model.base_model.merge_adapter()
    assert same_output()
    for model in (plain, made):
        model.base_model.unmerge_adapter()
    for model in (plain, made):
        layer = model.get_base_model().first.base_layer
        layer.register_forward_hook(lambda _, args, out: out + args[0].sum(-1, keepdim=True))
    assert furthest(outcome(made, x), outcome(plain, x)) < 1e-6  # the gradient goes through the hook too
    for model in (plain, made):
        model.get_base_model().second.base_layer.register_forward_pre_hook(lambda _, args: (args[0] * 3.0,))
    assert furthest(outcome(made, x), outcome(plain, x)) < 1e-6


@pytest.mark.parametrize("fast", [False, True])
def test_a_model_may_write_to_what_a_layer_returns(fast: bool) -> None:
    """Some scale their queries in place, which torch refuses for a view that was made inside a node."""
    plain = adapted()
    if fast:
        linear_kernel.install_linear_kernel(plain)
    for model in (plain, fused(plain)):
        layer = model.get_base_model().second
        found = layer(torch.randn(2, 3, 20, requires_grad=True))
        found.mul_(2.0).sum().backward()
        assert layer.lora_B[SLOT].weight.grad is not None


def test_second_derivatives_of_a_fused_layer_are_refused_and_not_wrong() -> None:
    x = torch.randn(3, 12, requires_grad=True)
    (slope,) = torch.autograd.grad(fused(adapted())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable"):
        slope.sum().backward()


@pytest.mark.storms
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_every_family_are_those_of_peft(name: str, tmp_path: Path) -> None:
    labels = 2 if FAMILIES[name].kind in ("encoder", "encoder-decoder") else None
    found, plain = list[tuple[Tensor, ...]](), replace(PLAIN, together=1)
    folder = str(FAMILIES[name].save(tmp_path))
    for engine in (plain, replace(plain, kernel="fastest")):
        base = base_model.load_base(folder, labels, LoRA(target_modules="all-linear"), 4, 0, engine=engine)
        weights = peft_weights.slot_parameters(base.model, base.put(lively(initial_adapter(base, 4))))
        for weight in weights.values():
            weight.requires_grad_(True)
        base.model.eval()
        texts = trial_texts(base.model.get_base_model(), base.tokenizer, base.labels)
        losses = loss.example_losses(base, texts.batch(range(len(texts.ids)), base.device))
        found.append(torch.autograd.grad(losses.sum(), [*weights.values()], allow_unused=True, materialize_grads=True))
    least = max(float(slope.norm()) for slope in found[0]) / 1000
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= rounding(base) * (float(one.norm()) + least)
