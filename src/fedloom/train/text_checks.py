"""Checks that a model can read the texts of a run: all are looked at, a few go through the model, before anything is written.

What fails here would fail in the middle of a run, or go on in silence with wrong numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedloom.core.errors import Refused
from fedloom.core.text import first_line
from fedloom.train import checkpoint
from fedloom.train.base_model import Base, check_length
from fedloom.train.evaluate import generate_answers
from fedloom.train.library_messages import collect_messages, notes_of
from fedloom.train.loss import answer_logits
from fedloom.train.tokenised import EncodedTexts

UNKNOWN = 0.1
"""Largest share of unknown tokens that is not worth a note."""
ROUNDING = 0.02
"""Largest change of logits by padding, to the largest of them, that is still rounding, of kernels in bfloat16, too."""


def check_texts(base: Base, parts: Sequence[EncodedTexts], max_length: int) -> tuple[str, ...]:
    """Check that the model can read these texts; return notes, also those of the libraries.

    One padded batch of two short texts and the longest text go through the model as it is before any training. Raises Refused.
    """
    parts = [texts for texts in parts if texts.ids]
    if not parts:
        return ()
    check_length(base, max_length, max(len(row) for texts in parts for row in texts.ids))
    _check_rows(base, parts)
    _check_segments(base, parts)
    _check_end_marks(base, parts)
    with collect_messages() as messages, torch.random.fork_rng(devices=[]), torch.no_grad():
        notes = [*_unknown_notes(base, parts), *_padding_notes(base, parts[0])]
        texts = max(parts, key=lambda texts: max(map(len, texts.ids)))
        longest = max(range(len(texts.ids)), key=lambda i: len(texts.ids[i]))
        _logits(base, texts, [longest], "the longest text")
        if base.labels is None:
            _check_writing(base, parts[0])
    return (*notes, *notes_of(messages))


def _check_rows(base: Base, parts: Sequence[EncodedTexts]) -> None:
    """Raise Refused if a text has a token that the model does not know."""
    rows, tokens = checkpoint.table_rows(base.model.get_base_model()), len(base.tokenizer)
    if rows is None or tokens <= rows:
        return
    missing = {token for texts in parts for row in texts.ids for token in row if token >= rows}
    if missing:
        marks = sorted(missing.intersection(base.tokenizer.all_special_ids))
        named = ", ".join(str(base.tokenizer.convert_ids_to_tokens(mark)) for mark in marks)
        what = f"{len(missing)} that the texts use{named and f' ({named})'}"
        raise Refused("model", base.name, checkpoint.missing_rows_remedy(tokens, rows, what))


def _check_segments(base: Base, parts: Sequence[EncodedTexts]) -> None:
    """Raise Refused if a text that gets a label has no tokens, or tokens of a segment that the model does not know."""
    empty, count = sum(not row for texts in parts for row in texts.ids), sum(len(texts.ids) for texts in parts)
    if empty and base.labels is not None:
        remedy = f"its tokenizer makes no tokens of {empty} of {count} texts; leave these rows out"
        raise Refused("model", base.name, remedy)
    rows = getattr(base.model.get_base_model().config, "type_vocab_size", None)
    kinds = 1 + max(
        (kind for texts in parts for row in texts.extras.get("token_type_ids", ()) for kind in row), default=0
    )
    if isinstance(rows, int) and 0 < rows < kinds:
        remedy = f"its tokenizer tells {kinds} kinds of segments apart (token_type_ids), the model {rows}"
        mend = 'write "model_input_names": ["input_ids", "attention_mask"] into its tokenizer_config.json'
        raise Refused("model", base.name, f"{remedy}; {mend}")


def _unknown_notes(base: Base, parts: Sequence[EncodedTexts]) -> Iterator[str]:
    """Say so where the tokenizer does not know much of the texts: another language, case or model than it was made for."""
    tokenizer = base.tokenizer
    if tokenizer.unk_token_id is None or tokenizer.unk_token in (tokenizer.bos_token, tokenizer.eos_token):
        return
    unknown = sum(row.count(tokenizer.unk_token_id) for texts in parts for row in texts.ids)
    share = unknown / max(1, sum(len(row) for texts in parts for row in texts.ids))
    if share > UNKNOWN:
        yield f"{100 * share:.0f} % of the tokens of these texts are unknown to the tokenizer: the model reads {tokenizer.unk_token}."


def _check_end_marks(base: Base, parts: Sequence[EncodedTexts]) -> None:
    """Raise Refused if an encoder-decoder that chooses a label, which it reads at a text's end mark, does not find one in each text.

    All texts must hold as many (T5, BART): `</s>` inside some of them would end the run in the middle.
    """
    model: Any = base.model.get_base_model()
    if not getattr(model.config, "is_encoder_decoder", False):
        return
    end = model.config.eos_token_id
    mark, name = base.tokenizer.convert_ids_to_tokens(end), type(model).__name__
    counts = Counter(row.count(end) for texts in parts for row in texts.ids)
    (usual, most), *others = counts.most_common()
    if not usual:
        remedy = (
            f"{name} reads a text at its end mark, which the tokenizer does not write; let it end each text with {mark}"
        )
        raise Refused("model", base.name, remedy)
    if others:
        odd = f"{counts.total() - most} of {counts.total()} texts hold {mark} more or less often than the others"
        raise Refused("model", base.name, f"{name} reads a text at its end mark, and {odd}; take it out of these texts")


def _padding_notes(base: Base, texts: EncodedTexts) -> Iterator[str]:
    """Try a short text alone and padded beside a longer one: both ways it should have the same logits."""
    order = sorted(range(len(texts.ids)), key=lambda i: len(texts.ids[i]))
    short = order[0]
    longer = next((i for i in order if len(texts.ids[i]) > len(texts.ids[short])), order[-1])
    alone = _logits(base, texts, [short], "a short text")
    padded = _logits(base, texts, [short, longer], "two short texts, one of them padded")[: len(alone)]
    if len(alone) and float((alone - padded).abs().max()) > ROUNDING * float(alone.abs().max()):
        yield "Padding changes what this model computes: a short text has other logits alone than beside a longer one."


def _check_writing(base: Base, texts: EncodedTexts) -> None:
    """Raise Refused if the model cannot write two tokens for a batch of two, as its own generation settings may prevent."""
    shortest = min(range(len(texts.ids)), key=lambda i: len(texts.ids[i]))
    try:
        generate_answers(base, None, texts, [shortest, shortest], 2)
    except Exception as error:  # transformers has one for each setting
        remedy = f"it cannot write ({type(error).__name__}: {first_line(error)}); mend its generation_config.json"
        raise Refused("model", base.name, remedy) from error


def _logits(base: Base, texts: EncodedTexts, rows: Sequence[int], what: str) -> Tensor:
    """Return the logits of these texts in one batch, (rows or answer tokens, outputs). Raises Refused where there are none."""
    model, training = base.model, base.model.training
    inputs = texts.batch(rows, base.device)
    model.eval()
    try:
        with base.without_adapter():
            found = answer_logits(base, inputs) if base.labels is None else model(**inputs)
    except Exception as error:  # whatever a model raises on inputs that it was not made for
        remedy = f"it cannot read {what} ({type(error).__name__}: {first_line(error)})"
        raise Refused("model", base.name, f"{remedy}; do tokenizer and model belong together?") from error
    finally:
        model.train(training)
    logits: Tensor = found.logits.float()
    if not logits.logsumexp(-1).isfinite().all():
        remedy = f"its logits for {what} are not finite numbers"
        raise Refused("model", base.name, f"{remedy}; try device='cpu' and no bfloat16, or get the checkpoint again")
    return logits
