"""Losses: the cross-entropy of each label, or of each token of each answer.

The loss of an example is the mean over its answer's tokens, that of a batch the mean over its examples: a long answer weighs no more
than a short one, as one label weighs no more than another. Logits are made only where a token is to be predicted: a vocabulary is
large, and with a small model the logits would take most of the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from fedloom.train.base_model import Base
from fedloom.train.engine.answer_tokens import computed_at
from fedloom.train.engine.dropout import suspend_training
from fedloom.train.engine.trial_texts import FAILURES, trial_inputs
from fedloom.train.tokenised import IGNORED, copy_to


@dataclass(frozen=True, slots=True)
class AnswerLogits:
    """Logits of the answer tokens in a batch.

    Fields:
        logits: (tokens, vocabulary).
        targets: the right token ids (tokens,).
        row: the example of each token (tokens,).
        rows: number of examples in the batch.
    """

    logits: Tensor
    targets: Tensor
    row: Tensor
    rows: int

    def losses(self) -> Tensor:
        """Cross-entropy of each token."""
        return functional.cross_entropy(self.logits.float(), self.targets, reduction="none")

    def sum_by_example(self, values: Tensor) -> Tensor:
        """Sum values (tokens,) over the tokens of each example."""
        return torch.zeros(self.rows, dtype=values.dtype, device=values.device).index_add(0, self.row, values)

    def counts(self) -> Tensor:
        """Return the number of answer tokens of each example."""
        return self.sum_by_example(torch.ones_like(self.targets))


def mean_loss(base: Base, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of a batch."""
    if base.labels is not None:
        loss: Tensor = base.model(**inputs).loss
        return loss
    return example_losses(base, inputs).mean()


def example_losses(base: Base, inputs: dict[str, Tensor]) -> Tensor:
    """Return the loss of each example (rows,)."""
    if base.labels is None:
        found = answer_logits(base, inputs)
        return found.sum_by_example(found.losses()) / found.counts().clamp_min(1)
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    return functional.cross_entropy(base.model(**inputs).logits.float(), labels, reduction="none")


def answer_logits(base: Base, inputs: dict[str, Tensor]) -> AnswerLogits:
    """Predict each token that `inputs["labels"]` (rows, tokens; on the CPU) names, from the tokens before it."""
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    row, column, targets = (copy_to(t, base.device) for t in (*places, labels[places[0], places[1] + 1]))
    if base.device.type != "cpu" and not reads_padding(base):
        inputs.pop("attention_mask", None)
    alone = computed_at(base.read_alone, row, column, (len(labels), labels.shape[1]))
    with alone, _logits_only_at(base, row, column) as cut:
        logits = base.model(**inputs, use_cache=False).logits
    return AnswerLogits(logits if cut else logits[row, column], targets, row, len(labels))


def reads_padding(base: Base) -> bool:
    """Whether a text's logits change when no mask says which tokens are padding. Tried on the model, once.

    They do not in a decoder that is padded on the right: no token sees a later one. Flash attention knows no such mask.
    """
    if "padding" not in base.trials:
        base.trials["padding"] = _try_padding(base)
    return bool(base.trials["padding"])


@torch.no_grad()
def _try_padding(base: Base) -> bool:
    inputs, back = trial_inputs(base.model.get_base_model(), base.tokenizer), suspend_training(base.model)
    mask, error = inputs["attention_mask"].bool(), 1e-4 if base.model.dtype == torch.float32 else 0.03
    try:
        masked = base.model(**inputs, use_cache=False).logits[mask].float()
        del inputs["attention_mask"]
        plain = base.model(**inputs, use_cache=False).logits[mask].float()
    except FAILURES:
        return True
    finally:
        back()  # part by part: while it trains, only some may be in training mode
    return float((plain - masked).abs().max()) > error * float(masked.abs().max())


@contextmanager
def _logits_only_at(base: Base, row: Tensor, column: Tensor) -> Iterator[bool]:
    """Inside, apply the model's head only at these tokens, by `row` and `column`; everywhere, if the head itself is trained.

    A trained head must see whole rows: in a common pass the rows of a batch tell the clients' heads apart.
    """
    head = base.head
    if head is None or isinstance(head, LoraLayer | ModulesToSaveWrapper):
        yield False
        return

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][row, column], *args[1:])

    hook = head.register_forward_pre_hook(gather)
    try:
        yield True
    finally:
        hook.remove()
