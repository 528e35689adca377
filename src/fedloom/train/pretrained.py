"""Pretrained models and tokenizers as transformers loads them; a model that cannot be loaded is Refused with the reason."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from fedloom.core.errors import Refused
from fedloom.core.text import first_line, list_some

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")
"""Files of a checkpoint that transformers loads."""
LFS_POINTER = b"version https://git-lfs"
WRAPPERS = ("module.", "_orig_mod.", "model.module.", "base_model.model.")
"""What names of weights begin with where a wrapper was saved with the model in it: DataParallel, torch.compile, PEFT."""
IN_BLOCK = re.compile(r"\.\d+\.")
"""What the names of the parameters of transformer blocks have in common."""


@dataclass(frozen=True, slots=True)
class WeightReport:
    """Fit of the weights of a checkpoint to the parameters of a model.

    Fields:
        new: parameters that the checkpoint lacks, or has in another size; they are drawn at random.
        resized: the sizes in the checkpoint of those that it has in another size.
        unused: weights of the checkpoint that are no parameter of the model.
    """

    new: frozenset[str]
    resized: Mapping[str, tuple[int, ...]]
    unused: frozenset[str]


def load_classifier(name: str, labels: int, **more: Any) -> tuple[PreTrainedModel, WeightReport]:
    """Load a classifier of `labels` classes; also return how the checkpoint's weights fit."""
    return _load(AutoModelForSequenceClassification, name, "classification", num_labels=labels, **more)


def load_decoder(name: str, **more: Any) -> tuple[PreTrainedModel, WeightReport]:
    """Load a model that writes text from left to right; also return how the checkpoint's weights fit.

    Raises Refused for one that sees later tokens, as an encoder does even where transformers puts a head for generation on it.
    """
    if getattr(_configuration(name), "is_encoder_decoder", False):
        remedy = "an encoder-decoder is trained to choose a label here, not to write; give a decoder such as Qwen/Qwen2.5-0.5B"
        raise Refused("model", name, remedy)
    model, report = _load(AutoModelForCausalLM, name, "generation", **more)
    try:
        ahead = reads_ahead(model)
    except Exception as error:  # whatever a model raises that was not put together as its configuration says
        remedy = f"it cannot read six tokens ({first_line(error)}); are config.json and weights of one model?"
        raise Refused("model", name, remedy) from error
    if ahead:
        remedy = "sees the words that it is to predict; give a decoder such as Qwen/Qwen2.5-0.5B"
        raise Refused("model", name, f"{type(model).__name__} {remedy}")
    return model, report


def load_masked_model(name: str, **more: Any) -> tuple[PreTrainedModel, WeightReport]:
    """Load a masked language model; also return how the checkpoint's weights fit."""
    return _load(AutoModelForMaskedLM, name, "filling in", **more)


def four_bit_arguments(device: torch.device) -> dict[str, Any]:
    """Arguments that load a model with its linear layers in 4 bits (QLoRA, arXiv 2305.14314: NF4, quantised twice).

    Raises Refused where this machine cannot do that.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise Refused("engine.four_bit", True, "it needs an NVIDIA GPU: set device='cuda', or leave it off")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Refused("engine.four_bit", True, "bitsandbytes is not installed: pip install 'fedloom[four-bit]'")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": device}}


@torch.no_grad()
def reads_ahead(model: Any) -> bool:
    """Whether a model's prediction depends on later tokens. Tried on the model itself, by changing the last of a few tokens."""
    words, training = model.config.get_text_config().vocab_size, model.training
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6]]) % words
    logits: Tensor = model.eval()(input_ids=ids.to(model.device)).logits.float()
    model.train(training)
    one, other = logits[:, :-1]
    return float((one - other).abs().max()) > 1e-3 * float(one.abs().max())


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer and see that it has a token to pad with."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub client each have their own
        remedy = f"its tokenizer cannot be loaded ({first_line(error)}); get its tokenizer files again"
        raise Refused("model", name, remedy) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there is none
        raise Refused("model", name, "it comes without a tokenizer; add tokenizer.json and tokenizer_config.json")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise Refused("model", name, "model_max_length in its tokenizer_config.json is no number; write one there")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _load(kind: Any, name: str, use: str, **more: Any) -> tuple[PreTrainedModel, WeightReport]:
    """Load a model of this kind. Raises Refused where that fails, or something of its body would be random."""
    _check_no_adapter(name)
    _check_folder(Path(name))
    _check_full_precision(name)
    more = {"output_loading_info": True, "dtype": torch.float32, "trust_remote_code": False, **more}
    try:
        model, info = kind.from_pretrained(name, ignore_mismatched_sizes=True, **more)
    except Exception as error:  # transformers, safetensors and the hub client each have their own
        raise Refused("model", name, _remedy(name, use, error)) from error
    text = model.config.get_text_config()
    if {*(getattr(text, "layer_types", None) or ())} == {"linear_attention"}:  # transformers' cache wants another layer
        text.use_cache = False
        if model.can_generate():
            model.generation_config.use_cache = False
    resized = {key: tuple(size) for key, size, _ in info["mismatched_keys"]}
    report = WeightReport(frozenset({*info["missing_keys"], *resized}), resized, frozenset(info["unexpected_keys"]))
    check_weights(model, report, name, resizable=use == "classification")
    model.config.return_dict = True  # some checkpoints ask for tuples
    return model, report


