"""Texts that a model cannot read are refused before a run begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.train.base_model import load_base
from fedloom.train.settings import LoRA
from fedloom.train.text_checks import check_texts
from fedloom.train.tokenised import encode_texts
from tests.support.families import FAMILIES
from tests.support.tiny_runs import examples


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_an_encoder_decoder_reads_a_label_at_the_only_end_mark_of_a_text(name: str, tmp_path: Path) -> None:
    folder, few = FAMILIES[name].save(tmp_path), examples(6)
    base = load_base(str(folder), 2, LoRA(), 2, seed=0)
    assert check_texts(base, [encode_texts(few, base.tokenizer, 32)], 32) == ()
    marked = replace(few, texts=("the cat </s> is here", *few.texts[1:]))
    with pytest.raises(Refused, match=r"reads a text at its end mark, and 1 of 6 texts hold </s> more or less often"):
        check_texts(base, [encode_texts(marked, base.tokenizer, 32)], 32)
    rules = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(rules | {"post_processor": None}))
    base = load_base(str(folder), 2, LoRA(), 2, seed=0)
    with pytest.raises(Refused, match="which the tokenizer does not write; let it end each text with </s>"):
        check_texts(base, [encode_texts(few, base.tokenizer, 32)], 32)
