"""Which layers of a base model get an adapter, as PEFT takes them.

PEFT has a default for some architectures, finds names wherever they occur, and refuses some layers of some models. Here a default
is chosen for the others, and parts that read no text (vision and audio towers) are left out. What PEFT would do is asked of PEFT
itself, on a copy of the model that shares its weights. Notes say what was chosen, and what was left out and why.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.core.errors import Refused
from fedloom.core.text import first_line
from fedloom.train import peft_weights
from fedloom.train.settings import ALL_LINEAR

FIELD = "lora.target_modules"
"""The field that refusals and notes name."""

HEADS = ("classifier", "score")
"""Heads that PEFT trains and saves by itself where labels are predicted."""

NARROW = 16
"""How many times longer than the other a side of a layer may be for it to be adapted by default."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The layers to adapt.

    Fields:
        modules: PEFT's `target_modules` (None: its default for the architecture).
        notes: sentences on what was chosen, and on what was left out.
    """

    modules: list[str] | str | None
    notes: tuple[str, ...] = ()


def choose_targets(model: PreTrainedModel, asked: tuple[str, ...] | str | None, config: LoraConfig) -> Targets:
    """Choose the layers of a model that has no adapter yet; `config` is PEFT's, whose other fields are as they will be.

    Raises Refused for a name or regular expression that adapts nothing, and with PEFT's reason where PEFT refuses what was asked.
    """
    if isinstance(asked, tuple):
        return _named_targets(model, asked)
    if asked is not None and asked.lower() != ALL_LINEAR:
        return _matching_targets(model, asked, config)
    unfit = unfit_layers(model)
    linear = _linear_layers(model) - unfit.keys()
    try:
        found = _try_peft(model, asked, config)
    except ValueError:  # no default, or something that it does not adapt
        found = []
    if found and linear.issuperset(found):
        return Targets(asked, _other_weights_note(model) if asked else ())
    known = linear.intersection(found)
    wanted = linear if asked else known or _default_layers(model, linear)
    chosen, notes = _accepted_layers(model, asked, wanted, config)
    reasons = sorted({f"{_leaf(name)} ({reason})" for name, reason in unfit.items()})
    notes += tuple(f"{FIELD}: left out, since an adapter would not be computed: {line}" for line in reasons)
    if not asked and not known:
        what = f"PEFT gives no default for {type(model).__name__}; linear layers of its blocks are adapted"
        notes = (f"{FIELD}: {what}: {_leaves(chosen)}", *notes)
    return Targets(chosen, notes)


def check_adapted_layers(model: PeftModel) -> None:
    """Raise Refused if anything but a linear layer is adapted."""
    for name, layer in peft_weights.lora_layers(model).items():
        if not _is_linear(layer.get_base_layer()):
            raise Refused(FIELD, name, "only linear layers can be adapted")


def unfit_layers(model: PreTrainedModel) -> dict[str, str]:
    """Return linear layers to whose output no adapter would be added, and why. Tried on the model itself, with a few tokens.

    Mamba uses the weight of a layer without calling it: an adapter there would be trained and merged, but not computed.
    """
    layers = {name: module for name, module in model.named_modules() if _is_linear(module)}
    outputs, training = dict[str, object](), model.training
    hooks = [m.register_forward_hook(lambda _, __, out, n=name: outputs.update({n: out})) for name, m in layers.items()]  # type: ignore[misc]
    try:
        with torch.no_grad():
            model.eval()(**_few_tokens(model))  # type: ignore[no-untyped-call]
        unfit = {n: "it returns more than a product" for n, out in outputs.items() if not isinstance(out, Tensor)}
        weights = {name: cast(Tensor, layers[name].weight) for name in layers.keys() - outputs.keys()}
        weights = {name: weight for name, weight in sorted(weights.items()) if weight.requires_grad}
        if weights:
            total = model(**_few_tokens(model)).logits.float().square().sum()
            slopes = torch.autograd.grad(total, [*weights.values()], allow_unused=True)
            used = [name for name, slope in zip(weights, slopes, strict=True) if slope is not None]
            unfit |= dict.fromkeys(used, "the model uses its weight without calling it")
        return unfit
    except Exception:  # a model that cannot read these tokens is found out where texts of the run are tried
        return {}
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def target_remedy(model: nn.Module, reason: str | ValueError = "") -> str:
    """Return the sentence that names the linear layers of the model, after a reason or the first sentence of PEFT's error."""
    reason = reason if isinstance(reason, str) else _reason(reason)
    names = [
        n for n, m in model.named_modules() if _is_linear(m) and ".lora_" not in n and n.split(".")[0] not in HEADS
    ]
    leaves = _leaves(name.removesuffix(".base_layer") for name in names)
    return f"{reason and f'{reason}; '}name linear layers of {type(model).__name__}: {leaves}"


