"""Features of texts by a pretrained model: lengths in its tokens, embeddings, and quality, the likelihood that it gives to a text.

The quality of an example is minus the mean loss (nats) of a token: of the reference answer after request and context, or of the text
itself where there are no answers, since a raw base model knows no labels. A causal model predicts each token from those before it; a
masked model every seventh token at a time, from all others (a pseudo-likelihood: Salazar et al. 2020, "Masked language model
scoring", hides one token at a time, which costs as many passes as there are tokens). Compare scores of one model only.
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
from fedloom.train.base_model import Base
from fedloom.train.library_messages import log_messages
from fedloom.train.pretrained import load_decoder, load_masked_model, load_tokenizer
from fedloom.train.tokenised import IGNORED, EncodedTexts

PASSES = 7  # of a masked model; a seventh is about the share of tokens that it learnt to fill in
ROWS = 8  # a batch; of similar length
EMBEDDED_ROWS = 32  # the same for embeddings


@torch.no_grad()
def embeddings(base: Base, texts: EncodedTexts, indices: Sequence[int]) -> Tensor:
    """Embed these examples without any adapter: means over tokens of the last hidden states, (examples, hidden size), float32.

    A last layer that computes one token only (`first_token`) has no states of the others; then the layer below it is used. Of an
    encoder-decoder they are the encoder's.
    """
    model, rows = base.model, dict[int, Tensor]()
    order = sorted(indices, key=lambda i: (len(texts.ids[i]), i))
    training = model.training
    model.eval()
    with base.without_adapter():
        for at in range(0, len(order), EMBEDDED_ROWS):
            batch = order[at : at + EMBEDDED_ROWS]
            inputs = texts.batch(batch, base.device)
            inputs.pop("labels")
            mask = inputs["attention_mask"][..., None]
            found = model(**inputs, output_hidden_states=True)
            layers = getattr(found, "hidden_states", None) or found.encoder_hidden_states
            states = next(layer for layer in reversed(layers) if layer.shape[1] == mask.shape[1])
            means = (states.float() * mask).sum(1) / mask.sum(1)
            rows |= dict(zip(batch, means.cpu(), strict=True))
    model.train(training)
    return torch.stack([rows[i] for i in indices]) if indices else torch.empty(0, 0)


@dataclass(frozen=True)
class Tokens:
    """A measure like `fedloom.data.text_measures.words`: tokens of request, context and answer by the tokenizer of this model."""

    model: str

    def __call__(self, examples: Examples) -> Sequence[float]:
        """Return the number of tokens of each example, without special tokens."""
        tokenizer = _tokenizer(self.model)
        texts = [" ".join(parts) for parts in example_texts(examples)]
        return tuple(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])) if texts else ()


@dataclass(frozen=True)
class Judged:
    """A source whose training examples carry the quality that this model gives them.

    Fields:
        source: where the examples come from.
        model: hub name or folder of the model that judges them.
    """

    source: Source = field(default_factory=Tickets)
    model: str = "distilgpt2"

    def load(self, seed: int) -> Split:
        """Load the source's split with the quality of its training examples."""
        split = self.source.load(seed)
        return replace(split, train=replace(split.train, quality=quality_scores(split.train, self.model)))


@torch.no_grad()
def quality_scores(examples: Examples, name: str, longest: int = 256) -> tuple[float, ...]:
    """Return the quality of each example, read up to `longest` tokens; one without tokens to predict gets that of a uniform guess.

    Raises:
        Refused: the model cannot be loaded, or does not predict words.
    """
    model, masked = _model(name)
    tokenizer = _tokenizer(name)
    rows = [
        _token_row(tokenizer, parts, examples.answers is not None, masked, longest) for parts in example_texts(examples)
    ]
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for at in range(0, len(order), ROWS):
        batch = order[at : at + ROWS]
        for i, loss in zip(batch, _losses(model, tokenizer, [rows[i] for i in batch], masked), strict=True):
            found[i] = -loss
    return tuple(found)


def _token_row(
    tokenizer: Any, parts: Sequence[str], answered: bool, masked: bool, longest: int
) -> tuple[list[int], int]:
    """Return token ids, and where the tokens to predict begin."""
    before, wanted = (" ".join(parts[:-1]), parts[-1]) if answered else ("", " ".join(parts))
    first = tokenizer.cls_token_id if masked else tokenizer.bos_token_id
    start = [] if first is None else [first]
    context, target = (
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (before, wanted)
    )
    target = target[: longest // 2 if context else longest - 2]
    context = context[: max(0, longest - 2 - len(target))]
    return [*start, *context, *target], len(start) + len(context)


def _losses(model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], int]], masked: bool) -> list[float]:
    """Return the mean loss of the tokens to predict in each row."""
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
            hidden = torch.where(now == IGNORED, ids, tokenizer.mask_token_id)
            sums += _sums(model(input_ids=hidden, attention_mask=seen).logits, now)
    counts = (labels != IGNORED).sum(1)
    worst = math.log(model.config.vocab_size)
    return [float(s / n) if n else worst for s, n in zip(sums, counts.tolist(), strict=True)]


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the summed loss of each row; the vocabulary's losses are computed only where a token is to be predicted."""
    at = labels != IGNORED
    losses = torch.zeros(labels.shape)
    losses[at] = cross_entropy(logits[at].float(), labels[at], reduction="none")
    return losses.sum(1)


@cache
def _tokenizer(name: str) -> Any:
    with log_messages():
        return load_tokenizer(name)


@cache
def _model(name: str) -> tuple[Any, bool]:
    """Load the model; also return whether it is a masked one."""
    model: Any
    with log_messages():
        masked = _is_masked(name)
        model, report = load_masked_model(name) if masked else load_decoder(name)
    if report.new:
        raise Refused("model", name, "it comes without the head that predicts words; name a language model")
    return model.eval(), masked


def _is_masked(name: str) -> bool:
    try:
        return "MaskedLM" in " ".join(AutoConfig.from_pretrained(name).architectures or ())
    except Exception:  # whatever is wrong with it, loading the model says it better
        return False
