"""What a checkpoint is: its head, labels, weights, tokens and positions; and what else may lie in the folder of a model."""

from __future__ import annotations

import io
import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
)

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.checkpoint import position_limit
from fedloom.train.pretrained import load_classifier
from fedloom.train.settings import LoRA
from fedloom.train.text_checks import check_texts
from fedloom.train.tokenised import EncodedTexts, encode_texts
from tests.support.families import FAMILIES
from tests.support.storms import tries
from tests.support.tiny_runs import answered, base_of, examples, lively, logits, writer_of

NAMES = ("bird", "cat", "dog")
HEADS = (
    "BERT",
    "ELECTRA",
    "DistilBERT",
    "MPNet",
    "ModernBERT",
    "DeBERTa-v3",
    "XLNet",
    "GPT-2",
    "T5",
    "BART",
    "Gemma 3, vision",
)
"""Families whose heads have other names or parts."""
POSITIONS = [
    *(
        "BERT",
        "RoBERTa",
        "DistilBERT",
        "MPNet",
        "DeBERTa-v2",
        "XLNet",
        "GPT-2",
        "GPT-J",
        "GPT-Neo",
        "OPT",
        "BLOOM",
        "MPT",
    ),
    *("Llama", "T5", "BART", "Gemma 3, vision"),
]
"""Families that count positions in other ways."""
UNLIKELY: tuple[Any, ...] = (
    None,
    "",
    "x",
    0,
    -1,
    1.5,
    True,
    [],
    [1, 2],
    {},
    {"0": None},
    {"1": "pet", "2": "dog"},
    {"0": ["a"], "1": 2},
    10**6,
)
"""Values that a hand-edited JSON file may hold anywhere."""


