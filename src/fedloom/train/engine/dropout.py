"""Dropout (Srivastava et al. 2014) from random bytes: masks at a tenth of the time, and attention that needs no slower path for them.

Torch draws one number after the other for each mask, which takes a tenth of a training step, and computes attention with dropout
in a path that takes twice as long. Here a number is dropped where a random byte is below a bound. The bytes come from the
generator of torch, so what is dropped follows from its state alone: from the seed of a task, or from all of a secret where single
records are protected. A step that is computed again in the backward pass drops the same.

A byte can say 256 things, so a probability is rounded to a multiple of 1/256; the numbers that stay are divided by the share that
stays, so the expected value is exact. Where that would move a probability by more than a fiftieth, outside the CPU and in other
types than float32, torch's own dropout is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fedloom.train.engine.trial_texts import FAILURES, trial_logits

BYTE = 256
ERROR = 0.02
"""Largest relative error of a probability, or of its complement, that is rounded to bytes."""

ATTENTION = "sdpa_with_byte_dropout"
"""Name of `_attention` among the attention functions of transformers."""


def bytes_dropped(probability: float) -> int:
    """Return how many of the 256 bytes mean that a number is dropped; 0 where none does, or bytes are too coarse."""
    dropped = min(round(probability * BYTE), BYTE - 1)
    return dropped if abs(dropped / BYTE - probability) <= ERROR * min(probability, 1 - probability) else 0


def dropout_mask(like: Tensor, dropped: int) -> Tensor:
    """Draw a mask of this shape in float32: 0 where one of the `dropped` bytes came, else what keeps the expected value."""
    count = like.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None)  # `random_()` leaves one bit 0
    drawn = words.view(torch.uint8)[:count].view(like.shape)
    return drawn.clamp_(dropped - 1, dropped).sub_(dropped - 1).float().mul_(BYTE / (BYTE - dropped))


class ByteDropout(nn.Dropout):
    """An `nn.Dropout` whose masks are drawn as bytes."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop numbers at random while training, and scale the others."""
        dropped = bytes_dropped(self.p) if self.training and _in_bytes(input) else 0
        return input * dropout_mask(input, dropped) if dropped else super().forward(input)


def _in_bytes(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, probability: float, scale: float) -> Tensor:
    """Return softmax(scale q k^T + mask) v, (batch, heads, queries, d), each weight dropped with this probability.

    Args:
        query: (batch, heads, queries, d).
        key: (batch, heads, keys, d).
        value: (batch, heads, keys, d).
        mask: False where a query may not look, or what is added; it broadcasts to (batch, heads, queries, keys) (None: nothing).
        probability: of a weight.
        scale: usually d^(-1/2).
    """
    dropped = bytes_dropped(probability) if _in_bytes(query) else 0
    if not dropped:
        return nn.functional.scaled_dot_product_attention(query, key, value, mask, probability, scale=scale)
    scores = torch.matmul(query * scale, key.mT)
    if mask is not None:
        scores = scores + (_added(mask) if mask.dtype == torch.bool else mask)
    weights = torch.softmax(scores, dim=-1)
    return torch.matmul(weights * dropout_mask(weights, dropped), value)


def _added(mask: Tensor) -> Tensor:
    """Return what is added to scores instead of a mask; finite, so that a query that may look nowhere gives no NaN."""
    lowest = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers by this name: as its "sdpa", but for dropout where every head has keys and all may look at all."""
    asked = more.get("is_causal")
    causal = attention_mask is None and (getattr(module, "is_causal", True) if asked is None else asked)
    other = any(more.get(name) is not None for name in ("cache", "position_bias"))
    if not dropout or causal or other or query.shape[1] != key.shape[1]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, attention_mask, dropout, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def install_attention(model: PreTrainedModel) -> bool:
    """Make a model with dropout compute its attention by `attend`; False, with nothing changed, where it has none or cannot.

    Tried on the model: without dropout its logits must stay as they are, to the bit.
    """
    config = model.config.get_text_config()
    drops = any("drop" in name and isinstance(p, float) and p > 0 for name, p in config.to_dict().items())
    if not drops or getattr(model.config, "_attn_implementation", "") != "sdpa":
        return False
    try:
        before = trial_logits(model)
        model.set_attn_implementation(ATTENTION)
        if torch.equal(trial_logits(model), before) and bool(trial_logits(model, training=True).isfinite().all()):
            return True
    except FAILURES:  # a model whose attention is put together in another way
        pass
    model.set_attn_implementation("sdpa")
    return False


def install_byte_dropout(model: nn.Module) -> None:
    """Make every dropout of the model draw bytes. A head that PEFT trains is left out: copies of it may run under `vmap`."""
    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    spared = {id(inner) for head in heads for inner in head.modules()}
    for module in model.modules():
        if type(module) is nn.Dropout and id(module) not in spared:
            module.__class__ = ByteDropout  # it stays the module that peft and state dicts know


@contextmanager
def training_mode(model: nn.Module, base_dropout: bool) -> Iterator[None]:
    """Put the model in training mode inside the block; without `base_dropout` only the adapters' own dropout is on.

    Layers that are computed again in the backward pass look at their mode for that, so they stay in training mode, and what they
    themselves drop is set to 0 (OPT and BART drop in the layer, not in a part of it).
    """
    modes, changed = [(module, module.training) for module in model.modules()], list[tuple[nn.Module, str, float]]()
    model.train(base_dropout)
    if not base_dropout:
        for name, module in model.named_modules():
            if ".lora_dropout." in name:
                module.train()
            elif getattr(module, "gradient_checkpointing", False):
                module.training = True
                changed += [
                    (module, key, p) for key, p in vars(module).items() if "drop" in key and isinstance(p, float)
                ]
    for module, key, _ in changed:
        setattr(module, key, 0.0)
    try:
        yield
    finally:
        for module, key, probability in changed:
            setattr(module, key, probability)
        for module, training in modes:
            module.training = training


def suspend_training(model: nn.Module) -> Callable[[], None]:
    """Put the model in eval mode; return a function that puts those parts back into training mode that are in it now.

    Only these are touched: to set the mode of each of thousands of modules takes a tenth of a small step.
    """
    trained = [module for module in model.modules() if module.training]

    def set_mode(training: bool) -> None:
        for part in trained:
            part.training = training

    set_mode(False)
    return partial(set_mode, True)
