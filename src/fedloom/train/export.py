"""Export: adapters as standard PEFT folders, at any rank, or merged into the base model; and reading a run's adapter back.

What is written is for use without fedloom, on this machine and elsewhere: see docs/export.md.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from huggingface_hub import ModelCardData
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from fedloom.core.errors import Refused
from fedloom.core.files import read_json
from fedloom.core.lora import Adapter, pad, truncate
from fedloom.train import peft_weights
from fedloom.train.base_model import Base, load_base
from fedloom.train.chat_template import DATE, writes_date
from fedloom.train.library_messages import log_messages
from fedloom.train.peft_folder import read_peft_folder
from fedloom.train.settings import LoRA

BASE = "base"
WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")
"""Files of a checkpoint that transformers loads, the preferred kind first."""
INSIDE = re.compile(r"\.(?:base_layer|lora_\w+|modules_to_save|original_module)\b")
"""What PEFT puts behind the name of a layer that it wraps."""

CARD = """\
---
{metadata}
---

# LoRA adapter, fine-tuned federatedly with fedloom

The base model is {base}. Where Python runs beside this folder, {folder}:

```python
from peft import {auto}
from transformers import AutoTokenizer

model = {auto}.from_pretrained({folder!r}{more})
tokenizer = AutoTokenizer.from_pretrained({folder!r})
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

DATED = """

The chat template writes the date: in training it was given {}, whatever the day."""

CHOOSES = """\
Labels in order: {labels}

Where the base model lies elsewhere, name it:
`PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(BASE{more}), {folder!r})`."""


def save_adapter(base: Base, adapter: Adapter, names: Sequence[str], folder: Path, date: str | None = None) -> Path:
    """Write `adapter` as a PEFT folder that peft and transformers load by its path alone, whatever the number of labels.

    Beside the adapter there are the base model's tokenizer and a model card. PEFT's configuration of a classifier of a local folder
    names the folder `base` in it, which has the labels and the weights of the base model; that of one of the hub names the hub,
    and the labels stand beside the adapter. The weights are links, not copies. `date` is that of the run, for the card.
    """
    slot = base.put(adapter)
    folder.mkdir(parents=True, exist_ok=True)
    # "auto" would ask the hub whether the vocabulary has grown
    weights = get_peft_model_state_dict(base.model, adapter_name=slot, save_embedding_layers=False)
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    safetensors.torch.save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config, local = _portable_config(base.model, slot), Path(base.name).is_dir()
    config.base_model_name_or_path = str(Path(base.name).resolve()) if local else base.name
    with log_messages():
        if base.labels is not None:
            place = folder.resolve() / BASE if local else folder
            _save_classifier(base, names, place)
            if local:
                _link_into(folder, place)
            config.base_model_name_or_path = str(place) if local else base.name
        _own_tokenizer(base).save_pretrained(folder)
    config.save_pretrained(str(folder))
    (folder / "README.md").write_text(_card(base, names, folder.name, date), encoding="utf-8")
    return _share(folder)


def _portable_config(model: PeftModel, slot: str) -> LoraConfig:
    """Return PEFT's configuration of a slot. Targets are the last parts of names, sorted, wherever those choose the adapted layers.

    Servers of models want names; a regular expression or whole names stay where the last parts would choose other layers.
    """
    config = cast(LoraConfig, copy.deepcopy(model.peft_config[slot]))
    config.inference_mode = True
    before, adapted = config.target_modules, peft_weights.lora_layers(model).keys()
    config.target_modules = sorted({name.rpartition(".")[2] for name in adapted})
    names = {INSIDE.split(name)[0] for name, _ in model.get_base_model().named_modules()}
    if {name for name in names if check_target_module_exists(config, name)} != adapted:
        # PEFT's sets would be written in another order each time
        config.target_modules = before if isinstance(before, str) else sorted(before or ())
    return config


def _save_classifier(base: Base, names: Sequence[str], place: Path) -> None:
    """Write the base model as a classifier of these labels: its configuration, its tokenizer, and links to its weights.

    The weights are copied where the checkpoint has a head of another size, or cannot be linked to.
    """
    model = cast(PreTrainedModel, base.model.get_base_model())
    config = _with_labels(copy.deepcopy(model.config), names)
    config.architectures = [type(model).__name__]
    config.save_pretrained(place)
    _own_tokenizer(base).save_pretrained(place)
    files = _checkpoint_files(base.name)
    _remove_weights(place)
    try:
        fits = bool(files) and all(_fits(file, model) for file in files)
        for file in files if fits else ():
            (place / file.name).symlink_to(file.resolve())
    except (
        Exception
    ):  # no links on this system, or an older format: torch and safetensors each have errors of their own
        fits = False
    if not fits:
        _remove_weights(place)  # nothing may be written through a link
        plain = copy.deepcopy(base.model).unload()
        plain.save_pretrained(place)
        config.save_pretrained(place)


def _link_into(folder: Path, place: Path) -> None:
    """Put the configuration in `place`, inside `folder`, and links to its weights into `folder`: these can be moved together."""
    shutil.copy(place / "config.json", folder)
    for pattern in WEIGHTS:
        for file in place.glob(pattern):
            with suppress(OSError):  # a system without links
                (folder / file.name).unlink(missing_ok=True)
                (folder / file.name).symlink_to(file.relative_to(folder.resolve()))


def _checkpoint_files(name: str) -> list[Path]:
    """Return the files with the weights of a model, in its folder or in the cache of the hub."""
    try:
        place = Path(cached_file(name, "config.json", local_files_only=True) or name).parent
    except OSError:  # a cache that was moved since the model was loaded
        return []
    return sorted(next((files for pattern in WEIGHTS if (files := [*place.glob(pattern)])), []))


def _remove_weights(place: Path) -> None:
    """Remove what stands for the base model's weights in a folder, links or copies."""
    for file in [file for pattern in WEIGHTS for file in place.glob(pattern)]:
        file.unlink()


def _fits(file: Path, model: PreTrainedModel) -> bool:
    """Whether the weights in a file of a checkpoint have the sizes of the model's parameters of these names."""
    if file.suffix == ".json":
        return True
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, "pt") as opened:
            sizes = {name: (*opened.get_slice(name).get_shape(),) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    else:
        sizes = {name: weight.shape for name, weight in torch.load(file, mmap=True, weights_only=True).items()}
    plain = ((re.sub(r"\.(base_layer|original_module)\b", "", name), one) for name, one in model.named_parameters())
    return all(sizes.get(name, weight.shape) == weight.shape for name, weight in plain)


def _own_tokenizer(base: Base) -> PreTrainedTokenizerBase:
    """Return the base model's tokenizer as it came, but that of a classifier pads as in training."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base.name)
    if base.labels is not None:
        tokenizer.pad_token, tokenizer.padding_side = base.tokenizer.pad_token, base.tokenizer.padding_side
    return tokenizer


def _with_labels(config: PreTrainedConfig, names: Sequence[str]) -> PreTrainedConfig:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    return config


def _share(folder: Path) -> Path:
    """Make the folder readable for everybody who can reach it: libraries write files for their owner alone."""
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():  # what links lead to is not ours
            path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def _card(base: Base, names: Sequence[str], folder: str, date: str | None) -> str:
    """Return the model card: metadata as the hub reads them, and code that loads the adapter. It names no folder of this machine."""
    name = _hub_name(base.name)
    if base.labels is None:
        seq2seq = cast(PreTrainedModel, base.model.get_base_model()).config.is_encoder_decoder
        task, auto = ("text2text-generation", "Seq2SeqLM") if seq2seq else ("text-generation", "CausalLM")
        more, use = "", WRITES + (DATED.format(date or DATE) if writes_date(base.tokenizer) else "")
    else:
        task, auto = "text-classification", "SequenceClassification"
        given = f", num_labels={len(names)}, pad_token_id={base.tokenizer.pad_token_id}"
        more = "" if Path(base.name).is_dir() else f"{given}, id2label={dict(enumerate(names))}"
        use = CHOOSES.format(labels=", ".join(names), more=given, folder=folder)
    tags = ["federated-learning", "fedloom", "lora"]
    data = ModelCardData(base_model=name, library_name="peft", pipeline_tag=task, tags=tags)
    words = {"base": name, "folder": folder, "auto": f"AutoPeftModelFor{auto}", "more": more, "use": use}
    return CARD.format(metadata=data.to_yaml(), **words)


def _hub_name(name: str) -> str:
    """Return what the hub calls a model: of a folder in its cache by the name there, of another folder the last part of its name."""
    if not Path(name).is_dir():
        return name
    place = Path(name).resolve()
    cached = re.search(r"/models--(.+)--(.+)/snapshots/", place.as_posix())
    return "/".join(cached.groups()) if cached else place.name


def save_merged(base: Base, adapter: Adapter, names: Sequence[str], folder: Path) -> Path:
    """Write the base model with the adapter merged in, and its tokenizer: a plain transformers folder, with weights in float32.

    A layer that shares its weight with another one, as a head does that is tied to the embedding, gets a weight of its own.

    Raises:
        Refused: transformers does not load this architecture with that weight apart.
    """
    base.put(adapter)
    head = base.head
    with log_messages():
        merged: PreTrainedModel = (
            copy.deepcopy(base.model).float().merge_and_unload()
        )  # half would round the adapter away
        if base.labels is not None:
            _with_labels(merged.config, names)
        merged.save_pretrained(folder)
        _own_tokenizer(base).save_pretrained(folder)
        # as it is loaded, a head may be tied to the embedding again
        if isinstance(head, LoraLayer) and not _loads_again(merged, folder):
            shutil.rmtree(folder)
            remedy = "transformers ties it to the embedding whatever a folder says; use the adapter itself"
            raise Refused("--merged", f"the head of {type(merged).__name__}", remedy)
    return _share(folder)


@torch.no_grad()
def _loads_again(model: PreTrainedModel, folder: Path) -> bool:
    """Whether transformers loads from this folder a model that computes the same, to rounding."""
    loaded = type(model).from_pretrained(folder, dtype=torch.float32).to(model.device)  # type: ignore[arg-type]
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    wanted, given = (one.eval()(**inputs).logits for one in (model, loaded))
    return torch.allclose(given, wanted, rtol=0.0, atol=1e-5 * float(wanted.abs().max()))


def truncate_adapter(adapter: Adapter, rank: int) -> Adapter:
    """Return the best approximation of each layer at `rank`.

    With product-space methods that is what a client of this rank receives; with FedIT it is at least as close to the whole.
    """
    factors = {name: pad(truncate(factor, rank), rank) for name, factor in adapter.factors.items()}
    return Adapter(factors, adapter.dense)


def _base_model(name: str, adapter: Path, written: str) -> str:
    """Return where the base model of a run lies: by its name or, seen from another directory, by what is in its adapter's folder.

    `written` is what PEFT's configuration says.
    """
    if Path(name).is_dir():
        return name
    linked = (file.resolve().parent for pattern in WEIGHTS for file in (adapter / BASE).glob(pattern))
    for place in (*linked, Path(written)):
        if (place / "config.json").is_file() and any(file.is_file() for one in WEIGHTS for file in place.glob(one)):
            return str(place)
    return name


def open_run(run: Path, device: str = "cpu") -> tuple[Base, Adapter, tuple[str, ...]]:
    """Load the base model on a device, the final adapter and the label names of a run folder. Raises Refused if it has no adapter."""
    if not (run / "adapter" / "adapter_model.safetensors").is_file():
        raise Refused("run folder", str(run), "it holds no adapter: the run made no version, or this is no run folder")
    try:
        about = read_json(run / "manifest.json")
        name, seed, names = about["model"]["name"], about["seed"], tuple(about["partition"]["label_names"])
        config = LoraConfig.from_pretrained(str(run / "adapter"))
        targets = config.target_modules  # a regular expression, or names
        modules = tuple(sorted(targets)) if targets and not isinstance(targets, str) else targets
        lora = LoRA(modules, config.lora_alpha / config.r, config.lora_dropout)
        labels = about["model"].get("labels", len(names))  # null: it writes text
        name = _base_model(name, run / "adapter", str(config.base_model_name_or_path))
        base = load_base(
            name, labels, lora, 1, seed, device, label_names=names
        )  # the stored adapter brings its own rank
        engine, weights = about.get("run", {}).get("engine") or {}, about.get("base_weights")
        if weights and not engine.get("bfloat16") and weights != base.fingerprint():
            remedy = f"{name} has other weights than when the run was made; bring them back, or carry out the run again"
            raise Refused("run folder", str(run), remedy)
        return base, read_peft_folder(base, run / "adapter", "run folder").adapter, names
    except Refused as refused:
        if refused.field != "model":
            raise
        remedy = f"its base model cannot be loaded: {refused.value!r}: {refused.remedy}. It belongs where it was, or a link to it"
        raise Refused("run folder", str(run), remedy) from refused
    except Exception as error:  # json, peft, safetensors and torch each have their own
        remedy = f"its manifest or adapter cannot be read ({type(error).__name__}: {error}); carry out the run again"
        raise Refused("run folder", str(run), remedy.replace("\n", " ")) from error


def load_model(run: Path) -> PeftModel:
    """Load the base model of a run folder with its final adapter, the only one that it has, and with the names of its labels.

    Raises Refused as `open_run` does.
    """
    base, adapter, names = open_run(run)
    slot = base.put(adapter)
    for other in [name for name in base.model.peft_config if name != slot]:
        base.model.delete_adapter(other)
    if base.labels is not None:
        _with_labels(cast(PreTrainedModel, base.model.get_base_model()).config, names)
    return base.model