def copied(model: Path, folder: Path, **config: Any) -> Path:
    """The same checkpoint with other entries in its config.json."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def fine_tuned(encoder: Path, folder: Path, kind: Any = BertForSequenceClassification, **config: Any) -> Path:
    """The encoder with a head that somebody trained."""
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        kind.from_pretrained(encoder, **config).save_pretrained(folder)
    return folder


def named(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}


def base_for(model: Path, names: tuple[str, ...], seed: int = 3) -> Base:
    return load_base(str(model), len(names), LoRA(("query",)), 2, seed, label_names=names)


def head_of(model: Path) -> torch.Tensor:
    weight: torch.Tensor = AutoModelForSequenceClassification.from_pretrained(model).classifier.weight.detach()
    return weight


def refusal_of(model: Path, labels: int | None = 2, **more: Any) -> str:
    with pytest.raises(Refused) as caught:
        load_base(str(model), labels, LoRA(), 2, 3, **more)
    assert caught.value.field == "model"
    return str(caught.value)


# The head ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", HEADS)
def test_a_head_is_trained_whole_whether_the_checkpoint_has_one_or_not(family: str, tmp_path: Path) -> None:
    bare = FAMILIES[family].save(tmp_path / "bare")
    model, _ = load_classifier(str(bare), 2)
    tuned = shutil.copytree(bare, tmp_path / "tuned")
    model.save_pretrained(tuned)
    outside = {id(p) for p in model.parameters()} - {id(p) for p in model.base_model.parameters()}
    head = {name for name, parameter in model.named_parameters() if id(parameter) in outside}
    assert head
    for folder in (bare, tuned):
        base = load_base(str(folder), 2, LoRA(), 2, 3)
        assert set(initial_adapter(base, 2).dense) == head
        factors = initial_adapter(base, 2).factors
        assert not [name for name in factors if any(key.startswith(f"{name}.") for key in head)]


@pytest.mark.slow
@pytest.mark.parametrize("order", [*permutations(NAMES)][::2])
def test_a_head_with_the_names_of_the_data_is_used_in_its_own_order(
    encoder: Path, tmp_path: Path, order: tuple[str, ...]
) -> None:
    model = fine_tuned(encoder, tmp_path, **named(tuple(f" {name.upper()}" for name in order)))
    base = base_for(model, NAMES)
    assert base.label_names == order
    assert torch.equal(initial_adapter(base, 2).dense["classifier.weight"], head_of(model))
    assert bool(base.notes) == (order != NAMES)
    assert base_for(model, order).label_names == order  # as a site asks it, by the order that the run has


def test_a_head_without_names_is_used_by_number_and_told(encoder: Path, tmp_path: Path) -> None:
    model = fine_tuned(encoder, tmp_path, num_labels=3)
    base = base_for(model, NAMES)
    assert base.label_names == NAMES
    assert "0 is 'bird', 1 is 'cat', 2 is 'dog'" in base.notes[0]
    assert torch.equal(initial_adapter(base, 2).dense["classifier.weight"], head_of(model))


@pytest.mark.slow
def test_names_that_transformers_drops_are_the_checkpoints_all_the_same(encoder: Path, tmp_path: Path) -> None:
    """Of a config.json with `label2id` alone transformers makes LABEL_0, LABEL_1, ..."""
    tuned = fine_tuned(encoder, tmp_path / "tuned", num_labels=3)
    model = copied(tuned, tmp_path / "edited", label2id={"dog": 0, "Bird": 1, "cat": 2})
    assert base_for(model, NAMES).label_names == ("dog", "bird", "cat")


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["classifier.dense.weight", "classifier.out_proj.bias"])
def test_a_head_of_which_a_part_is_missing_is_told(tmp_path: Path, lost: str) -> None:
    family = FAMILIES["RoBERTa"].save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(family, num_labels=2)
    model.save_pretrained(family, state_dict={k: v for k, v in model.state_dict().items() if k != lost})
    assert f"lacks a part of its head, which starts anew: {lost}." in " ".join(base_for(family, ("a", "b")).notes)


@pytest.mark.slow
def test_case_counts_where_labels_differ_by_it_alone(encoder: Path, tmp_path: Path) -> None:
    base = base_for(fine_tuned(encoder, tmp_path, **named(("pet", "Pet", "dog"))), ("Pet", "dog", "pet"))
    assert base.label_names == ("pet", "Pet", "dog")


@pytest.mark.slow
def test_labels_that_are_numbers_number_the_outputs(encoder: Path, tmp_path: Path) -> None:
    base = base_for(fine_tuned(encoder, tmp_path, **named(("low", "middle", "high"))), ("2", "0", "1"))
    assert base.label_names == ("0", "1", "2")
    assert "by number" in base.notes[0]


@pytest.mark.slow
def test_a_head_for_other_labels_starts_anew_from_the_seed(encoder: Path, tmp_path: Path) -> None:
    model = fine_tuned(encoder, tmp_path, **named(("good", "bad", "ugly")))
    heads = [initial_adapter(base_for(model, NAMES, seed), 2).dense["classifier.weight"] for seed in (3, 3, 4)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], head_of(model))
    assert 0.1 < float(heads[0].std()) < 0.3  # as transformers draws it: initializer_range 0.2
    assert "other labels apart (good, bad, ugly)" in base_for(model, NAMES).notes[0]


@pytest.mark.slow
@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_a_head_of_another_number_of_labels_starts_anew_and_both_are_told(
    encoder: Path, tmp_path: Path, outputs: int
) -> None:
    base = base_for(fine_tuned(encoder, tmp_path, num_labels=outputs), NAMES)
    assert f"head has {outputs} outputs, the data 3 labels" in " ".join(base.notes)
    assert initial_adapter(base, 2).dense["classifier.weight"].shape == (3, 32)


@pytest.mark.slow
def test_names_of_another_number_than_the_head_has_outputs_do_not_count(encoder: Path, tmp_path: Path) -> None:
    tuned = fine_tuned(encoder, tmp_path / "tuned", num_labels=3)
    model = copied(tuned, tmp_path / "short", **named(("dog", "cat")))
    assert base_for(model, NAMES).label_names == NAMES
    assert "head has 3 outputs, the data 2 labels" in base_for(model, ("cat", "dog")).notes[0]


@pytest.mark.slow
def test_a_head_for_another_task_starts_anew(encoder: Path, tmp_path: Path) -> None:
    model = fine_tuned(encoder, tmp_path, BertForTokenClassification, num_labels=3)
    base = base_for(model, NAMES)
    assert "BertForTokenClassification" in base.notes[0]
    assert not torch.equal(initial_adapter(base, 2).dense["classifier.weight"], head_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_a_checkpoint_for_another_loss_is_trained_with_one_label_for_a_text(
    encoder: Path, tmp_path: Path, kind: str
) -> None:
    model = copied(
        fine_tuned(encoder, tmp_path / "one", num_labels=3), tmp_path / "two", problem_type=kind, return_dict=False
    )
    base = base_for(model, NAMES)
    assert kind in base.notes[0]
    inputs = {"input_ids": torch.tensor([[2, 9, 3]]), "labels": torch.tensor([1])}
    found = base.model.eval()(**inputs)
    assert found.loss.item() == pytest.approx(-found.logits.log_softmax(-1)[0, 1].item(), rel=1e-5)


@pytest.mark.slow
def test_an_ordinary_checkpoint_has_no_notes(encoder: Path, decoder: Path, generator: Path) -> None:
    assert base_for(encoder, NAMES).notes == base_of(decoder).notes == writer_of(generator).notes == ()


@pytest.mark.slow
def test_a_decoder_is_read_whatever_its_configuration_says_of_outputs(generator: Path, tmp_path: Path) -> None:
    base = writer_of(copied(generator, tmp_path, return_dict=False, output_hidden_states=True))
    assert check_texts(base, [answered(base)], 64) == ()


@pytest.mark.slow
def test_a_new_head_that_writes_is_told(decoder: Path) -> None:
    assert "no head that writes" in writer_of(decoder).notes[0]


# The weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("layer", ["bert.encoder.layer.1.output.dense.weight", "classifier.bias"])
def test_weights_that_are_not_finite_are_refused_by_layer(
    encoder: Path, tmp_path: Path, layer: str, value: str
) -> None:
    model = BertForSequenceClassification.from_pretrained(encoder)
    model.get_parameter(layer).data.view(-1)[0] = float(value)
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    text = refusal_of(tmp_path)
    assert "not all of its weights are finite" in text
    assert layer in text


def test_weights_of_another_architecture_are_refused(encoder: Path, decoder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    shutil.copy(decoder / "model.safetensors", model)
    assert "not of the architecture" in refusal_of(model)


@pytest.mark.slow
def test_weights_that_the_architecture_has_no_place_for_are_refused_or_told(tmp_path: Path) -> None:
    """transformers leaves them out: Qwen2 as a Llama computes without its biases, Gemma 2 as a Gemma without half of its norms."""
    qwen = copied(FAMILIES["Qwen2"].save(tmp_path / "qwen"), tmp_path / "llama", model_type="llama")
    assert "LlamaForCausalLM has no model.layers.0.self_attn.k_proj.bias" in refusal_of(qwen, labels=None)
    gemma = copied(FAMILIES["Gemma 2"].save(tmp_path / "gemma2"), tmp_path / "gemma", model_type="gemma")
    assert (
        "GemmaForCausalLM does not use: model.layers.0.post_feedforward_layernorm.weight" in writer_of(gemma).notes[0]
    )


@pytest.mark.slow
def test_a_wrapper_that_was_saved_with_the_model_is_refused_by_its_name(encoder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    weights = load_file(model / "model.safetensors")
    save_file({f"module.{name}": weight for name, weight in weights.items()}, model / "model.safetensors")
    assert "begin with 'module.'" in refusal_of(model)


@pytest.mark.slow
def test_a_block_that_is_missing_is_refused_and_one_too_many_told(encoder: Path, tmp_path: Path) -> None:
    text = refusal_of(copied(encoder, tmp_path / "more", num_hidden_layers=3))
    assert "incomplete: bert.encoder.layer.2." in text
    assert (
        "more blocks than its config.json" in base_of(copied(encoder, tmp_path / "less", num_hidden_layers=1)).notes[0]
    )


@pytest.mark.slow
def test_weights_of_another_size_are_refused_with_both_sizes(encoder: Path, generator: Path, tmp_path: Path) -> None:
    assert "is 64, by the configuration 96" in refusal_of(copied(encoder, tmp_path / "one", intermediate_size=96))
    text = refusal_of(copied(generator, tmp_path / "other", vocab_size=99), labels=None)
    assert "x 32, by the configuration 99 x 32" in text


@pytest.mark.slow
def test_a_fold_into_an_adapted_tied_head_leaves_the_embedding_as_it_is(generator: Path) -> None:
    base = writer_of(generator, target_modules=("q_proj", "lm_head"))
    assert "lm_head shares its weights" in base.notes[0]
    texts, nothing = answered(base, 6), initial_adapter(base, 4)
    adapter = lively(nothing)
    before = base.model.get_input_embeddings().weight.clone()
    wanted = logits(base, adapter, texts)
    base.put(nothing, fold=Adapter(adapter.factors))
    inputs = texts.batch(range(6), base.device)
    inputs.pop("labels")
    with torch.no_grad():
        assert torch.allclose(base.model.eval()(**inputs).logits, wanted, atol=1e-5)
    assert torch.equal(base.model.get_input_embeddings().weight, before)
    assert not torch.allclose(wanted, logits(base, nothing, texts), atol=1e-2)


# Tokens and positions -----------------------------------------------------------------------------------------------------


def with_tokens(model: Path, folder: Path, **names: Any) -> Path:
    """The same checkpoint with tokens that its embedding has no rows for."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(names)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_pad_token_without_a_row_is_refused_with_both_sizes(decoder: Path, tmp_path: Path) -> None:
    rows = LlamaForCausalLM.from_pretrained(decoder).config.vocab_size
    text = refusal_of(with_tokens(decoder, tmp_path, pad_token="[PAD]"))
    assert f"tokenizer has {rows + 1} tokens, its embedding {rows} rows, none for its pad token" in text


