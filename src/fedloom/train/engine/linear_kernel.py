"""Frozen linear layers through oneDNN: the same float32 numbers to rounding, up to 1.7 times faster on some processors.

A frozen weight needs no gradient, so a layer is two products: y = x W^T + b and dx = dy W. Torch gives both to MKL, which does not
take its best path on every processor; oneDNN, which torch ships too, does. Its operator is private to torch: where it is missing,
where the weight is trained or the input is not float32 on the CPU, a layer computes as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

LEAST_GAIN = 1.15
"""Speed-up over torch's own kernel from which on one is chosen: far from what is measured both where it gains and where not."""


def onednn_available() -> bool:
    """Whether this build of torch has oneDNN's linear operator, and it computes."""
    try:
        one = torch.ones(1, 1)
        return bool(_product(one, one, None) == one)
    except (AttributeError, RuntimeError):  # a build without the operator, or without its kernel
        return False


def fastest_kernel() -> str:
    """Measure which kernel is faster, "onednn" or "torch", in a few milliseconds (processor seconds, the best of seven)."""
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
    return "onednn" if plain > LEAST_GAIN * fast else "torch"


def install_linear_kernel(model: nn.Module, bfloat16: bool = False) -> int:
    """Make every frozen `nn.Linear` of the model compute through oneDNN, or in bfloat16; return how many there are.

    A head that PEFT keeps beside its trained copies is left out: further copies are made of it. So is, in bfloat16, a layer that is
    also an embedding: its output would make the whole model compute in bfloat16.
    """
    heads = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    spared = {id(inner) for head in heads for inner in head.modules()}
    if bfloat16:
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        spared |= {id(m) for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in tables}
    linear = [m for m in model.modules() if type(m) is nn.Linear and id(m) not in spared]
    frozen = [m for m in linear if not m.weight.requires_grad]
    for layer in frozen:
        layer.__class__ = HalfLinear if bfloat16 else FrozenLinear  # it stays the module that peft and state dicts know
        if bfloat16:
            layer.to(torch.bfloat16)
    return len(frozen)


class HalfLinear(nn.Linear):
    """A frozen `nn.Linear` in bfloat16; inputs and outputs keep their type."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b, computed in bfloat16."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class FrozenLinear(nn.Linear):
    """An `nn.Linear` with a frozen weight, through oneDNN. The transposed weight is kept beside it and follows its changes."""

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + b."""
        if self.weight.requires_grad or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        if torch.is_grad_enabled() and input.requires_grad:
            apply = cast(Callable[..., Tensor], _FrozenProduct.apply)
            return apply(input, self.weight, self._transposed(), self.bias)
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
