"""Short made-up texts on which the engine tries a model: does a shortcut compute what the plain model computes?"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedloom.train.tokenised import EncodedTexts

LENGTHS = (13, 5, 10)
"""Tokens of the texts: as many texts as are no axis of a model by chance, some of them padded."""

FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)
"""What a model raises where it is not made for a shortcut: each architecture fails in its own way."""


def trial_texts(
    model: Any, tokenizer: PreTrainedTokenizerBase, labels: int | None = None, copies: int = 1
) -> EncodedTexts:
    """Return texts of `LENGTHS`, that many times with other words each time, for a model of transformers.

    Each ends with the model's end mark, where it has one: some classifiers read a text there. `labels` go round; where text is
    written (None), the second half is the answer.
    """
    size = int(getattr(model.config.get_text_config(), "vocab_size", len(tokenizer)))
    ends = getattr(model.config, "eos_token_id", None)
    end = next((i for i in (ends if isinstance(ends, list) else [ends]) if i is not None and i < size), None)
    special = {*tokenizer.all_special_ids, end}
    words = cycle([i for i in range(min(size, len(special) + 100)) if i not in special] or range(size))
    rows = []
    for length in LENGTHS * copies:
        row = [*islice(words, length)]
        rows.append(tuple(row if end is None else [*row[:-1], end]))
    classes = tuple(k % (labels or 1) for k in range(len(rows)))
    begins = tuple(len(row) // 2 for row in rows) if labels is None else None
    left = tokenizer.padding_side == "left"
    return EncodedTexts(tuple(rows), {}, classes, int(tokenizer.pad_token_id or 0), left, begins)


def trial_inputs(model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return these texts as one batch for the model, without labels."""
    texts = trial_texts(model, tokenizer)
    batch = texts.batch(range(len(texts.ids)), model.device)
    return {name: column for name, column in batch.items() if name != "labels"}


def trial_logits(model: nn.Module, training: bool = False) -> Tensor:
    """Return the logits of two short rows, one of them padded; with `training` as in training, dropout included."""
    before, config = model.training, getattr(model, "config", None)
    device = next(model.parameters()).device
    ids = torch.arange(12, device=device).reshape(2, 6) % max(1, getattr(config, "vocab_size", 1))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            found: Tensor = model.train(training)(input_ids=ids, attention_mask=mask).logits
        finally:
            model.train(before)
    return found