@pytest.mark.slow
def test_tokens_without_a_row_are_refused_only_where_a_text_has_one(generator: Path, tmp_path: Path) -> None:
    base = writer_of(with_tokens(generator, tmp_path, additional_special_tokens=["<|user|>"]))
    assert "the tokens without one are not used" in base.notes[0]
    assert check_texts(base, [answered(base)], 64) == ()
    new = len(base.tokenizer) - 1
    texts = EncodedTexts(((1, 5, 2), (1, new, 2)), {}, (0, 0), 3, False, (1, 1))
    with pytest.raises(Refused, match=r"none for 1 that the texts use \(<\|user\|>\)"):
        check_texts(base, [texts], 64)


@pytest.mark.slow
def test_a_classifier_that_finds_the_end_of_a_text_by_its_padding_needs_a_pad_token(
    decoder: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(decoder, tmp_path, dirs_exist_ok=True) / "tokenizer_config.json"
    about = json.loads(path.read_text())
    path.write_text(
        json.dumps({name: value for name, value in about.items() if name not in ("eos_token", "bos_token")})
    )
    assert "batches are filled with <unk>" in base_of(tmp_path).notes[0]
    path.write_text(json.dumps({name: value for name, value in about.items() if not name.endswith("_token")}))
    assert "neither a pad token nor an end mark" in refusal_of(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", POSITIONS)
def test_a_text_as_long_as_there_are_positions_is_read_and_a_longer_one_is_not(family: str, tmp_path: Path) -> None:
    base = load_base(str(FAMILIES[family].save(tmp_path)), 2, LoRA(), 2, 3)
    limit = position_limit(base.model.get_base_model())  # type: ignore[arg-type]
    end = base.tokenizer.eos_token_id or 6
    longest = limit or 200

    def texts(tokens: int) -> EncodedTexts:
        rows = tuple((*[5] * (n - 1), end) for n in (3, 7, tokens))
        return EncodedTexts(
            rows, {}, (0, 1, 0), base.tokenizer.pad_token_id or 0, base.tokenizer.padding_side == "left"
        )

    assert not [note for note in check_texts(base, [texts(longest)], longest) if "Padding" in note]
    if limit is not None:
        with pytest.raises(Refused, match=f"the model reads {limit}"):
            check_texts(base, [texts(limit + 1)], limit + 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "GPT-2", "BART", "Llama", "XLNet", "T5"])
def test_padding_changes_no_prediction_whatever_side_the_tokenizer_pads_on(family: str, tmp_path: Path) -> None:
    path = FAMILIES[family].save(tmp_path) / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    base = load_base(str(tmp_path), 2, LoRA(), 2, 3)
    row = base.tokenizer("a dog is here")["input_ids"]
    rows = (tuple(row), (*row[:1], *row[1:2] * 9, *row[1:]))
    texts = EncodedTexts(rows, {}, (0, 1), base.tokenizer.pad_token_id or 0, base.tokenizer.padding_side == "left")
    one, both = (texts.batch(at, base.device) for at in ([0], [0, 1]))
    with torch.no_grad():
        alone, padded = (base.model.eval()(**{**i, "labels": None}).logits[0] for i in (one, both))
    assert torch.allclose(alone, padded, atol=1e-4)
    assert base.tokenizer.padding_side == ("left" if family in ("Llama", "XLNet") else "right")
    assert bool(base.notes) == (base.tokenizer.padding_side == "right") or family == "XLNet"


# What else may lie in the folder ------------------------------------------------------------------------------------------


def emptied(folder: Path, *files: str) -> Path:
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
    return folder


def test_what_is_no_checkpoint_is_refused_by_what_it_is(encoder: Path, tmp_path: Path) -> None:
    adapter = emptied(tmp_path / "adapter", "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert f"give model='org/base', and start={str(adapter)!r}" in refusal_of(adapter)
    run = emptied(tmp_path / "run")
    (run / "manifest.json").write_text('{"model": {"name": "org/base"}}')
    assert f"folder of a run, not a model: give model='org/base', and start={str(run)!r}" in refusal_of(run)
    assert "GGUF" in refusal_of(emptied(tmp_path / "gguf", "base.Q4.gguf"))
    (adapter / "adapter_config.json").write_text(
        '{"base_model_name_or_path": "org/base", "peft_type": "PROMPT_TUNING"}'
    )
    assert "no run goes on from an adapter of the kind PROMPT_TUNING" in refusal_of(adapter)
    assert f"it is a file; give the folder of the checkpoint: {adapter}" in refusal_of(adapter / "adapter_config.json")
    assert "without the config.json" in refusal_of(emptied(tmp_path / "weights", "model.safetensors", "tokenizer.json"))
    pointer = emptied(tmp_path / "pointer", "config.json")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "pointer of Git LFS" in refusal_of(pointer)
    assert "only a tokenizer" in refusal_of(emptied(tmp_path / "words", "tokenizer.json"))
    assert "config.json without" in refusal_of(emptied(tmp_path / "outline", "config.json"))
    for number in (20, 100):
        shutil.copytree(encoder, tmp_path / "trainer" / f"checkpoint-{number}")
    assert refusal_of(tmp_path / "trainer").endswith("checkpoint-100")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "bitsandbytes"])
