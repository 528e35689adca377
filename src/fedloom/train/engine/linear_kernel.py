"""Frozen linear layers through oneDNN: the same float32 numbers to rounding, up to 1.7 times faster on some processors.

A frozen weight needs no gradient, so a layer is two products: y = x W^T + b and dx = dy W. Torch gives both to MKL, which does not
take its best path on every processor; oneDNN, which torch ships too, does. Its operator is private to torch: where it is missing,
where the weight is trained or the input is not float32 on the CPU, a layer computes as before.

An adapter on such a layer adds six thin products, y += s (x A^T) B^T and the slopes of x, A and B, which in PEFT are ten nodes of the
graph and may take as long as the frozen product. `FusedLora` makes one node of layer and adapter: sums are made in place, x A^T and
dy B go through oneDNN, and dB is computed as (u^T dy)^T, which reads dy in the order in which it lies. Layers of half precision, on
any device, are fused too: what an adapter adds is computed in their type, and its own numbers stay float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from fedloom.core.errors import Refused
from fedloom.train.engine.trial_texts import FAILURES

LEAST_GAIN = 1.15
"""Speed-up over torch's own kernel from which on one is chosen: far from what is measured both where it gains and where not."""


ROUNDING = 1e-4
"""Largest difference of two products, relative to the largest number, that is still rounding."""

NEED_ONEDNN = ("fused", "onednn")
"""Kernels that use oneDNN on a CPU."""
FUSED_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of inputs for which layer and adapter are one node."""


def onednn_available() -> bool:
    """Whether this build of torch has oneDNN's linear operator, and it computes."""
    try:
        one = torch.ones(1, 1)
        return bool(_product(one, one, None) == one)
    except (AttributeError, RuntimeError):  # a build without the operator, or without its kernel
        return False


def has_bfloat16(device: str) -> bool:
    """Whether this device is a CPU with instructions of its own for products in bfloat16 (AVX512-BF16, AMX)."""
    found: Any = torch.cpu
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.device(device).type == "cpu" and any(getattr(found, name, bool)() for name in names)


def fastest_kernel() -> str:
    """Measure which kernel is faster, "onednn" or "fused", in a few milliseconds (processor seconds, the best of seven).

    "torch" where oneDNN is missing: the thin products of a fused layer need it.
    """
    if not onednn_available():
        return "torch"
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(512, 384, generator=draw), torch.randn(384, 384, generator=draw)

    def seconds(product: Callable[[Tensor, Tensor, None], Tensor]) -> float:
        start = time.process_time()
        for _ in range(3):
            product(x, weight, None)
        return time.process_time() - start

    pairs = [(seconds(nn.functional.linear), seconds(_product)) for _ in range(8)][1:]
    plain, fast = (min(times) for times in zip(*pairs, strict=True))
    return "onednn" if plain > LEAST_GAIN * fast else "fused"


def install_linear_kernel(model: nn.Module, bfloat16: bool = False, spare: Collection[nn.Module] = ()) -> int:
    """Make every frozen linear layer of the model compute through oneDNN, or in bfloat16; return how many there are.

    A head that PEFT keeps beside its trained copies is left out: further copies are made of it. So is, in bfloat16, a layer that is
    also an embedding: its output would make the whole model compute in bfloat16. GPT-2's `Conv1D` has its weight the other way round:
    torch multiplies it, but it can be in bfloat16. `spare` are further layers to leave as they are: those whose weights are read by
    other layers, which expect float32 (Mamba). Raises Refused where bfloat16 would change nothing.
    """
    heads = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    spared = {id(inner) for head in heads for inner in head.modules()} | {id(module) for module in spare}
    if bfloat16:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        spared |= {id(m) for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in tables}
    kinds = HALVES if bfloat16 else {nn.Linear: FrozenLinear}
    linear: list[Any] = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in spared]
    linear = [m for m in linear if type(m) in kinds or (bfloat16 and _is_linear_in_fact(m))]
    frozen = [m for m in linear if not m.weight.requires_grad]
    if bfloat16 and not frozen:
        raise Refused("engine.bfloat16", True, "the model has no frozen linear layer that could be; leave it off")
    for layer in frozen:
        layer.__class__ = kinds.get(type(layer), HalfLinear)  # it stays the module that peft and state dicts know
        if bfloat16:
            layer.to(torch.bfloat16)
    return len(frozen)


@torch.no_grad()
def _is_linear_in_fact(layer: nn.Module) -> bool:
    """Whether a layer that is derived from `nn.Linear` computes x W^T + b, as Falcon's do, and routers of experts do not."""
    if not isinstance(layer, nn.Linear) or layer.weight.dtype != torch.float32:
        return False
    x = torch.linspace(-1.0, 1.0, layer.in_features, device=layer.weight.device)[None]
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    try:
        found = layer(x)
    except FAILURES:
        return False
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


class HalfLinear(nn.Linear):
    """A frozen `nn.Linear` in bfloat16; inputs and outputs keep their type."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, computed in bfloat16."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class HalfConv1D(Conv1D):
    """The same for GPT-2's linear layers."""

    def forward(self, x: Tensor) -> Tensor:
        """x W + b, computed in bfloat16."""
        found: Tensor = super().forward(x.to(self.weight.dtype))  # type: ignore[no-untyped-call]
        return found.to(x.dtype)


