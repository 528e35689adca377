"""PEFT's adapter weights <-> our `Adapter`.

PEFT keeps delta_W = scaling * B A with scaling = lora_alpha / r; we keep up = scaling * B and down = A. With a scaling that is
a power of two, the default, the conversion is exact to the bit; otherwise it rounds once, 6e-8 relative.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedloom.lora import Adapter, Factor


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers under the names that the base model gives them, in the model's order (input to output)."""
    base = model.get_base_model()
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def dense_parameters(model: PeftModel, slot: str) -> dict[str, nn.Parameter]:
    """Parameters that are trained and sent whole: those of PEFT's `modules_to_save` copies of this slot."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for inner, parameter in module.modules_to_save[slot].named_parameters():
                found[f"{name}.{inner}"] = parameter
    return found


def parameters(model: PeftModel, slot: str) -> dict[str, nn.Parameter]:
    """Everything that training changes in this slot, by a name that does not depend on the slot."""
    found = {}
    for name, layer in lora_layers(model).items():
        found[f"{name}.down"] = layer.lora_A[slot].weight
        found[f"{name}.up"] = layer.lora_B[slot].weight
    return found | dense_parameters(model, slot)


def read(model: PeftModel, slot: str) -> Adapter:
    """The slot's weights as an adapter of its own memory, float32 on the CPU."""
    factors = {}
    for name, layer in lora_layers(model).items():
        up = layer.lora_B[slot].weight.detach() * layer.scaling[slot]
        factors[name] = Factor(_copied(layer.lora_A[slot].weight), _copied(up))
    return Adapter(factors, {name: _copied(value) for name, value in dense_parameters(model, slot).items()})


@torch.no_grad()
def write(model: PeftModel, slot: str, adapter: Adapter, scaling: float) -> None:
    """Put an adapter of the slot's rank into the model, parametrised with `scaling`."""
    for name, layer in lora_layers(model).items():
        layer.scaling[slot] = scaling
        layer.lora_A[slot].weight.copy_(adapter.factors[name].down)
        layer.lora_B[slot].weight.copy_(adapter.factors[name].up / scaling)
    for name, value in dense_parameters(model, slot).items():
        value.copy_(adapter.dense[name])


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
