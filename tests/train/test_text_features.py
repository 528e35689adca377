"""What a base model thinks of texts: the same as written out by hand, whatever is in the batch beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fedloom.core.errors import Refused
from fedloom.data.examples import Examples
from fedloom.data.table import Rows
from fedloom.train.text_features import PASSES, Judged, Tokens, quality_scores


@pytest.fixture(scope="module")
def causal(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return _with_head(AutoModelForCausalLM, decoder, tmp_path_factory.mktemp("causal"))


@pytest.fixture(scope="module")
def masked(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertForMaskedLM

    folder = _with_head(BertForMaskedLM, encoder, tmp_path_factory.mktemp("masked"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.mask_token = "[UNK]"
    tokenizer.save_pretrained(folder)
    return folder


def _with_head(kind: Any, body: Path, folder: Path) -> str:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        kind.from_pretrained(body).save_pretrained(folder)
    AutoTokenizer.from_pretrained(body).save_pretrained(folder)
    return str(folder)


def dialogues() -> Examples:
    return Examples(
        ("the cat", "my dog is here", "a bird"),
        ("", "red blue", "near under the green fish now then very quite"),
        (0, 0, 0),
        ("x",),
        None,
        ("is red", "was yellow now", "there"),
    )


def test_a_causal_model_scores_the_answer_after_what_came_before(causal: str) -> None:
    """u = mean over answer tokens t of log p(t | request, context, answer before t)."""
    examples = dialogues()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(causal).eval(), AutoTokenizer.from_pretrained(causal)
    for i, told in enumerate(quality_scores(examples, causal)):
        assert examples.pairs is not None
        assert examples.answers is not None
        before = tokenizer(f"{examples.texts[i]} {examples.pairs[i]}")["input_ids"]
        answer = tokenizer(examples.answers[i], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logs = log_softmax(model(torch.tensor([before + answer])).logits[0], dim=-1)
        wanted = [float(logs[len(before) + k - 1, token]) for k, token in enumerate(answer)]
        assert told == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_a_masked_model_hides_a_seventh_at_a_time(masked: str) -> None:
    examples = Examples(("my dog is here now then very quite red cat",), None, (0,), ("x",), None)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(masked).eval(), AutoTokenizer.from_pretrained(masked)
    ids = [tokenizer.cls_token_id, *tokenizer(examples.texts[0], add_special_tokens=False)["input_ids"]]
    logs = []
    for turn in range(PASSES):
        at = [k for k in range(1, len(ids)) if k % PASSES == turn]
        hidden = [tokenizer.mask_token_id if k in at else token for k, token in enumerate(ids)]
        with torch.no_grad():
            found = log_softmax(model(torch.tensor([hidden])).logits[0], dim=-1)
        logs += [float(found[k, ids[k]]) for k in at]
    assert quality_scores(examples, masked)[0] == pytest.approx(sum(logs) / len(logs), abs=1e-4)


def test_long_and_empty_texts_are_scored(causal: str) -> None:
    examples = Examples(("cat " * 500, ""), None, (0, 0), ("x",), None)
    long, empty = quality_scores(examples, causal, longest=32)
    assert long < 0
    assert empty == pytest.approx(-torch.log(torch.tensor(29.0)).item())  # as if nothing was foreseen, of 29 tokens


def test_tokens_count_and_a_judged_source_brings_quality(causal: str) -> None:
    examples = dialogues()
    assert Tokens(causal)(examples) == (4, 9, 12)
    rows = [{"text": f"the {pet} is here", "label": pet} for pet in ("cat", "dog") * 6]
    split = Judged(Rows(rows), causal).load(0)
    assert split.train.quality == quality_scores(split.train, causal)
    assert split.test.quality is None


def test_what_predicts_no_words_is_refused(encoder: Path, decoder: Path) -> None:
    with pytest.raises(Refused, match="predict"):
        quality_scores(dialogues(), str(encoder))
    with pytest.raises(Refused, match="predicts words"):
        quality_scores(dialogues(), str(decoder))
    with pytest.raises(Refused, match="cannot be loaded"):
        Tokens("/nowhere")(dialogues())