HALVES: Mapping[type[nn.Module], type[nn.Module]] = {nn.Linear: HalfLinear, Conv1D: HalfConv1D}
"""Kinds of linear layers, and what they become in bfloat16."""


class FrozenLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight, through oneDNN. The transposed weight is kept beside it and follows its changes."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b."""
        if self.weight.requires_grad or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            apply = cast(Callable[..., Tensor], _FrozenProduct.apply)
            found = apply(input.reshape(-1, self.in_features), self.weight, self._transposed(), self.bias)
            return found.view(
                *input.shape[:-1], self.out_features
            )  # outside of the node, so that a model may write to it
        return _product(input, self.weight, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the transposed weight out: another process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_of", "_weight_t")}

    def _transposed(self) -> Tensor:
        """Return W^T, contiguous; computed again when W was written to (a fold was added to the base)."""
        state = self.__dict__
        if state.get("_of") != (self.weight.data_ptr(), self.weight._version):
            state["_of"] = (self.weight.data_ptr(), self.weight._version)
            state["_weight_t"] = self.weight.detach().t().contiguous()
        return cast(Tensor, state["_weight_t"])


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.transposed = transposed
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        return _product(slopes[0].contiguous(), ctx.transposed, None), None, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in oneDNN."""
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


# A layer with its adapter --------------------------------------------------------------------------------------------------


def fuse_adapters(model: nn.Module) -> int:
    """Make each of PEFT's adapted linear layers one node of the graph; return how many there are."""
    kinds = (nn.Linear, FrozenLinear, HalfLinear)
    adapted = [m for m in model.modules() if type(m) is lora.Linear and type(m.base_layer) in kinds]
    for layer in adapted:
        layer.__class__ = FusedLora  # it stays the module that peft and state dicts know
    return len(adapted)


class FusedLora(lora.Linear):
    """PEFT's adapted linear layer with one active adapter, as one node of the graph; in every other state it computes as PEFT's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x W^T + b + scaling * dropout(x) A^T B^T, thin products in the type of x."""
        slot = self._fusable_slot()
        if slot is None or args or kwargs or x.ndim < 2 or x.dtype not in FUSED_TYPES:
            return super().forward(x, *args, **kwargs)
        dropped = self.lora_dropout[slot](x)
        apply = cast(Callable[..., Tensor], _AdaptedProduct.apply)
        down, up = self.lora_A[slot].weight, self.lora_B[slot].weight
        read = None if dropped is x else dropped.flatten(0, -2)
        found = apply(x.flatten(0, -2), read, down, up, self.scaling[slot], self.base_layer)
        return found.view(*x.shape[:-1], found.shape[1])  # outside of the node, so that a model may write to it

    def _fusable_slot(self) -> str | None:
        """Return the active adapter; None where there are several or none, it is more than two matrices, or the layer has hooks."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.lora_A:
            return None
        more = active[0] in self.lora_variant or self.lora_B[active[0]].bias is not None
        hooked = self.base_layer._forward_hooks or self.base_layer._forward_pre_hooks
        return None if more or hooked else active[0]


class _AdaptedProduct(torch.autograd.Function):
    """With u = x A^T: y = x W^T + b + s u B^T; and with v = s dy B: dx = dy W + v A, dA = v^T x, dB = s (u^T dy)^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, down: Tensor, up: Tensor, scaling: float, layer: nn.Module
    ) -> Tensor:
        read = x if dropped is None else dropped
        down, up = down.to(x.dtype), up.to(x.dtype)  # an optimiser keeps them in float32
        inner, found = _thin_product(read, down), layer(x)
        found.addmm_(inner, up.t(), alpha=scaling)
        ctx.save_for_backward(read, inner, down, up)
        ctx.scaling, ctx.layer, ctx.apart = scaling, layer, dropped is not None
        return cast(Tensor, found)

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        read, inner, down, up = ctx.saved_tensors
        slope = slopes[0].contiguous()
        of_x, of_dropped, of_down, of_up = ctx.needs_input_grad[:4]
        thin = _thin_product(slope, (up.t() * ctx.scaling).contiguous())
        whole = _input_slope(ctx.layer, slope) if of_x else None
        if whole is not None and not ctx.apart:
            whole.addmm_(thin, down)
        return (
            whole,
            thin @ down if of_dropped else None,
            thin.t() @ read if of_down else None,
            (inner.t() @ slope).mul_(ctx.scaling).t() if of_up else None,
            None,
            None,
        )


def _thin_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T for a `weight` (rank, d) of few rows."""
    return _product(x, weight, None) if x.dtype == torch.float32 and x.device.type == "cpu" else x @ weight.t()


def _input_slope(layer: nn.Module, slope: Tensor) -> Tensor:
    """Return dy W, a new tensor (rows, d_in)."""
    if isinstance(layer, FrozenLinear) and slope.device.type == "cpu" and slope.dtype == torch.float32:
        return _product(slope, layer._transposed(), None)
    weight = cast(Tensor, layer.weight)
    return (slope.to(weight.dtype) @ weight).to(slope.dtype)
