"""Texts as token ids: each example is tokenised once, batches are padded to their own longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedloom.data.examples import Examples
from fedloom.train.chat_template import Fitted, tokenised

IGNORED = -100
"""The label of a token that is not to be predicted, as torch and transformers have it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of each example, with its label; `extras` are the tokenizer's other columns (segment ids).

    Where text is generated, `begins` is where the answer's tokens begin in each example: they, the end mark included, are what is
    predicted. `fitted` counts what happened to the examples on the way.
    """

    ids: tuple[tuple[int, ...], ...]
    extras: dict[str, tuple[tuple[int, ...], ...]]
    labels: tuple[int, ...]
    pad: int
    left: bool
    begins: tuple[int, ...] | None = None
    fitted: Fitted | None = None

    def lengths(self, indices: Sequence[int]) -> list[int]:
        """Tokens of these examples."""
        return [len(self.ids[i]) for i in indices]

    def batch(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Model inputs of these examples, padded to the longest of them, with `labels` (rows,), or (rows, tokens) to predict."""
        width = max(self.lengths(indices))
        mask = [self._padded([1] * len(self.ids[i]), width, 0) for i in indices]
        inputs = {"input_ids": [self._padded(self.ids[i], width, self.pad) for i in indices], "attention_mask": mask}
        for name, column in self.extras.items():
            inputs[name] = [self._padded(column[i], width, 0) for i in indices]
        if self.begins is None:
            inputs["labels"] = [self.labels[i] for i in indices]  # type: ignore[misc]
        else:
            wanted = [[*[IGNORED] * self.begins[i], *self.ids[i][self.begins[i] :]] for i in indices]
            inputs["labels"] = [self._padded(row, width, IGNORED) for row in wanted]
        return {name: torch.tensor(rows, device=device) for name, rows in inputs.items()}

    def real(self, index: int, width: int) -> slice:
        """Where the tokens of this example are in a row of `width`; the rest is padding."""
        length = len(self.ids[index])
        return slice(width - length, width) if self.left else slice(0, length)

    def _padded(self, row: Sequence[int], width: int, value: int) -> list[int]:
        filler = [value] * (width - len(row))
        return [*filler, *row] if self.left else [*row, *filler]


def encode(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Tokenise single sentences or pairs, cut at `max_length` tokens, or requests with their answers, made to fit in as many."""
    pad, left = tokenizer.pad_token_id or 0, tokenizer.padding_side == "left"
    if examples.answers is not None:
        ids, begins, fitted = tokenised(examples, tokenizer, max_length)
        return Encoded(ids, {}, examples.labels, pad, left, begins, fitted)
    if not len(examples):
        return Encoded((), {}, (), pad, left)
    pairs = list(examples.pairs) if examples.pairs is not None else None
    columns = tokenizer(
        list(examples.texts), pairs, truncation=True, max_length=max_length, return_attention_mask=False
    )
    extras = {name: _frozen(rows) for name, rows in columns.items() if name != "input_ids"}
    return Encoded(_frozen(columns["input_ids"]), extras, examples.labels, pad, left)


def _frozen(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in rows)
