"""Texts as token ids: padded on the tokenizer's side to the longest of a batch, cut at the limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.data.examples import Examples
from fedloom.train.tokenised import encode_texts
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


def test_pairs_are_told_apart(encoder: Path) -> None:
    pairs = replace(THREE, pairs=("dog", "cat", "red"))
    inputs = encode_texts(pairs, base_of(encoder).tokenizer, 32).batch([0], CPU)
    assert inputs["input_ids"].shape == (1, 5)  # [CLS] cat [SEP] dog [SEP]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
