"""One frozen base model in memory for all simulated clients, with one PEFT slot for each LoRA rank in use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fedloom.cost import Shape
from fedloom.errors import Refused
from fedloom.lora import Adapter
from fedloom.train import convert, first_token, kernel
from fedloom.train.settings import PLAIN, Engine, LoRA

HEADS = ("classifier", "score")
"""Modules that PEFT trains and saves of its own accord where labels are predicted."""


@dataclass(slots=True)
class Base:
    """The model with its tokenizer.

    `fold` is what is added to the frozen base now, `pristine` the base without it, `computed` how it computes (for the manifest).
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    lora: LoRA
    labels: int
    name: str
    fold: Adapter | None = None
    computed: dict[str, object] = field(default_factory=dict)
    pristine: dict[str, Tensor] = field(default_factory=dict)

    def slot(self, rank: int) -> str:
        """The PEFT adapter of this rank, made at first use."""
        slot = f"r{rank}"
        if slot not in self.model.peft_config:
            self.model.add_adapter(slot, _config(self.lora, rank, self._heads()))
        return slot

    def put(self, adapter: Adapter, scaling: float | None = None, fold: Adapter | None = None) -> str:
        """Load an adapter into the slot of its rank, over the base with `fold` added, and make it active; returns the slot."""
        if fold is not self.fold:
            self.pristine = self.pristine or convert.base_weights(self.model)
            convert.add_to_base(self.model, self.pristine, fold)
            self.fold = fold
        rank = max(factor.rank for factor in adapter.factors.values())
        slot = self.slot(rank)
        with quiet():
            self.model.set_adapter(slot)
        convert.write(self.model, slot, adapter, scaling or self.lora.scaling)
        return slot

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def shape(self) -> Shape:
        """Sizes of the model, for costs."""
        base = self.model.get_base_model()
        adapted = convert.lora_layers(self.model)
        own = [p for n, p in base.named_parameters() if "lora_" not in n and "modules_to_save" not in n]
        looked_up = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Embedding))
        first = next(iter(self.model.peft_config))
        dense = sum(p.numel() for p in convert.dense_parameters(self.model, first).values())
        config = base.config
        return Shape(
            parameters=sum(p.numel() for p in own) - looked_up,
            embeddings=looked_up,
            layers=getattr(config, "num_hidden_layers", 1),
            hidden=getattr(config, "hidden_size", 1),
            modules=tuple(convert.size(layer) for layer in adapted.values()),
            dense=dense,
            depths=convert.depths(self.model),
        )

    def _heads(self) -> list[str]:
        first = next(iter(self.model.peft_config.values()))
        return sorted(set(getattr(first, "modules_to_save", None) or ()) - set(HEADS))


