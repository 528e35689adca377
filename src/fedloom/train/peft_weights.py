"""Conversion between PEFT's adapter weights and our `Adapter`, and the layers of a PEFT model.

PEFT stores delta_W = scaling * B A with scaling = lora_alpha / r; we store up = scaling * B and down = A. With a scaling that is
a power of two, the default, the conversion is exact to the bit; otherwise it rounds once, 6e-8 relative.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial, wraps
from math import prod
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from fedloom.core.flat_buffer import FlatTensors
from fedloom.core.lora import Adapter, Factor, compact, lay_flat, map_tensors, named_tensors, view_as_adapter

F = TypeVar("F")


def _once(find: Callable[[PeftModel], F]) -> Callable[[PeftModel], F]:
    """Make a function of a model's modules look for them once for each set of adapters: a walk through hundreds of modules takes
    milliseconds. A further adapter may wrap further layers, so that the walk is made again when one is added or deleted.
    """
    found: WeakKeyDictionary[PeftModel, tuple[tuple[str, ...], F]] = WeakKeyDictionary()

    @wraps(find)
    def remembered(model: PeftModel) -> F:
        slots = tuple(model.peft_config)
        if model not in found or found[model][0] != slots:
            found[model] = slots, find(model)
        return found[model][1]

    return remembered


@_once
def lora_layers(model: PeftModel) -> Mapping[str, LoraLayer]:
    """Return the adapted layers by their names in the base model, in the model's order (input to output)."""
    base = model.get_base_model()
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@_once
def transformer_blocks(model: PeftModel) -> tuple[str, nn.ModuleList] | None:
    """Find the list of transformer blocks with adapted layers, and its path in the base model.

    Of several it is the list next to the output: a decoder's, or the language model's of a model that also sees images. None if
    there is no list of blocks that are passed once each (ALBERT passes one many times, XLM has a list for each half of its blocks).
    """
    base, adapted = model.get_base_model(), [*lora_layers(model)]
    lists = [
        (path, module)
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and any(name.startswith(f"{path}.") for name in adapted)
    ]
    counts, language = _block_counts(base.config), f"{_language_path(base)}."
    fitting = [
        (path, module)
        for path, module in lists
        if len(module) in counts and not any(path.startswith(f"{outer}.") for outer, _ in lists)  # a block's experts
    ]
    inside = [found for found in fitting if found[0].startswith(language)] or fitting
    return inside[0] if len(inside) == 1 else None


@_once
def layer_depths(model: PeftModel) -> Mapping[str, int]:
    """Return the depth from which on each adapted layer is trained: 1 in the top block, 0 above the blocks, blocks + 1 below them.

    Empty where the model has no list of blocks. Below is also what stands beside the text's own part of a model: an encoder.
    """
    found, base = transformer_blocks(model), model.get_base_model()
    if found is None:
        return {}
    path, count, language = found[0], len(found[1]), _language_path(base)
    order = {name: place for place, (name, _) in enumerate(base.named_modules())}
    around = language.rpartition(".")[0]

    def depth(name: str) -> int:
        if name.startswith(f"{path}."):
            return count - int(name.removeprefix(f"{path}.").split(".")[0])
        beside = around and name.startswith(f"{around}.") and not name.startswith(f"{language}.")
        return count + 1 if beside or order[name] < order[path] else 0

    return {name: depth(name) for name in lora_layers(model)}


def _language_path(base: Any) -> str:
    """Path of the part of a model that computes the output from text: all of it, a decoder, or a language model beside a tower."""
    part = base.get_decoder()
    return next((path for path, module in base.named_modules() if module is part), "")


def _block_counts(config: Any) -> set[int]:
    """Return the numbers of blocks that text passes: in a decoder beside an encoder there may be another number of them."""
    names = ("num_hidden_layers", "num_decoder_layers", "decoder_layers")
    return {n for part in (config, config.get_text_config()) for name in names if (n := getattr(part, name, None))}


def layer_size(layer: LoraLayer) -> tuple[int, int]:
    """Return (d_out, d_in) of an adapted layer."""
    out, inner = layer.out_features, layer.in_features
    if not isinstance(out, int) or not isinstance(inner, int):
        raise TypeError(f"{type(layer).__name__} has no two sizes")
    return out, inner


def is_quantised(parameter: Tensor) -> bool:
    """Whether a parameter is in 4 bits, several numbers in one entry."""
    return getattr(parameter, "quant_state", None) is not None


