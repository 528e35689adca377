"""Pretrained models and tokenizers as transformers loads them; a model that cannot be loaded is Refused with the reason."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fedloom.core.errors import Refused


def load_classifier(name: str, labels: int, **more: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load a classifier of `labels` classes; also return the names of its parameters that were not in the checkpoint (its head)."""
    return _load(AutoModelForSequenceClassification, name, "classification", num_labels=labels, **more)


def load_decoder(name: str, **more: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load a model that writes text from left to right; also return the names of its parameters that were not in the checkpoint.

    Raises Refused for one that sees later tokens, as an encoder does even where transformers puts a head for generation on it.
    """
    model, fresh = _load(AutoModelForCausalLM, name, "generation", **more)
    if reads_ahead(model):
        remedy = "sees the words that it is to predict; give a decoder such as Qwen/Qwen2.5-0.5B"
        raise Refused("model", name, f"{type(model).__name__} {remedy}")
    return model, fresh


def load_masked_model(name: str, **more: Any) -> tuple[PreTrainedModel, set[str]]:
    """Load a masked language model; also return the names of its parameters that were not in the checkpoint."""
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
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers, tokenizers and the hub client each have their own
        raise Refused("model", name, f"its tokenizer cannot be loaded ({first_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there is none
        raise Refused("model", name, "it comes without a tokenizer; add tokenizer.json and tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(kind: Any, name: str, use: str, **more: Any) -> tuple[PreTrainedModel, set[str]]:
    try:
        model, info = kind.from_pretrained(
            name, output_loading_info=True, dtype=torch.float32, trust_remote_code=False, **more
        )
    except Exception as error:  # transformers, safetensors and the hub client each have their own
        raise Refused("model", name, _remedy(name, use, error)) from error
    return model, set(info["missing_keys"])


def _remedy(name: str, use: str, error: Exception) -> str:
    if "Unrecognized configuration class" in str(error):
        return f"transformers has no model of this architecture for {use}; choose another model"
    if Path(name).is_dir():
        return f"the folder holds no model that transformers can load for {use} ({first_line(error)})"
    if os.sep in name and not Path(name).exists() and name.count("/") != 1:
        return "there is no such folder; give one, or a hub name such as sentence-transformers/all-MiniLM-L6-v2"
    return f"neither a local folder nor a model of the hub ({first_line(error)}); check the name and the network"


def first_line(error: Exception) -> str:
    """Return the message of a library's error in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Silence the libraries' reports and advice inside the block: what matters to users is in the manifest or an error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