# Whether the checkpoint is one, and whole ---------------------------------------------------------------------------------


def check_weights(model: PreTrainedModel, report: WeightReport, name: str, resizable: bool) -> None:
    """Raise Refused where the checkpoint lacks a block or the embedding, or has a layer of another size.

    What else is new belongs to the head, such as a pooler; a `resizable` head may have another size.
    """
    body = body_parameters(model)
    table = next((key for key, weight in body.items() if weight is input_embedding(model)), None)
    for key, size in sorted(report.resized.items()):
        if key in body or not resizable:
            there, here = (" x ".join(map(str, one)) for one in (size, model.get_parameter(key).shape))
            remedy = f"its weights do not fit its config.json: {key} is {there}, by the configuration {here}"
            raise Refused("model", name, f"{remedy}; get both from one place")
    lost = sorted(key for key in report.new & body.keys() if key == table or IN_BLOCK.search(f".{key}"))
    if not lost:
        _check_used(model, report, name)
        return
    if sum(body[key].numel() for key in lost) * 2 > sum(weight.numel() for weight in body.values()):
        if wrapped := next((one for one in WRAPPERS if any(key.startswith(one) for key in report.unused)), None):
            remedy = (
                f"the names of its weights begin with {wrapped!r}, since a wrapper was saved and not the model in it"
            )
            raise Refused("model", name, f"{remedy}; save the inner model with save_pretrained")
        remedy = f"its weights are not of the architecture that config.json names: {type(model).__name__} finds few of its own"
        raise Refused("model", name, f"{remedy} ({lost[0]} is missing); get both from one place")
    raise Refused("model", name, f"the checkpoint is incomplete: {list_some(lost, 1)} missing; get it again, whole")


def _check_used(model: PreTrainedModel, report: WeightReport, name: str) -> None:
    """Raise Refused where the checkpoint has more weights for a layer of a block than the model: Qwen2's biases in a Llama."""
    layers, prefix = {key.rpartition(".")[0] for key in body_parameters(model)}, f"{model.base_model_prefix}."
    for key in sorted(report.unused):
        layer = key.rpartition(".")[0]
        if IN_BLOCK.search(f".{key}") and {layer, f"{prefix}{layer}", layer.removeprefix(prefix)} & layers:
            remedy = f"its weights are not of the architecture that config.json names: {type(model).__name__} has no"
            raise Refused("model", name, f"{remedy} {key}; get both from one place")


def body_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of a model without its head, by their names in the whole model."""
    inner = {id(parameter) for parameter in model.base_model.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in inner}


def input_embedding(model: PreTrainedModel) -> Tensor | None:
    """Return the weights of the token embedding (rows, size); None where the architecture does not name it."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (NotImplementedError, AttributeError):  # what transformers raises where it finds none
        return None
    return weight if isinstance(weight, Tensor) else None


