"""The last layer of an encoder, computed only for the first token, where its head reads no other.

A BERT-like classifier predicts from the first token of the last layer. Keys and values of that layer are needed of all tokens;
queries, attention, the output projection and the feed-forward part only of the first. That is ten twelfths of the layer's products,
forward and backward, and leaves logits and gradients as they are, to rounding. Whether a model is of this kind is tried on the
model itself: its logits on a few tokens must not change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedloom.train.engine.dropout import ByteDropout, attend
from fedloom.train.engine.trial_texts import trial_logits

ROUNDING = {torch.float32: 1e-4}
"""Largest relative difference of logits that is still rounding, by their type; in others 0.03."""


class FirstToken(nn.Module):
    """The attention block of BERT and its relatives, for the first token alone; (batch, 1, hidden) goes on from here."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **rest: Any) -> tuple[Tensor, None]:
        """Return the block's output for the first token."""
        inner: Any = self.self
        rows = len(hidden_states)

        def heads(x: Tensor) -> Tensor:
            return x.view(rows, -1, inner.num_attention_heads, inner.attention_head_size).transpose(1, 2)

        query = heads(inner.query(hidden_states[:, :1]))
        key, value = heads(inner.key(hidden_states)), heads(inner.value(hidden_states))
        mask = attention_mask[..., :1, :] if attention_mask is not None else None
        dropout = inner.dropout.p if self.training else 0.0
        attention: Any = (
            attend if isinstance(inner.dropout, ByteDropout) else nn.functional.scaled_dot_product_attention
        )
        found = attention(query, key, value, mask, dropout, scale=inner.attention_head_size**-0.5)
        output: Any = self.output
        return output(found.transpose(1, 2).reshape(rows, 1, -1), hidden_states[:, :1]), None


def install_first_token(model: nn.Module) -> bool:
    """Make the last layer of the model compute its first token alone; return False, with nothing changed, if its head needs more."""
    blocks = [module for module in model.modules() if _is_attention(module)]
    config: Any = getattr(model, "config", None)
    if not blocks or getattr(config, "_attn_implementation", "") != "sdpa" or getattr(config, "is_decoder", False):
        return False
    last, kind = blocks[-1], type(blocks[-1])
    before = trial_logits(model)
    last.__class__ = FirstToken  # the block keeps its name and its parts, which peft and state dicts know
    try:
        after = trial_logits(model)
        size = float(before.abs().max())  # zero for an empty head, which says nothing
        if (
            after.shape == before.shape
            and size > 0
            and float((after - before).abs().max()) <= ROUNDING.get(before.dtype, 0.03) * size
        ):
            return True
    except (RuntimeError, TypeError, AttributeError, IndexError):  # a relative that is put together in another way
        pass
    last.__class__ = kind
    return False


def _is_attention(module: nn.Module) -> bool:
    inner = getattr(module, "self", None)
    parts = ("query", "key", "value", "dropout", "num_attention_heads", "attention_head_size")
    return all(hasattr(inner, part) for part in parts) and hasattr(module, "output")