def test_quantised_weights_are_refused_in_one_sentence(encoder: Path, tmp_path: Path, method: str) -> None:
    model = copied(encoder, tmp_path, quantization_config={"quant_method": method, "bits": 4})
    assert f"its weights are quantised ({method})" in refusal_of(model)


def test_an_adapter_beside_a_whole_model_is_refused_too(encoder: Path, tmp_path: Path) -> None:
    """transformers would load the base that the adapter names, and the adapter on it, without a word."""
    shutil.copytree(encoder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert "it is an adapter of org/base" in refusal_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert "move adapter_config.json and adapter_model.safetensors into a folder of their own" in refusal_of(tmp_path)


def test_code_of_a_checkpoint_is_neither_run_nor_offered_to_run(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers asks at the terminal where it is not told."""
    model = copied(
        encoder, tmp_path / "own", model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"}
    )
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert "program code of its own, which is not run" in refusal_of(model)
    assert not (tmp_path / "ran").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["T5", "BART"])
def test_an_encoder_decoder_does_not_write(family: str, tmp_path: Path) -> None:
    assert "an encoder-decoder is trained to choose a label" in refusal_of(FAMILIES[family].save(tmp_path), None)


@pytest.mark.slow
@tries(60)
@given(
    file=st.sampled_from(["config.json", "config.json", "tokenizer_config.json"]),
    more=st.sampled_from(
        ["id2label", "label2id", "problem_type", "architectures", "num_labels", "padding_side", "pad_token"]
    ),
    place=st.integers(0, 60),
    value=st.sampled_from(UNLIKELY),
)
def test_whatever_the_files_of_a_checkpoint_say_it_is_used_or_refused(
    encoder: Path, tmp_path_factory: pytest.TempPathFactory, file: str, more: str, place: int, value: Any
) -> None:
    model = fine_tuned(encoder, tmp_path_factory.mktemp("edited"), **named(("cat", "dog")))
    about = json.loads((model / file).read_text())
    fields = [more, *about]
    (model / file).write_text(json.dumps({**about, fields[place % len(fields)]: value}))
    try:
        base = base_for(model, ("dog", "cat"))
        check_texts(base, [encode_texts(examples(6), base.tokenizer, 32)], 32)
    except Refused as refused:
        assert "\n" not in str(refused)  # noqa: PT017  # what it says, whatever it is
