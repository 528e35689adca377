"""PEFT folders: a LoRA adapter that somebody trained, read as an adapter of this project.

PEFT's own loader reads it, so that ranks and scalings (`rank_pattern`, `alpha_pattern`, rsLoRA) are those that PEFT computes with.
What changes the model in another way than by up @ down is refused: it would be another model without a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, TaskType, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.text import first_line, last_line, list_some
from fedloom.train import peft_weights
from fedloom.train.base_model import Base
from fedloom.train.library_messages import log_messages

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
PLAIN_FIELDS = frozenset(
    {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
    | {"r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"}
    | {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}
    | {"init_lora_weights", "eva_config", "runtime_config", "qalora_group_size", "megatron_core", "ensure_weight_tying"}
)
"""Fields of PEFT's LoRA configuration that only say how large an adapter is, where it is, and how it was trained."""
CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Initialisations of PEFT that change the frozen weights: the adapter belongs to these, not to the base model."""
SLOT, PREFIX = "stored", "base_model.model."
NAMED = 3
"""Layers that a message lists."""


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """Adapter of a PEFT folder.

    Fields:
        adapter: its layers, each at its own rank, and the dense tensors that it holds.
        base: name of the base model that the folder gives.
        missing: layers that the base model adapts and the folder does not.
    """

    adapter: Adapter
    base: str
    missing: tuple[str, ...]


def read_peft_folder(base: Base, folder: Path, field: str) -> StoredAdapter:
    """Read a LoRA folder as an adapter of `base`. Raises Refused with this field where it is none, or fits no such model."""
    config = _lora_config(folder, field)
    if base.labels is None and config.task_type == TaskType.SEQ_CLS:
        raise Refused(
            field, str(folder), "it is the adapter of a classifier, and here text is written; give one that writes"
        )
    before = peft_weights.read_adapter(base.model, next(iter(base.model.peft_config)))
    own = {PREFIX + name: tensor for name, tensor in before.dense.items()}
    weights = _read_weights(base, folder, field, own)
    # a head that is missing, or for another number of labels, is not the adapter's business: its layers are read all the same
    held = {key: tensor for key, tensor in weights.items() if key not in own or tensor.shape == own[key].shape}
    try:
        with log_messages():
            base.model.add_adapter(SLOT, config)
            result: Any = set_peft_model_state_dict(base.model, own | held, SLOT)
    except (ValueError, RuntimeError, KeyError) as error:
        remedy = f"it fits no {base.name}: {last_line(error)}; give an adapter of this model"
        raise Refused(field, str(folder), remedy) from error
    adapter = peft_weights.read_adapter(base.model, SLOT)
    missing_keys = [key for key in result.missing_keys if f".{SLOT}." in key]
    if broken := [*missing_keys, *result.unexpected_keys]:
        remedy = f"its weights are not those of the layers of {base.name} that its configuration names ({list_some(broken, NAMED)})"
        raise Refused(field, str(folder), f"{remedy}; give an adapter of this model, or save it again with PEFT")
    if extra := sorted(adapter.factors.keys() - before.factors.keys()):
        leaves = sorted({name.rpartition(".")[2] for name in (*before.factors, *adapter.factors)})
        remedy = f"it adapts {len(extra)} layers that the run does not ({list_some(extra, NAMED)}): adapt them as well, with "
        raise Refused(field, str(folder), f"{remedy}lora.target_modules={leaves}")
    _check_whole_layers(sorted(adapter.dense.keys() - before.dense.keys()), folder, field)
    base.model.delete_adapter(SLOT)
    dense = {name: tensor for name, tensor in adapter.dense.items() if PREFIX + name in held}
    missing = tuple(name for name in before.factors if name not in adapter.factors)
    return StoredAdapter(Adapter(adapter.factors, dense), str(config.base_model_name_or_path or ""), missing)


def _read_weights(base: Base, folder: Path, field: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the weights of an adapter. Besides its layers and the run's dense tensors, `own`, PEFT may have saved embeddings with it.

    Raises Refused where the file is damaged, a weight is no finite number, or one of the base model's has changed.
    """
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors and torch each have their own
        raise Refused(field, str(folder), f"{WEIGHTS} is damaged ({first_line(error)}); get it again, whole") from error
    if broken := sorted(key for key, weight in weights.items() if not weight.isfinite().all()):
        remedy = (
            f"not all of its weights are finite numbers ({list_some(broken, NAMED)}); get it again, or train it again"
        )
        raise Refused(field, str(folder), remedy)
    frozen = base.model.get_base_model().state_dict()
    whole = {key: frozen.get(key.removeprefix(PREFIX)) for key in weights if ".lora_" not in key and key not in own}
    changed = [
        key for key, it in whole.items() if it is not None and not torch.equal(it.cpu().float(), weights[key].float())
    ]
    _check_whole_layers([key.removeprefix(PREFIX) for key in sorted(changed)], folder, field)
    return weights


def _check_whole_layers(names: Sequence[str], folder: Path, field: str) -> None:
    """Raise Refused if an adapter replaces these layers of its base model."""
    if names:
        remedy = (
            f"it replaces whole layers that the run does not train ({list_some(names, NAMED)}); merge it into the model"
        )
        raise Refused(field, str(folder), remedy)


def _lora_config(folder: Path, field: str) -> LoraConfig:
    """Return the folder's configuration. Raises Refused where it is none, or says more than a LoRA of this project can."""
    if not (folder / "adapter_config.json").is_file():
        remedy = "it holds no adapter_config.json; give a folder that a run or PEFT's save_pretrained has written"
        raise Refused(field, str(folder), remedy)
    if not (folder / WEIGHTS).is_file():
        pickled = f"{PICKLED} is a pickle, and loading one may run code: " if (folder / PICKLED).is_file() else ""
        remedy = f"{pickled}it holds no {WEIGHTS}; where you trust it, load it with PEFT and save_pretrained it again"
        raise Refused(field, str(folder), remedy)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # json, peft and dataclasses each have their own
        remedy = f"its adapter_config.json cannot be read ({first_line(error)}); save it again with PEFT"
        raise Refused(field, str(folder), remedy) from error
    if not isinstance(config, LoraConfig) or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise Refused(field, str(folder), f"it is an adapter of the kind {kind}; give a LoRA")
    if unlike := next(_unlike_lora(config), None):
        remedy = (
            f"{unlike} makes it more than up @ down, which a run trains; give a plain LoRA, or merge it into the model"
        )
        raise Refused(field, str(folder), remedy)
    return config


def _unlike_lora(config: LoraConfig) -> Iterator[str]:
    """Yield the settings with which a layer changes by another rule than scaling * up @ down."""
    plain, given = LoraConfig().to_dict(), config.to_dict()  # type: ignore[no-untyped-call]
    how = config.init_lora_weights
    if isinstance(how, str) and how.lower().startswith(CHANGE_BASE):
        yield f"init_lora_weights={how!r}"
    for name, value in given.items():
        if name not in PLAIN_FIELDS and value and value != plain.get(name):
            yield f"{name}={value!r}"
