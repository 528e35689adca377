"""Greedy generation of answers, and metrics of them against the reference answers (exact match, ROUGE-L)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from fedloom.core.lora import Adapter
from fedloom.train.base_model import Base, most_tokens
from fedloom.train.chat_template import PromptFormat
from fedloom.train.pretrained import silence_libraries
from fedloom.train.tokenised import EncodedTexts

BATCH = 16
"""Answers generated together; a row that has ended waits for the others."""

NUMBER = re.compile(r"####\s*([-+]?[\d,.]*\d)")
"""The result of a worked answer, as GSM8K marks it (Cobbe et al., arXiv 2110.14168)."""


@torch.no_grad()
def generate_answers(
    base: Base,
    adapter: Adapter | None,
    texts: EncodedTexts,
    indices: Sequence[int],
    most: int,
    fold: Adapter | None = None,
) -> list[str]:
    """Answer these examples' requests greedily in at most `most` tokens, with the adapter over base and fold, or the base alone."""
    assert texts.answer_starts is not None
    requests = [texts.ids[i][: texts.answer_starts[i]] for i in indices]
    if adapter is None:
        with base.without_adapter():
            return _generate(base, requests, texts.pad, most)
    base.activate(adapter, fold=fold)
    return _generate(base, requests, texts.pad, most)


def _generate(base: Base, requests: Sequence[Sequence[int]], pad: int, most: int) -> list[str]:
    model: Any = base.model.eval().get_base_model()
    tokenizer: Any = base.tokenizer
    order = sorted(range(len(requests)), key=lambda i: len(requests[i]))
    answers, ends = dict[int, str](), _end_marks(model, tokenizer)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        width = max(len(requests[i]) for i in chosen)
        filled = [[pad] * (width - len(requests[i])) + list(requests[i]) for i in chosen]
        mask = [[0] * (width - len(requests[i])) + [1] * len(requests[i]) for i in chosen]
        with silence_libraries():
            rows = model.generate(
                input_ids=torch.tensor(filled, device=base.device),
                attention_mask=torch.tensor(mask, device=base.device),
                max_new_tokens=min(most, most_tokens(base, width + most) - width),
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                eos_token_id=ends or None,
            )
        for i, row in zip(chosen, rows, strict=True):
            answers[i] = tokenizer.decode(row[width:], skip_special_tokens=True).strip()
    return [answers[i] for i in range(len(requests))]


def _end_marks(model: Any, tokenizer: Any) -> list[int]:
    """Return the marks that end an answer: the model's own, and those that the references end with."""
    model_marks = model.generation_config.eos_token_id
    return sorted(
        {
            *(model_marks if isinstance(model_marks, list) else [model_marks]),
            *PromptFormat.for_tokenizer(tokenizer).end_marks,
        }
        - {None}
    )


def answer_metrics(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return exact match and ROUGE-L (F1 of the longest common subsequence of words; Lin 2004, section 3), means over the answers."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    pairs = [*zip(written, references, strict=True)]
    overlaps = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    count = max(1, len(pairs))
    return {"exact_match": sum(exact_match(*pair) for pair in pairs) / count, "rouge_l": sum(overlaps) / count}


def exact_match(text: str, reference: str) -> bool:
    """Whether an answer is right: it has the number behind `####` where the reference has one, else the same words.

    >>> exact("2 + 2 = 4, so\\n#### 1,004.0", "#### 1004"), exact("Yes, Paris.", "yes paris"), exact("42", "#### 42")
    (True, True, False)
    """
    wanted = worked_result(reference)
    if wanted is not None:
        return worked_result(text) == wanted
    return (scored_words(text) or text.split()) == (scored_words(reference) or reference.split())


def worked_result(text: str) -> float | None:
    """Return the number behind the last `####`; None where there is none."""
    numbers = NUMBER.findall(text)
    try:
        return float(numbers[-1].replace(",", "")) if numbers else None
    except ValueError:  # 1.2.3
        return None


def scored_words(text: str) -> list[str]:
    """Split a text of any script into words, without case and punctuation.

    >>> words("It's  Zürich!")
    ['it', 's', 'zürich']
    """
    return re.findall(r"\w+", text.casefold())


class _WordTokenizer:
    """Our words for rouge_score, whose own tokenizer knows Latin letters only."""

    def tokenize(self, text: str) -> list[str]:
        return scored_words(text)
