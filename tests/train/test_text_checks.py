"""Texts that a model cannot read are refused before a run begins."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom.core.errors import Refused
from fedloom.train.base_model import load_base
from fedloom.train.evaluate import generate_answers
from fedloom.train.settings import LoRA
from fedloom.train.text_checks import check_texts
from fedloom.train.tokenised import encode_texts
from tests.support.families import FAMILIES
from tests.support.tiny_models import tiny_encoder
from tests.support.tiny_runs import answered, examples, writer_of


def edited(model: Path, folder: Path, file: str, **fields: object) -> Path:
    """A copy of a checkpoint with other entries in one of its JSON files."""
    shutil.copytree(model, folder)
    path = folder / file
    about = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(about | fields))
    return folder


@pytest.mark.slow
def test_segments_that_the_model_does_not_know_are_refused_with_the_remedy(tmp_path: Path) -> None:
    model = tiny_encoder(tmp_path / "one", type_vocab_size=1)
    pairs = replace(examples(6), pairs=("a dog",) * 6)

    def check(folder: Path) -> tuple[str, ...]:
        base = load_base(str(folder), 2, LoRA(), 2, seed=0)
        return check_texts(base, [encode_texts(pairs, base.tokenizer, 32)], 32)

    with pytest.raises(Refused, match=r'2 kinds of segments .*, the model 1; write "model_input_names"'):
        check(model)
    names = ["input_ids", "attention_mask"]
    assert check(edited(model, tmp_path / "other", "tokenizer_config.json", model_input_names=names)) == ()


@pytest.mark.slow
def test_texts_without_tokens_are_refused_and_unknown_ones_told(decoder: Path, encoder: Path, tmp_path: Path) -> None:
    base = load_base(str(decoder), 2, LoRA(), 2, seed=0)
    texts = encode_texts(examples(6), base.tokenizer, 32)
    with pytest.raises(Refused, match="makes no tokens of 1 of 6 texts"):
        check_texts(base, [replace(texts, ids=((), *texts.ids[1:]))], 32)
    base = load_base(str(encoder), 2, LoRA(), 2, seed=0)
    odd = replace(examples(6), texts=("zebra gnu",) * 6)
    (note,) = check_texts(base, [encode_texts(odd, base.tokenizer, 32)], 32)
    assert note == "50 % of the tokens of these texts are unknown to the tokenizer: the model reads [UNK]."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("return_dict_in_generate", True),
        ("num_beams", 3),
        ("max_length", 4),
        ("prompt_lookup_num_tokens", 3),
        ("eos_token_id", "x"),
    ],
)
def test_whatever_a_model_says_of_generating_it_writes_or_is_refused_before_the_run(
    generator: Path, tmp_path: Path, setting: str, value: object
) -> None:
    base = writer_of(edited(generator, tmp_path / "own", "generation_config.json", **{setting: value}))
    texts = answered(base)
    try:
        check_texts(base, [texts], 64)
    except Refused as refused:
        assert "mend its generation_config.json" in refused.remedy  # noqa: PT017
    else:
        assert len(generate_answers(base, None, texts, [0, 1, 2], 3)) == 3


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