def _named_targets(model: PreTrainedModel, asked: tuple[str, ...]) -> Targets:
    """Layers by the ends of their names; PEFT itself is content if one of the names is found."""
    names, textless = [name for name, _ in model.named_modules()], _textless_parts(model)
    chosen, left_out = set[str](), set[str]()
    for target in asked or ("",):
        found = {name for name in names if f".{name}".endswith(f".{target}")} if target else set()
        inside = found - textless
        if not inside:
            there = "all layers of this name are in a part that reads no text" if found else "there is no such layer"
            weights = _other_weights(model)
            reason = f"{there}; {weights} are no linear layers, which alone can be adapted" if weights else there
            raise Refused(FIELD, target or asked, target_remedy(model, reason))
        _check_fit(model, target, inside)
        chosen |= inside
        left_out |= found & textless
    if not left_out:
        return Targets([*asked])
    return Targets(sorted(chosen), _textless_note(left_out))


def _matching_targets(model: PreTrainedModel, asked: str, config: LoraConfig) -> Targets:
    """Layers whose whole name matches a regular expression, which PEFT gets as it is unless it would adapt others."""
    try:
        matched = {name for name, _ in model.named_modules() if name and re.fullmatch(asked, name)}
    except re.error as error:
        raise Refused(FIELD, asked, f"not a regular expression ({error}); names of layers go into a list") from error
    for name in sorted(matched & _textless_parts(model)):
        remedy = f"it matches {name}, which reads no text; let it match layers of the language part alone"
        raise Refused(FIELD, asked, remedy)
    _check_fit(model, asked, matched)
    try:
        # PEFT takes but the last part of what matches where experts have other names than once
        as_it_is = matched.issuperset(_try_peft(model, asked, config))
    except ValueError as error:
        raise Refused(FIELD, asked, target_remedy(model, error)) from error
    return Targets(asked if as_it_is else sorted(matched))


def _accepted_layers(
    model: PreTrainedModel, asked: str | None, names: Collection[str], config: LoraConfig
) -> tuple[list[str], tuple[str, ...]]:
    """Return these layers without those that PEFT refuses, and notes on what is left out, and why."""
    chosen, refused = set(names), list[str]()
    if _refusal(model, names, config):
        for leaf in sorted({_leaf(name) for name in names}):
            own = {name for name in names if _leaf(name) == leaf}
            if reason := _refusal(model, own, config):
                refused.append(f"{leaf} ({reason})")
                chosen -= own
    if not chosen:
        reason = "; ".join(refused) or "its blocks have no linear layers, which alone can be adapted"
        raise Refused(FIELD, asked, target_remedy(model, reason))
    notes = [f"{FIELD}: left out, since PEFT refuses it: {line}" for line in refused]
    textless = [name for name in _textless_parts(model) if _is_linear(model.get_submodule(name))]
    return sorted(chosen), (*notes, *_textless_note(textless), *_other_weights_note(model))


def _refusal(model: PreTrainedModel, names: Collection[str], config: LoraConfig) -> str:
    """Return why PEFT does not adapt these layers and no others, "" where it does."""
    try:
        return "" if set(_try_peft(model, sorted(names), config)) == set(names) else "it would adapt other layers"
    except ValueError as error:
        return _reason(error)


def _try_peft(model: PreTrainedModel, modules: list[str] | str | None, config: LoraConfig) -> list[str]:
    """Return the names of the layers that PEFT adapts for this `target_modules`. Raises ValueError where it refuses."""
    tried = copy.deepcopy(config)
    tried.target_modules = modules
    tried.modules_to_save = [*(config.modules_to_save or ()), *HEADS]  # as PEFT does where labels are predicted
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    outline = copy.deepcopy(model, shared)  # modules without weights of their own
    try:
        inject_adapter_in_model(tried, outline, low_cpu_mem_usage=True)
    finally:
        for parameter, before in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
    return [name for name, module in outline.named_modules() if isinstance(module, LoraLayer)]