def _check_folder(path: Path) -> None:
    """Raise Refused for a folder or file that holds something else than a checkpoint."""
    if path.suffix == ".gguf" or (path.is_dir() and not _any(path, *WEIGHT_FILES) and _any(path, "*.gguf")):
        remedy = (
            "GGUF weights are made for running a model, not for training it; give the checkpoint they were made from"
        )
        raise Refused("model", str(path), remedy)
    if path.is_file():
        raise Refused("model", str(path), f"it is a file; give the folder of the checkpoint: {path.parent}")
    if not path.is_dir() or (path / "config.json").is_file():
        if path.is_dir() and not _any(path, *WEIGHT_FILES):
            remedy = "the folder holds no model that transformers can load: config.json without model.safetensors"
            raise Refused("model", str(path), f"{remedy}; get the checkpoint again, whole")
        if pointers := [file.name for file in path.glob("*.safetensors") if _begins(file, LFS_POINTER)]:
            remedy = f"{pointers[0]} is a pointer of Git LFS, not the weights; fetch them with git lfs pull"
            raise Refused("model", str(path), remedy)
        return
    if base := _base_of_run(path):
        remedy = (
            f"it is the folder of a run, not a model: give model={base!r}, and start={str(path)!r} to go on from it"
        )
        raise Refused("model", str(path), remedy)
    inner = [one for one in path.iterdir() if (one / "config.json").is_file()]
    if inner:  # the last checkpoint of a trainer, if it is that
        last = max(inner, key=lambda one: (int(re.sub(r"\D", "", one.name) or 0), one.name))
        raise Refused("model", str(path), f"the folder holds no model, but its folders do: give {last}")
    if _any(path, "model*.safetensors", "pytorch_model*.bin"):
        remedy = "the folder holds weights without the config.json that describes them; get the checkpoint again, whole"
        raise Refused("model", str(path), remedy)
    if _any(path, "tokenizer*"):
        remedy = "the folder holds no model, only a tokenizer: add config.json and model.safetensors"
        raise Refused("model", str(path), remedy)
    raise Refused("model", str(path), "the folder holds no model: neither config.json nor weights; give another one")


def _check_no_adapter(name: str) -> None:
    """Raise Refused for an adapter: transformers would load it on its base without a word."""
    try:
        found = find_adapter_config_file(name)
    except Exception:  # whatever is wrong with it, loading the model says it better
        return
    if not found:
        return
    about, folder = _json(Path(found)), Path(name)
    base = str(_base_of_run(folder.parent) or about.get("base_model_name_or_path") or "its base model")
    if folder.is_dir() and Path(base).is_dir() and folder.samefile(base):
        remedy = "the folder holds a model and an adapter of it: move adapter_config.json and adapter_model.safetensors"
        raise Refused("model", name, f"{remedy} into a folder of their own, and give that as start= to go on from it")
    remedy, kind = f"it is an adapter of {base}, not a model: give model={base!r}", about.get("peft_type", "LORA")
    if kind != "LORA":
        raise Refused("model", name, f"{remedy}; no run goes on from an adapter of the kind {kind}")
    start = repr(name) if folder.is_dir() else "a folder with it"
    raise Refused("model", name, f"{remedy}, and start={start} to go on from it")


def _check_full_precision(name: str) -> None:
    """Raise Refused for a checkpoint with quantised weights."""
    if found := getattr(_configuration(name), "quantization_config", None):
        how = found.get("quant_method", "some method") if isinstance(found, dict) else "some method"
        remedy = (
            f"its weights are quantised ({how}); give the checkpoint in full precision, for 4 bits with engine.four_bit"
        )
        raise Refused("model", name, remedy)


def _configuration(name: str) -> PreTrainedConfig | None:
    """Return the configuration of a model; None where it cannot be read: loading the model says better what is wrong."""
    try:
        # otherwise it asks at the terminal whether to run the checkpoint's own code
        found: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception:  # transformers, json and the hub client each have their own
        return None
    return found


def _base_of_run(folder: Path) -> str | None:
    """Return the base model of the run in this folder; None where there is no run."""
    model = _json(folder / "manifest.json").get("model")
    return str(model["name"]) if isinstance(model, dict) and "name" in model else None


def _begins(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:  # transformers says it
        return False


def _any(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remedy(name: str, use: str, error: Exception) -> str:
    if "Unrecognized configuration class" in str(error):
        kind = re.search(r"\.(\w+)Config'", str(error))
        return f"transformers has no model of this architecture for {use} ({kind and kind[1]}); choose another model"
    if "trust_remote_code" in str(error):
        return "it comes with program code of its own, which is not run; choose an architecture that transformers has"
    if Path(name).is_dir():
        reason = first_line(error)
        return f"transformers cannot load it for {use} ({reason}); mend what that names, or get the checkpoint again, whole"
    if os.sep in name and not Path(name).exists() and name.count("/") != 1:
        return "there is no such folder; give one, or a hub name such as sentence-transformers/all-MiniLM-L6-v2"
    return f"neither a local folder nor a model of the hub ({first_line(error)}); check the name and the network"
