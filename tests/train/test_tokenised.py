"""Texts as token ids: padded on the tokenizer's side to the longest of a batch, cut at the limit."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedloom.data.examples import Examples
from fedloom.train.chat_template import FitCounts, fit_notes
from fedloom.train.tokenised import encode_texts, longest_of
from tests.support.storms import tries
from tests.support.tiny_models import WORDS
from tests.support.tiny_runs import base_of, examples

CPU = torch.device("cpu")
THREE = Examples(("cat", "the red dog", "a a a a a a a a"), None, (1, 0, 1), ("x", "y"), None)


def test_batches_are_padded_right_to_their_longest(encoder: Path) -> None:
    inputs = encode_texts(THREE, base_of(encoder).tokenizer, 32).batch([1, 0], CPU)
    assert inputs["input_ids"].shape == (2, 5)  # [CLS] the red dog [SEP]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert inputs["input_ids"][1, 3:].tolist() == [0, 0]
    assert inputs["labels"].tolist() == [0, 1]


def test_batches_are_padded_left_where_the_tokenizer_does_so(encoder: Path) -> None:
    tokenizer = base_of(encoder).tokenizer
    tokenizer.padding_side = "left"
    inputs = encode_texts(THREE, tokenizer, 32).batch([1, 0], CPU)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert inputs["input_ids"][1, :2].tolist() == [0, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_our_batches_are_what_the_tokenizer_would_make(request: pytest.FixtureRequest, kind: str, side: str) -> None:
    tokenizer = base_of(request.getfixturevalue(kind)).tokenizer
    tokenizer.padding_side = side
    some = examples(8)
    ours = encode_texts(some, tokenizer, 9).batch(range(8), CPU)
    theirs = tokenizer(list(some.texts), truncation=True, max_length=9, padding=True, return_tensors="pt")
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_texts_are_cut_at_the_limit_and_lengths_count_no_padding(encoder: Path) -> None:
    texts = encode_texts(THREE, base_of(encoder).tokenizer, 6)
    assert texts.lengths([0, 1, 2]) == [3, 5, 6]


def test_the_note_says_which_end_is_cut(encoder: Path) -> None:
    tokenizer = copy.deepcopy(base_of(encoder).tokenizer)
    tokenizer.truncation_side = "left"
    counts = encode_texts(THREE, tokenizer, 5).fit_counts
    assert counts == FitCounts(3, text_beginning=1)
    assert "the beginning of the text is cut off" in fit_notes(5, {"test": counts})[0]


def test_pairs_are_told_apart(encoder: Path) -> None:
    pairs = replace(THREE, pairs=("dog", "cat", "red"))
    inputs = encode_texts(pairs, base_of(encoder).tokenizer, 32).batch([0], CPU)
    assert inputs["input_ids"].shape == (1, 5)  # [CLS] cat [SEP] dog [SEP]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]


words = st.lists(st.sampled_from([*WORDS, "[SEP]", "half \ud83d"]), min_size=1, max_size=12).map(" ".join)


@given(texts=st.lists(st.tuples(words, words), min_size=1, max_size=6), limit=st.integers(5, 24), paired=st.booleans())
@tries(30)
def test_what_is_cut_is_counted_and_what_is_long_enough_changes_nothing(
    encoder: Path, texts: list[tuple[str, str]], limit: int, paired: bool
) -> None:
    """Against the tokenizer without a limit; at the length that `longest_of` finds, all texts have the tokens of the larger limit."""
    tokenizer = _tokenizer(encoder)
    one, other = zip(*texts, strict=True)
    some = Examples(one, other if paired else None, (0,) * len(texts), ("x", "y"), None)
    found = encode_texts(some, tokenizer, limit)
    clean = [[text.replace("\ud83d", "\N{REPLACEMENT CHARACTER}") for text in column] for column in (one, other)]
    whole = tokenizer(*clean[: 1 + paired])["input_ids"]
    read = texts if paired else [(text, "") for text in one]
    assert found.fit_counts == FitCounts(
        len(texts),
        text=sum(len(row) > limit for row in whole),
        special_tokens=sum("[SEP]" in "".join(row) for row in read),
        replaced_characters=sum("\ud83d" in "".join(row) for row in read),
    )
    assert [len(row) for row in found.ids] == [min(limit, len(row)) for row in whole]
    enough = longest_of([found, encode_texts(some.take(()), tokenizer, limit)], limit)
    assert max(map(len, found.ids)) <= enough <= limit
    again = encode_texts(some, tokenizer, enough)
    assert (again.ids, again.extras) == (found.ids, found.extras)


@cache
def _tokenizer(model: Path) -> Any:
    return AutoTokenizer.from_pretrained(model)


@pytest.mark.slow
def test_a_tokenizer_that_draws_draws_no_more(encoder: Path, tmp_path: Path) -> None:
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=34, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )
    made.model.dropout = 0.5  # type: ignore[attr-defined]
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    kind: Any = PreTrainedTokenizerFast  # untyped
    kind(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    drawn: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert len({tuple(drawn("yellow horse")["input_ids"]) for _ in range(50)}) > 1, "the tokenizer draws"
    base = base_of(tmp_path)
    assert len({encode_texts(examples(), base.tokenizer, 64).ids for _ in range(5)}) == 1
    assert any("BPE dropout" in note for note in base.notes)