def _linear_layers(model: PreTrainedModel) -> set[str]:
    """Linear layers that read text, without heads, and without gates of a single output."""
    layers = {name for name, module in model.named_modules() if _is_linear(module) and not _is_head(model, name)}
    return {name for name in layers - _textless_parts(model) if min(_sides(model, name)) > 1}


def _default_layers(model: PreTrainedModel, linear: Collection[str]) -> set[str]:
    """Return the layers in the transformer blocks, without gates: layers so narrow that low ranks save nothing."""
    blocks = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    sides = {name: _sides(model, name) for name in linear if name.startswith(blocks)}
    return {name for name, (out, into) in sides.items() if max(out, into) <= NARROW * min(out, into)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _sides(model: nn.Module, name: str) -> tuple[int, int]:
    """Return (outputs, inputs) of a linear layer; a weight in 4 bits has another shape."""
    layer = model.get_submodule(name)
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (layer.nf, layer.nx)  # type: ignore[return-value]


def _is_head(model: PreTrainedModel, name: str) -> bool:
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return name.split(".")[0] in HEADS or (output is not None and model.get_submodule(name) is output)


def _textless_parts(model: PreTrainedModel) -> set[str]:
    """Names of the modules outside the language part, whose configuration is the text configuration, and outside the head."""
    text = model.config.get_text_config()
    parts = [n for n, m in model.named_modules() if isinstance(m, PreTrainedModel) and type(m.config) is type(text)]
    if text is model.config or not parts:
        return set()
    inside = tuple(f"{part}." for part in parts)
    around = {name for name, _ in model.named_modules() if any(f"{part}.".startswith(f"{name}.") for part in parts)}
    outside = {name for name, _ in model.named_modules() if name and not name.startswith(inside)} - around
    return {name for name in outside if not _is_head(model, name)}


def _few_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of one short text, with an end mark where the model has one: some classifiers read a text there."""
    size, end = model.config.get_text_config().vocab_size, getattr(model.config, "eos_token_id", None)
    ends = {end for end in (end if isinstance(end, list) else [end]) if end is not None and end < size}
    ids = torch.tensor([[*(k for k in range(6) if k < size and k not in ends), *sorted(ends)[:1]]], device=model.device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_fit(model: PreTrainedModel, target: str, names: Collection[str]) -> None:
    """Raise Refused where an adapter of one of these layers would not be computed."""
    for name, reason in sorted(unfit_layers(model).items()):
        if name in names:
            raise Refused(FIELD, target, target_remedy(model, f"an adapter of {name} would not be computed: {reason}"))


def _textless_note(names: Collection[str]) -> tuple[str, ...]:
    parts = sorted({".".join(name.split(".")[:2]) for name in names})
    return (f"{FIELD}: parts that read no text are left out: {', '.join(parts)}",) if names else ()


def _other_weights(model: PreTrainedModel) -> str:
    """Names of weights of more than two dimensions, such as those of experts, which are no linear layers."""
    textless, names = _textless_parts(model), set[str]()
    for name, module in model.named_modules():
        if name not in textless and not isinstance(module, nn.Conv1d | nn.Conv2d):
            own = [key for key, weight in module.named_parameters(recurse=False) if weight.ndim > 2]
            names |= {f"{_leaf(name)}.{key}" for key in own}
    return ", ".join(sorted(names))


def _other_weights_note(model: PreTrainedModel) -> tuple[str, ...]:
    names = _other_weights(model)
    return (f"{FIELD}: weights that are no linear layers get no adapter: {names}",) if names else ()


def _reason(error: ValueError) -> str:
    """The first sentence of PEFT's error; further ones print sets, in another order each time."""
    return first_line(error).split(". ")[0].rstrip(".")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaves(names: Iterable[str]) -> str:
    """Return the last parts of names, each once."""
    return ", ".join(sorted({_leaf(name) for name in names}))
