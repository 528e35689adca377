"""Export: adapters as standard PEFT folders, at any rank, or merged into the base model; and reading a run's adapter back."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from peft import LoraConfig, get_peft_model_state_dict

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, pad, truncate
from fedloom.train import peft_weights
from fedloom.train.base_model import Base, load_base
from fedloom.train.pretrained import silence_libraries
from fedloom.train.settings import LoRA

CARD = """# LoRA adapter, fine-tuned federatedly with fedloom

```python
from peft import PeftModel
from transformers import {kind}, AutoTokenizer

base = {kind}.from_pretrained({name!r}{more})
model = PeftModel.from_pretrained(base, {folder!r})
tokenizer = AutoTokenizer.from_pretrained({name!r}{token})
```

{use}
"""

WRITES = """\
A request is written as in training (the model's chat template, where it has one) and answered by

```python
inputs = tokenizer(request, return_tensors="pt", add_special_tokens=False)
written = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

Several requests at once are padded on the left: `AutoTokenizer.from_pretrained(..., padding_side="left")`."""


def save_adapter(base: Base, adapter: Adapter, names: Sequence[str], folder: Path) -> Path:
    """Write `adapter` as a PEFT folder that `PeftModel.from_pretrained` loads."""
    slot = base.put(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would ask the hub whether the vocabulary has grown
    weights = get_peft_model_state_dict(base.model, adapter_name=slot, save_embedding_layers=False)
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = copy.deepcopy(base.model.peft_config[slot])
    config.base_model_name_or_path, config.inference_mode = base.name, True
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, set):  # would be written in another order each time
        setattr(config, "target_modules", sorted(targets))  # noqa: B010  # mypy does not see the field
    config.save_pretrained(str(folder))
    (folder / "README.md").write_text(_card(base, names, folder.name), encoding="utf-8")
    return folder


def _card(base: Base, names: Sequence[str], folder: str) -> str:
    token = f", pad_token={base.tokenizer.pad_token!r}"  # a decoder's own has none
    if base.labels is None:
        words = {"kind": "AutoModelForCausalLM", "more": "", "use": WRITES}
    else:
        more = f", num_labels={len(names)}, pad_token_id={base.tokenizer.pad_token_id}"
        use = f"Labels in order: {', '.join(names)}"
        words = {"kind": "AutoModelForSequenceClassification", "more": more, "use": use}
    return CARD.format(name=base.name, folder=folder, token=token, **words)


def save_merged(base: Base, adapter: Adapter, names: Sequence[str], folder: Path) -> Path:
    """Write the base model with the adapter merged in, and its tokenizer: a plain transformers folder."""
    base.put(adapter)
    with silence_libraries():
        model = copy.deepcopy(base.model).merge_and_unload()
        if base.labels is not None:
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: index for index, name in enumerate(names)}
        model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
    return folder


def truncate_adapter(adapter: Adapter, rank: int) -> Adapter:
    """Return the best approximation of each layer at `rank`.

    With product-space methods that is what a client of this rank receives; with FedIT it is at least as close to the whole.
    """
    factors = {name: pad(truncate(factor, rank), rank) for name, factor in adapter.factors.items()}
    return Adapter(factors, adapter.dense)


def open_run(run: Path) -> tuple[Base, Adapter, tuple[str, ...]]:
    """Load the base model, the final adapter and the label names of a run folder. Raises Refused if it holds no adapter."""
    if not (run / "adapter" / "adapter_model.safetensors").is_file():
        raise Refused("run folder", str(run), "it holds no adapter: the run made no version, or this is no run folder")
    try:
        about = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        name, seed, names = about["model"]["name"], about["seed"], tuple(about["partition"]["label_names"])
        config = LoraConfig.from_pretrained(str(run / "adapter"))
        targets = None if config.target_modules is None else tuple(sorted(config.target_modules))
        lora = LoRA(targets, config.lora_alpha / config.r, config.lora_dropout)
        labels = about["model"].get("labels", len(names))  # null: it writes text
        base = load_base(name, labels, lora, 1, seed)  # the stored adapter brings its own rank
        return base, _load_adapter(base, run / "adapter"), names
    except Refused:
        raise
    except Exception as error:  # json, peft, safetensors and torch each have their own
        remedy = f"its manifest or adapter cannot be read ({type(error).__name__}: {error}); carry out the run again"
        raise Refused("run folder", str(run), remedy.replace("\n", " ")) from error


def _load_adapter(base: Base, folder: Path) -> Adapter:
    with silence_libraries():
        base.model.load_adapter(str(folder), "stored")
    stored = peft_weights.read_adapter(base.model, "stored")
    base.model.delete_adapter("stored")
    return stored
