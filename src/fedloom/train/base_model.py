"""The base model: one frozen model in memory for all simulated clients, with one PEFT adapter slot for each LoRA rank in use.

`load_base` loads it, checks that the adapters fit and installs the tricks of the engine. A task writes its adapter into the slot of
its rank (`Base.put`), trains there, and reads the slot back; nothing of a task stays in the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.core.model_shape import Shape
from fedloom.train import checkpoint, peft_weights, pretrained
from fedloom.train.device import find_device
from fedloom.train.engine import answer_tokens, dropout, first_token, linear_kernel
from fedloom.train.library_messages import collect_messages, log_messages, notes_of
from fedloom.train.settings import PLAIN, Engine, LoRA
from fedloom.train.targets import HEADS, check_adapted_layers, choose_targets, target_remedy, unfit_layers

SAMPLE = 1000
"""Numbers of a layer that go into the model's fingerprint (up to twice as many)."""


@dataclass(slots=True)
class Base:
    """A base model with its tokenizer and adapter slots.

    Fields:
        model: PEFT's wrapper of the transformers model.
        tokenizer: its tokenizer, which can pad.
        lora: which layers are adapted, and how.
        labels: number of labels that it predicts (None: it writes text).
        name: hub name or folder.
        fold: the adapter whose products are added to the frozen weights now (None: none).
        computation: which kernels compute it, for the manifest.
        original_weights: the frozen weights without any fold; empty until a fold is first added.
        trials: what the engine found out by trying it on the model, each thing once.
        notes: sentences on how the checkpoint was adapted, for manifest and report.
        label_names: names of the labels in the order of its outputs, where they were given.
        read_alone: linear layers of the last block that compute only tokens whose logits are made (`engine.answer_tokens`).
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    lora: LoRA
    labels: int | None
    name: str
    fold: Adapter | None = None
    computation: dict[str, object] = field(default_factory=dict)
    original_weights: dict[str, Tensor] = field(default_factory=dict)
    trials: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    label_names: tuple[str, ...] = ()
    read_alone: tuple[nn.Module, ...] = ()

    def slot(self, rank: int) -> str:
        """Return the name of the PEFT adapter of this rank, which is made at first use."""
        slot = f"r{rank}"
        if slot not in self.model.peft_config:
            targets = next(iter(self.model.peft_config.values())).target_modules  # type: ignore[attr-defined]  # of all slots
            self.model.add_adapter(slot, _config(self.lora, rank, self.labels, self._heads(), targets))
            if self.computation.get("byte_dropout"):
                dropout.install_byte_dropout(self.model)
        return slot

    def put(self, adapter: Adapter, scaling: float | None = None, fold: Adapter | None = None) -> str:
        """Write an adapter into the slot of its rank, over the base with `fold` added, and make it active; return the slot."""
        self._set_fold(fold)
        rank = max(factor.rank for factor in adapter.factors.values())
        slot = self.slot(rank)
        with log_messages():
            self.model.set_adapter(slot)
        peft_weights.write_adapter(self.model, slot, adapter, scaling or self.lora.scaling)
        return slot

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Make the model inside the block as it was before any training: without adapter and fold."""
        self._set_fold(None)
        with self.model.disable_adapter():  # type: ignore[no-untyped-call]
            yield

    def _set_fold(self, fold: Adapter | None) -> None:
        if fold is self.fold:
            return
        self.original_weights = self.original_weights or peft_weights.take_base_weights(self.model)
        peft_weights.set_fold(self.model, self.original_weights, fold)
        self.fold = fold

    @property
    def device(self) -> torch.device:
        """Return the device on which the model computes."""
        return next(self.model.parameters()).device

    @property
    def head(self) -> nn.Module | None:
        """Return the layer that gives the logits of the next token; None where the model predicts a label."""
        return self.model.get_base_model().get_output_embeddings() if self.labels is None else None  # type: ignore[operator]

    @property
    def vocabulary(self) -> int:
        """Return the number of logits for one token: the vocabulary's size, or 1 where the model predicts a label for a text."""
        weight = getattr(self.head, "weight", None)
        return len(weight) if isinstance(weight, Tensor) else 1

    @property
    def hidden(self) -> int:
        """Return the width of the hidden states."""
        config = cast(PreTrainedConfig, self.model.get_base_model().config)
        return int(getattr(config.get_text_config(), "hidden_size", 1))

    def shape(self) -> Shape:
        """Return the sizes of the model, for cost models."""
        base = self.model.get_base_model()
        adapted = peft_weights.lora_layers(self.model)
        own = [p for n, p in base.named_parameters() if "lora_" not in n and "modules_to_save" not in n]
        head = getattr(self.head, "weight", None)  # where it is an embedding too, it is multiplied all the same
        tables = [m.weight for m in base.modules() if isinstance(m, nn.Embedding) and m.weight is not head]
        looked_up = sum(weight.numel() for weight in tables)
        first = next(iter(self.model.peft_config))
        dense = sum(p.numel() for p in peft_weights.dense_parameters(self.model, first).values())
        config = cast(PreTrainedConfig, base.config).get_text_config()
        blocks = peft_weights.transformer_blocks(self.model)
        return Shape(
            parameters=sum(map(peft_weights.count_numbers, own)) - looked_up,
            embeddings=looked_up,
            layers=len(blocks[1]) if blocks else getattr(config, "num_hidden_layers", 1),
            hidden=self.hidden,
            modules=tuple(peft_weights.layer_size(layer) for layer in adapted.values()),
            dense=dense,
            depths=peft_weights.layer_depths(self.model),
            vocabulary=self.vocabulary if self.labels is None else 0,
        )

    def fingerprint(self, names: Collection[str] | None = None) -> str:
        """Return twelve hex digits from a sample of the frozen weights of the adapted layers, or of `names` among them.

        Copies of one model have the same; a fold does not count. "" where weights are in 4 bits, which machines round differently.
        """
        digest = hashlib.sha256()
        for name, layer in peft_weights.lora_layers(self.model).items():
            if names is not None and name not in names:
                continue
            weight = self.original_weights.get(name, peft_weights.base_weight(layer)).detach()
            if peft_weights.is_quantised(weight):
                return ""
            sample = weight.flatten()[:: max(1, weight.numel() // SAMPLE)]
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(sample.float().numpy(force=True).tobytes())
        return digest.hexdigest()[:12]

    def _heads(self) -> list[str]:
        first = next(iter(self.model.peft_config.values()))
        return sorted(set(getattr(first, "modules_to_save", None) or ()) - set(HEADS))


def load_base(
    name: str,
    labels: int | None,
    lora: LoRA,
    rank: int,
    seed: int,
    device: str = "cpu",
    engine: Engine = PLAIN,
    label_names: Sequence[str] = (),
) -> Base:
    """Load a pretrained model by hub name or local folder, adapted at `rank`; head and adapters are initialised from `seed`.

    It predicts one of `labels`, or with None writes text. With `label_names` a head that the checkpoint brings is used as it names
    its labels, see `checkpoint.adopt_head`. Raises Refused if the model or the tokenizer cannot be loaded, is not what it seems, or
    has no such target modules, or `rank` is too high.
    """
    place = find_device(device)
    if engine.kernel in linear_kernel.NEED_ONEDNN and place.type == "cpu" and not linear_kernel.onednn_available():
        raise Refused("engine.kernel", engine.kernel, "this build of torch has no such kernel; choose fastest")
    half = in_half_precision(engine, place)
    more = pretrained.four_bit_arguments(place) if engine.four_bit else {"dtype": torch.bfloat16} if half else {}
    with collect_messages() as messages, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, report = (
            pretrained.load_decoder(name, **more)
            if labels is None
            else pretrained.load_classifier(name, labels, **more)
        )
        tokenizer = pretrained.load_tokenizer(name)
        for part in (model.config, model.config.get_text_config()):
            part.pad_token_id = tokenizer.pad_token_id
        order, notes = checkpoint.examine(model, tokenizer, report, label_names if labels is not None else None)
        biggest = max(max(m.weight.shape) for m in model.modules() if isinstance(m, nn.Linear))
        if rank > biggest:  # before peft makes matrices of it
            raise Refused("plan.rank", rank, f"no layer of the model is that large; choose ranks below {biggest}")
        heads = checkpoint.head_modules(model, report, labels is not None)
        targets = choose_targets(model, lora.target_modules, _config(lora, rank, labels, heads, None))
        spare = [model.get_submodule(path) for path in unfit_layers(model)] if engine.bfloat16 else []
        reads_first = engine.first_token and labels is not None and first_token.install_first_token(model)
        if engine.byte_dropout:
            dropout.install_attention(model)
        try:
            config = _config(lora, rank, labels, heads, targets.modules)
            adapted = get_peft_model(model, config, adapter_name=f"r{rank}")
        except ValueError as error:
            raise Refused("lora.target_modules", lora.target_modules, target_remedy(model, error)) from error
        check_adapted_layers(adapted)
        if half:
            _keep_heads_exact(adapted)
        notes += (*targets.notes, *checkpoint.untie_adapted(adapted))
        _enable_checkpointing(model, engine)
    base = Base(_placed(adapted, place, engine), tokenizer, lora, labels, name, label_names=order)
    base.notes = (*notes, *notes_of(messages))
    chosen = _install_kernels(base.model, place, engine, half, spare)
    if engine.answer_tokens and labels is None and not engine.checkpointing:
        base.read_alone = answer_tokens.find_layers(base.model, tokenizer)
    base.computation = {**chosen, "first_token": reads_first, "answer_tokens": bool(base.read_alone)}
    check_rank_fits_model(base, "plan.rank", rank)
    return base


def _install_kernels(
    model: PeftModel, place: torch.device, engine: Engine, half: bool, spare: Collection[nn.Module]
) -> dict[str, object]:
    """Install what computes layers, adapters and dropout; return which was chosen. `half`: all of the model is bfloat16."""
    chosen = engine.kernel
    if chosen == "fastest":
        chosen = linear_kernel.fastest_kernel() if place.type == "cpu" else "fused"
    bfloat16 = bool(engine.bfloat16) and not half
    if bfloat16 or chosen == "onednn":
        linear_kernel.install_linear_kernel(model, bfloat16, spare)
    if chosen != "torch":
        linear_kernel.fuse_adapters(model)
    if engine.byte_dropout:
        dropout.install_byte_dropout(model)
    return {"kernel": chosen, "byte_dropout": engine.byte_dropout}


def in_half_precision(engine: Engine, place: torch.device) -> bool:
    """Whether the whole model is bfloat16, from the file on: on an accelerator, where attention and norms gain from it too.

    On a CPU `Engine.bfloat16` concerns the frozen linear layers alone.
    """
    return bool(engine.bfloat16) and place.type != "cpu"


def _keep_heads_exact(model: PeftModel) -> None:
    """Make heads that are trained whole compute in float32, as their copies then do: half precision loses AdamW's small steps."""
    for head in model.modules():
        if isinstance(head, ModulesToSaveWrapper):
            head.float()
            head.register_forward_pre_hook(_inputs_in_float32)


def _inputs_in_float32(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _placed(model: PeftModel, place: torch.device, engine: Engine) -> PeftModel:
    """Move the model to its device, into memory of its own: products of unaligned numbers of a mapped file round differently."""
    if engine.four_bit:  # already there
        return model
    for parameter in model.parameters() if place.type == "cpu" else ():
        parameter.data = parameter.data.clone()
    return model.to(place)


def _enable_checkpointing(model: PreTrainedModel, engine: Engine) -> None:
    if engine.checkpointing:
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
        except ValueError as error:
            remedy = f"{type(model).__name__} cannot compute its layers again; leave it off"
            raise Refused("engine.checkpointing", True, remedy) from error
        configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
        for config in configs:
            config.use_cache = False  # a block that is computed again would add its keys to the cache again


def initial_adapter(base: Base, rank: int) -> Adapter:
    """Return the adapter with which a run starts: PEFT's initialisation, up = 0 and down random."""
    return peft_weights.read_adapter(base.model, base.slot(rank))


def _config(lora: LoRA, rank: int, labels: int | None, heads: list[str], targets: list[str] | str | None) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM if labels is None else TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=lora.scaling * rank,  # type: ignore[arg-type]  # PEFT only divides it by r
        lora_dropout=lora.dropout,
        target_modules=targets,
        modules_to_save=heads,
    )


def check_rank_fits_model(base: Base, field: str, rank: int) -> None:
    """Raise Refused if a layer is too small for this rank."""
    for name, layer in peft_weights.lora_layers(base.model).items():
        size = peft_weights.layer_size(layer)
        if rank > min(size):
            raise Refused(field, rank, f"layer {name} is {size[0]} x {size[1]}; choose ranks of at most {min(size)}")


def most_tokens(base: Base, otherwise: int) -> int:
    """Return the tokens of the longest text that the model reads, or `otherwise` where nothing limits it to less."""
    positions = checkpoint.position_limit(base.model.get_base_model())
    most, stated = otherwise if positions is None else positions, base.tokenizer.model_max_length
    return int(min(most, stated)) if isinstance(stated, int | float) and stated > 0 else most


def check_length(base: Base, max_length: int, longest: int) -> None:
    """Raise Refused if the model cannot read a text of `longest` tokens, which `max_length` let through."""
    most = most_tokens(base, longest)
    if longest > most:
        raise Refused(
            "training.max_length", max_length, f"a text has {longest} tokens, the model reads {most}; set {most}"
        )