def count_numbers(parameter: Tensor) -> int:
    """Return how many numbers a parameter holds."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else prod(state.shape)


def dense_parameters(model: PeftModel, slot: str) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained and sent whole: PEFT's `modules_to_save` copies of this slot."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, ModulesToSaveWrapper) and slot in module.modules_to_save:
            for inner, parameter in module.modules_to_save[slot].named_parameters():
                found[f"{name}.{inner}"] = parameter
    return found


def slot_parameters(model: PeftModel, slot: str) -> dict[str, nn.Parameter]:
    """Return all parameters that training changes in this slot, by names that do not depend on the slot."""
    found: dict[str, nn.Parameter] = {}
    for name, (down, up) in _weights(model, slot).items():
        found |= {f"{name}.down": down, f"{name}.up": up}
    return found | dense_parameters(model, slot)


def read_adapter(model: PeftModel, slot: str, names: Collection[str] | None = None) -> Adapter:
    """Copy the slot's weights, of all layers or of `names`, into an adapter, float32 on the CPU; from a device in one go."""
    layers, factors = lora_layers(model), {}
    for name, (down, up) in _weights(model, slot).items():
        if names is not None and name not in names:
            continue
        factors[name] = Factor(_copied(down), _copied(up.detach() * layers[name].scaling[slot]))
    dense = {name: _copied(value) for name, value in dense_parameters(model, slot).items()}
    return copy_adapter(Adapter(factors, dense), torch.device("cpu"))


def copy_adapter(adapter: Adapter, device: torch.device) -> Adapter:
    """Return the adapter on this device; hundreds of small tensors go there as one buffer, since each copy waits for the device."""
    if all(tensor.device == device for tensor in named_tensors(adapter).values()):
        return adapter
    flat = lay_flat(adapter).flat
    if flat is None:
        return map_tensors(lambda tensor: tensor.to(device), adapter)
    return view_as_adapter(FlatTensors(flat.buffer.to(device), flat.layout))


@torch.no_grad()
def write_adapter(model: PeftModel, slot: str, adapter: Adapter, scaling: float) -> None:
    """Write an adapter of the slot's rank into the model, with `scaling`; a layer that the adapter lacks then adds nothing."""
    layers = lora_layers(model)
    adapter = copy_adapter(adapter, next(model.parameters()).device)
    for name, (down, up) in _weights(model, slot).items():
        layers[name].scaling[slot] = scaling
        if name not in adapter.factors:
            up.zero_()
            continue
        down.copy_(adapter.factors[name].down)
        up.copy_(adapter.factors[name].up / scaling)
    for name, value in dense_parameters(model, slot).items():
        value.copy_(adapter.dense[name])


def take_base_weights(model: PeftModel) -> dict[str, Tensor]:
    """Take the frozen float32 weights of the adapted layers out of the model, which continues with copies that may be written to.

    So weights that several processes share are never changed; a process that adds a fold pays for one copy of these layers.
    """
    taken = {}
    for name, layer in lora_layers(model).items():
        weight = base_weight(layer)
        if weight.dtype not in (torch.float32, torch.float64):
            continue
        taken[name] = weight.data
        weight.data = weight.data.clone()
    return taken


@torch.no_grad()
def set_fold(model: PeftModel, originals: Mapping[str, Tensor], fold: Adapter | None) -> None:
    """Set the frozen weights of the adapted layers to `originals` plus the fold's products.

    A layer that is none of `originals` adds the product to its output instead: in half precision a sum of weights would round most of
    a small change away, and 4 bits cannot be added to.
    """
    for name, layer in lora_layers(model).items():
        weight = base_weight(layer)
        factor = fold.factors.get(name) if fold is not None else None
        if name not in originals:
            _set_product_beside(layer.get_base_layer(), factor)
            continue
        if factor is None:
            weight.copy_(originals[name])
            continue
        product = factor.up.to(weight.device) @ factor.down.to(weight.device)
        turned = product.T if "Conv1D" in type(layer.get_base_layer()).__name__ else product  # it keeps (in, out)
        weight.copy_(originals[name] + turned)


def _set_product_beside(layer: nn.Module, factor: Factor | None) -> None:
    """Make a layer add this product to its output, instead of the one before."""
    before = layer.__dict__.pop("product_beside", None)
    if before is not None:
        before.remove()
    if factor is not None:
        small, device = compact(factor), next(layer.parameters()).device
        add = partial(_add_product, small.down.to(device), small.up.to(device))
        layer.__dict__["product_beside"] = layer.register_forward_hook(add)


def _add_product(down: Tensor, up: Tensor, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Add x D^T U^T, computed in the type of x, to the output of a layer."""
    x: Tensor = args[0]
    return output + (x @ down.to(x.dtype).T @ up.to(x.dtype).T).to(output.dtype)


def base_weight(layer: LoraLayer) -> Tensor:
    """Return the frozen weight below an adapter, (out, in), or (in, out) where the layer is a Conv1D."""
    return cast(Tensor, layer.get_base_layer().weight)


def _weights(model: PeftModel, slot: str) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """PEFT's A and B of each layer that this slot adapts."""
    return {
        name: (cast(nn.Parameter, layer.lora_A[slot].weight), cast(nn.Parameter, layer.lora_B[slot].weight))
        for name, layer in lora_layers(model).items()
        if slot in layer.lora_A
    }


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to(tensor.device, torch.float32, copy=True).contiguous()