def load(name: str, labels: int, lora: LoRA, rank: int, seed: int, device: str = "cpu", engine: Engine = PLAIN) -> Base:
    """A pretrained model by hub name or local folder, adapted at `rank`; head and LoRA initialised from `seed`.

    Raises Refused if the model or the tokenizer cannot be loaded, or has no such target modules, or `rank` is too high.
    """
    place = _device(device)
    if engine.kernel == "onednn" and not kernel.available():
        raise Refused("engine.kernel", engine.kernel, "this build of torch has no such kernel; choose fastest")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, fresh = _pretrained(name, labels)
        tokenizer = _tokenizer(name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        _check_targets(model, lora)
        reads_first = engine.first_token and first_token.install(model)
        biggest = max(max(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        if rank > biggest:  # before peft makes matrices of it
            raise Refused("plan.rank", rank, f"no layer of the model is that large; choose ranks below {biggest}")
        try:
            adapted = get_peft_model(model, _config(lora, rank, _new_modules(model, fresh)), adapter_name=f"r{rank}")
        except ValueError as error:
            raise Refused("lora.target_modules", lora.target_modules, _target_remedy(model)) from error
    for (
        parameter
    ) in adapted.parameters():  # out of the mapped file: products of unaligned numbers have other last digits
        parameter.data = parameter.data.clone()
    base = Base(adapted.to(place), tokenizer, lora, labels, name)
    _check_linear(base)
    chosen = kernel.fastest() if engine.kernel == "fastest" and place.type == "cpu" else engine.kernel
    if engine.bfloat16 or chosen == "onednn":
        kernel.install(base.model, engine.bfloat16)
    base.computed = {"kernel": chosen.replace("fastest", "torch"), "first_token": reads_first}
    check_rank(base, "plan.rank", rank)
    return base


def initial(base: Base, rank: int) -> Adapter:
    """The adapter with which a run starts: PEFT's own initialisation, up = 0 and down random."""
    return convert.read(base.model, base.slot(rank))


def _config(lora: LoRA, rank: int, heads: list[str]) -> LoraConfig:
    targets = list(lora.target_modules) if isinstance(lora.target_modules, tuple) else lora.target_modules
    return LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=lora.scaling * rank,  # type: ignore[arg-type]  # PEFT only divides it by r
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=heads,
    )


def _pretrained(name: str, labels: int) -> tuple[PreTrainedModel, set[str]]:
    """The model and the names of its parameters that were not in the checkpoint (the new head)."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=labels, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # transformers, safetensors and the hub client each have their own
        raise Refused("model", name, _load_remedy(name, error)) from error
    return model, set(info["missing_keys"])


def _new_modules(model: PreTrainedModel, fresh: set[str]) -> list[str]:
    """The highest modules that are new as a whole, beside `HEADS`: `pre_classifier`, or a masked LM's pooler."""
    known = {name for name, _ in model.named_parameters()} - fresh
    heads = set()
    for key in fresh:
        owners = accumulate(key.split(".")[:-1], "{}.{}".format)
        heads |= {next((o for o in owners if not any(name.startswith(f"{o}.") for name in known)), HEADS[0])}
    return sorted(heads - set(HEADS))


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above, and tokenizers
        raise Refused("model", name, f"its tokenizer cannot be loaded ({_first_line(error)})") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there is none
        raise Refused("model", name, "it comes without a tokenizer; add tokenizer.json and tokenizer_config.json")
    return tokenizer


def _load_remedy(name: str, error: Exception) -> str:
    if Path(name).is_dir():
        return f"the folder holds no model that transformers can load for classification ({_first_line(error)})"
    if os.sep in name and not Path(name).exists() and name.count("/") != 1:
        return "there is no such folder; give one, or a hub name such as sentence-transformers/all-MiniLM-L6-v2"
    return f"neither a local folder nor a model of the hub ({_first_line(error)}); check the name and the network"


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:160]


def _target_remedy(model: nn.Module) -> str:
    linear = (m for m in model.named_modules() if isinstance(m[1], nn.Linear) or "Conv1D" in type(m[1]).__name__)
    names = [n for n, _ in linear if ".lora_" not in n and n.split(".")[0] not in HEADS]
    leaves = sorted({n.removesuffix(".base_layer").rsplit(".", 1)[-1] for n in names})
    return f"name linear layers of {type(model).__name__}: {', '.join(leaves)}"


def _check_targets(model: PreTrainedModel, lora: LoRA) -> None:
    """PEFT is content if one of the names is found; we want each of them."""
    for target in lora.target_modules if isinstance(lora.target_modules, tuple) else ():
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise Refused("lora.target_modules", target, _target_remedy(model))


def check_rank(base: Base, field: str, rank: int) -> None:
    """Raise Refused if a layer is too small for this rank."""
    for name, layer in convert.lora_layers(base.model).items():
        size = convert.size(layer)
        if rank > min(size):
            raise Refused(field, rank, f"layer {name} is {size[0]} x {size[1]}; choose ranks of at most {min(size)}")


def check_length(base: Base, max_length: int, longest: int) -> None:
    """Raise Refused if the model cannot read a text of `longest` tokens, which `max_length` let through."""
    positions = getattr(base.model.get_base_model().config, "max_position_embeddings", longest)
    most = min(positions, base.tokenizer.model_max_length)
    if longest > most:
        raise Refused(
            "training.max_length", max_length, f"a text has {longest} tokens, the model reads {most}; set {most}"
        )


def _check_linear(base: Base) -> None:
    for name, layer in convert.lora_layers(base.model).items():
        inner = layer.get_base_layer()
        if not isinstance(inner, nn.Linear) and "Conv1D" not in type(inner).__name__:
            raise Refused("lora.target_modules", name, "only linear layers can be adapted")


def _device(name: str) -> torch.device:
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise Refused("device", name, f"this machine has no such device ({_first_line(error)}); choose cpu") from error


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' reports and advice are not for our users: what matters is in the manifest or an error."""
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
