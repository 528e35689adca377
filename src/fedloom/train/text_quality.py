"""What a base model thinks of texts: their lengths in its tokens, and how well it foresees them.

The quality of an example is minus the mean loss (nats) of a token: of the reference answer after request and context, or of the text
itself where there are no answers, since a raw base says nothing of labels. A causal model foresees each token from those before it; a
masked model each seventh at a time, from all others (a pseudo-likelihood: Salazar et al. 2020, "Masked language model scoring", hides
one token at a time, which costs as many passes as there are tokens). Compare scores of one model only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples, Source, Split
from fedloom.data.text_measures import example_texts
from fedloom.data.tickets import Tickets
from fedloom.train.pretrained import load_masked_model, load_decoder, silence_libraries, load_tokenizer
from fedloom.train.tokenised import IGNORED

PASSES = 7  # of a masked model: about the share of tokens that it has learnt to fill in
ROWS = 8  # a batch; of similar length


@dataclass(frozen=True)
class Tokens:
    """A measure like `fedloom.data.context.words`: tokens of request, context and answer by the tokenizer of this model."""

    model: str

    def __call__(self, examples: Examples) -> Sequence[float]:
        """One number an example, without special tokens."""
        own = _tokenizer(self.model)
        texts = [" ".join(parts) for parts in example_texts(examples)]
        return tuple(map(len, own(texts, add_special_tokens=False, verbose=False)["input_ids"])) if texts else ()


@dataclass(frozen=True)
class Judged:
    """A source whose training examples bring the quality that this model gives them."""

    source: Source = field(default_factory=Tickets)
    model: str = "distilgpt2"

    def load(self, seed: int) -> Split:
        """The source's split, judged."""
        split = self.source.load(seed)
        return replace(split, train=replace(split.train, quality=scores(split.train, self.model)))


@torch.no_grad()
def scores(examples: Examples, name: str, longest: int = 256) -> tuple[float, ...]:
    """The quality of each example; a text is read up to `longest` tokens, and nothing to foresee scores as not foreseen at all.

    Raises:
        Refused: the model cannot be loaded, or does not predict words.
    """
    model, masked = _model(name)
    own = _tokenizer(name)
    rows = [_row(own, parts, examples.answers is not None, masked, longest) for parts in example_texts(examples)]
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for at in range(0, len(order), ROWS):
        batch = order[at : at + ROWS]
        for i, loss in zip(batch, _losses(model, own, [rows[i] for i in batch], masked), strict=True):
            found[i] = -loss
    return tuple(found)


def _row(own: Any, parts: Sequence[str], answered: bool, masked: bool, longest: int) -> tuple[list[int], int]:
    """Token ids, and where what is to be foreseen begins."""
    before, wanted = (" ".join(parts[:-1]), parts[-1]) if answered else ("", " ".join(parts))
    first = own.cls_token_id if masked else own.bos_token_id
    start = [] if first is None else [first]
    told, said = (own(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (before, wanted))
    said = said[: longest // 2 if told else longest - 2]
    told = told[: max(0, longest - 2 - len(said))]
    return [*start, *told, *said], len(start) + len(told)


def _losses(model: Any, own: Any, rows: Sequence[tuple[list[int], int]], masked: bool) -> list[float]:
    """The mean loss of the tokens that are to be foreseen in each row."""
    width = max(1, *(len(ids) for ids, _ in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    seen, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for k, (row, begin) in enumerate(rows):
        ids[k, : len(row)], seen[k, : len(row)] = torch.tensor(row, dtype=torch.long), 1
        labels[k, begin : len(row)] = ids[k, begin : len(row)]
    if not masked:
        labels[:, 0] = IGNORED  # nothing is before it
        sums = _sums(model(input_ids=ids, attention_mask=seen).logits[:, :-1], labels[:, 1:])
    else:
        sums = torch.zeros(len(rows))
        for turn in range(PASSES):
            now = torch.where(torch.arange(width) % PASSES == turn, labels, IGNORED)
            hidden = torch.where(now == IGNORED, ids, own.mask_token_id)
            sums += _sums(model(input_ids=hidden, attention_mask=seen).logits, now)
    counts = (labels != IGNORED).sum(1)
    worst = math.log(model.config.vocab_size)
    return [float(s / n) if n else worst for s, n in zip(sums, counts.tolist(), strict=True)]


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of each row; of a vocabulary only where there is something to foresee."""
    at = labels != IGNORED
    losses = torch.zeros(labels.shape)
    losses[at] = cross_entropy(logits[at].float(), labels[at], reduction="none")
    return losses.sum(1)


@cache
def _tokenizer(name: str) -> Any:
    with silence_libraries():
        return load_tokenizer(name)


@cache
def _model(name: str) -> tuple[Any, bool]:
    """The model, and whether it is a masked one."""
    model: Any
    with silence_libraries():
        masked = _is_masked(name)
        model, fresh = load_masked_model(name) if masked else load_decoder(name)
    if fresh:
        raise Refused("model", name, "it comes without the head that predicts words; name a language model")
    return model.eval(), masked


def _is_masked(name: str) -> bool:
    try:
        return "MaskedLM" in " ".join(AutoConfig.from_pretrained(name).architectures or ())
    except Exception:  # whatever is wrong with it, loading the model says it better
        return False
