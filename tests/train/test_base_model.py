"""Loading a base: one copy of its weights for all ranks, heads found, and refusals that name the remedy."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import ModulesToSaveWrapper
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from fedloom.core.errors import Refused
from fedloom.core.lora import Adapter, cut_factor
from fedloom.core.types import ClientState
from fedloom.train import base_model, peft_weights
from fedloom.train.base_model import Base, initial_adapter, load_base
from fedloom.train.engine import linear_kernel
from fedloom.train.evaluate import score
from fedloom.train.export import save_merged
from fedloom.train.pretrained import four_bit_arguments, reads_ahead
from fedloom.train.settings import Engine, LoRA
from fedloom.train.tokenised import encode_texts
from tests.support.tiny_models import SIZES, WORDS
from tests.support.tiny_runs import (
    answered,
    base_of,
    examples,
    lively,
    logits,
    same,
    still,
    task_of,
    trainer_of,
    writing_trainer,
)


def other(model: Any, encoder: Path, folder: Path) -> Path:
    """A model of another architecture with the tiny encoder's tokenizer."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, folder / name)
    return folder


def refusal(model: Path | str, rank: int = 2, **lora: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        load_base(str(model), 2, LoRA(**lora), rank, seed=0)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_second_rank_adds_no_second_base(encoder: Path) -> None:
    base = base_of(encoder, rank=2)
    before = {name: p.data_ptr() for name, p in base.model.named_parameters()}
    total = sum(p.numel() for p in base.model.parameters())
    base.put(initial_adapter(base, 8))
    extra = sum(p.numel() for p in base.model.parameters()) - total
    assert extra == base.shape().adapter_parameters(8) + base.shape().dense
    after = {name: p.data_ptr() for name, p in base.model.named_parameters()}
    assert all(after[name] == pointer for name, pointer in before.items())


def test_one_seed_is_one_start_and_the_generator_of_others_stays(encoder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, two = (initial_adapter(base_of(encoder), 4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two)
    assert not same(one, initial_adapter(load_base(str(encoder), 2, LoRA(), 4, seed=4), 4))


def test_the_shape_counts_each_weight_once(encoder: Path) -> None:
    shape = base_of(encoder).shape()
    assert shape.modules == ((32, 32),) * 4  # query and value of two layers
    assert shape.dense == 2 * 32 + 2
    assert shape.embeddings == 32 * (len(WORDS) + 4 + 64 + 2)  # words and marks, positions, segments
    assert (shape.layers, shape.hidden) == (2, 32)


def test_a_decoder_without_a_pad_token_pads_with_its_end_token(decoder: Path) -> None:
    base = base_of(decoder)
    assert base.tokenizer.pad_token == base.tokenizer.eos_token == "</s>"
    texts = encode_texts(examples(6), base.tokenizer, 32)
    together = logits(base, initial_adapter(base, 4), texts)
    for i in range(6):  # padding changes no prediction
        inputs = texts.batch([i], base.device)
        inputs.pop("labels")
        assert torch.allclose(base.model(**inputs).logits[0], together[i], atol=1e-5)


def test_every_new_layer_of_a_head_is_trained(encoder: Path, tmp_path: Path) -> None:
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 64}
    config = DistilBertConfig(vocab_size=len(WORDS) + 4, pad_token_id=0, **sizes)
    base = base_of(other(DistilBertModel(config), encoder, tmp_path), target_modules=("q_lin", "v_lin"))
    kinds = {name.rpartition(".")[0] for name in initial_adapter(base, 4).dense}
    assert kinds == {"pre_classifier", "classifier"}


def test_a_pooler_that_the_checkpoint_lacks_is_part_of_the_head(encoder: Path, tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(vocab_size=len(WORDS) + 4, pad_token_id=0, **SIZES))
    base = base_of(other(model, encoder, tmp_path))
    assert {name.rpartition(".")[0] for name in initial_adapter(base, 4).dense} == {"bert.pooler.dense", "classifier"}


def test_conv1d_layers_can_be_adapted_at_several_ranks(encoder: Path, tmp_path: Path) -> None:
    config = GPT2Config(
        vocab_size=len(WORDS) + 4, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3
    )
    base = base_of(other(GPT2Model(config), encoder, tmp_path))
    assert base.shape().modules == ((96, 32),)
    base.put(initial_adapter(base, 8))


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere" / "here").remedy


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    assert "holds no model" in refusal(tmp_path).remedy


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_corrupt_file_of_the_model_is_refused(encoder: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(encoder, tmp_path / "model")
    (broken / name).write_bytes(b"\x00junk" * 9)
    assert refusal(broken).field == "model"


def test_a_model_without_a_tokenizer_is_refused(encoder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(encoder, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in refusal(bare).remedy


@pytest.mark.parametrize("targets", [("qurey",), ("query", "nonsense"), ("LayerNorm",), ()])
def test_an_unknown_target_module_is_refused_with_those_there_are(encoder: Path, targets: tuple[str, ...]) -> None:
    refused = refusal(encoder, target_modules=targets)
    assert refused.field == "lora.target_modules"
    assert "dense, key, query, value" in refused.remedy
    assert "lora_" not in refused.remedy


def test_embeddings_are_no_target(encoder: Path) -> None:
    assert "only linear layers" in refusal(encoder, target_modules=("word_embeddings",)).remedy


def test_a_rank_above_the_smaller_side_is_refused(encoder: Path, decoder: Path) -> None:
    assert "at most 32" in refusal(encoder, rank=33).remedy
    assert "at most 16" in refusal(decoder, rank=17).remedy  # Llama's v_proj is 16 x 32
    load_base(str(decoder), 2, LoRA(), 16, seed=0)


def written_by(model: Path, **engine: Any) -> Base:
    return load_base(str(model), None, LoRA(dropout=0.0), 4, seed=3, engine=Engine("torch", **engine))


def test_a_model_that_writes_has_no_head_of_its_own_and_pads_right(generator: Path) -> None:
    base = written_by(generator)
    assert initial_adapter(base, 4).dense == {}
    assert base.tokenizer.padding_side == "right"
    assert base.vocabulary == len(WORDS) + 4
    assert base.computation["first_token"] is False


def test_a_tied_head_counts_as_what_it_costs(generator: Path) -> None:
    shape, head = written_by(generator).shape(), 32 * (len(WORDS) + 4)
    assert shape.embeddings == 0
    model = written_by(generator).model
    own = sum(p.numel() for n, p in model.get_base_model().named_parameters() if "lora_" not in n)
    assert shape.parameters == own > head


def test_a_checkpoint_without_a_head_to_write_with_gets_one_that_is_trained(decoder: Path) -> None:
    assert [*initial_adapter(written_by(decoder), 4).dense] == ["lm_head.weight"]


def test_a_classifier_of_a_kind_that_can_write_may_be_named(generator: Path, tmp_path: Path) -> None:
    model = LlamaForSequenceClassification.from_pretrained(generator, num_labels=3)
    base = written_by(other(model, generator, tmp_path))  # the head is the embedding
    assert initial_adapter(base, 4).dense == {}


@pytest.mark.slow
def test_what_cannot_write_is_refused_with_a_remedy(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="BertLMHeadModel sees the words that it is to predict; give a decoder"):
        written_by(encoder)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    distil = other(DistilBertModel(DistilBertConfig(vocab_size=40, **sizes)), encoder, tmp_path)
    with pytest.raises(Refused, match="no model of this architecture for generation"):
        written_by(distil)


def test_a_decoder_reads_from_left_to_right(generator: Path) -> None:
    assert not reads_ahead(LlamaForCausalLM.from_pretrained(generator))


def test_four_bits_need_a_gpu_and_its_library(generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"engine\.four_bit .* NVIDIA GPU"):
        written_by(generator, four_bit=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(Refused, match=r"pip install 'fedloom\[four-bit\]'"):
            four_bit_arguments(torch.device("cuda"))
    with pytest.raises(Refused, match="choose one"):
        Engine(four_bit=True, bfloat16=True)


def test_layers_that_cannot_be_computed_again_are_refused(generator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(Refused, match=r"engine\.checkpointing"):
        written_by(generator, checkpointing=True)


@pytest.mark.parametrize("kind", ["generator", "decoder"])
def test_in_bfloat16_only_frozen_layers_are_so(request: pytest.FixtureRequest, kind: str) -> None:
    base, exact = (written_by(request.getfixturevalue(kind), bfloat16=half) for half in (True, False))
    model = base.model.get_base_model()
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16
    start, figures = lively(initial_adapter(exact, 4)), []
    for one in (base, exact):
        figures.append(score(one, start, answered(one), range(20)).metrics())
        assert all(f.up.dtype == torch.float32 for f in initial_adapter(one, 4).factors.values())
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [2, None])
def test_a_model_wholly_in_bfloat16_trains_as_in_float32_roughly(
    encoder: Path, generator: Path, labels: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on an accelerator; here its products are slow, and as exact."""
    folder, engine = str(generator if labels is None else encoder), Engine(bfloat16=True, together=2)
    exact = still(load_base(folder, labels, LoRA(dropout=0.0), 4, 3))
    monkeypatch.setattr(base_model, "in_half_precision", lambda *_: True)
    half = still(load_base(folder, labels, LoRA(dropout=0.0), 4, 3, engine=engine))
    adapted = {id(p) for p in peft_weights.slot_parameters(half.model, "r4").values()}
    spared = {id(p) for m in half.model.modules() if isinstance(m, ModulesToSaveWrapper) for p in m.parameters()}
    for parameter in half.model.parameters():
        whole = id(parameter) in adapted | spared
        assert parameter.dtype == (torch.float32 if whole else torch.bfloat16)
    start, found = lively(initial_adapter(exact, 4)), []
    fold = Adapter({n: cut_factor(f, 1) for n, f in start.factors.items()})
    for base in (exact, half):
        trainer = replace(trainer_of(base) if labels else writing_trainer(base), engine=engine)
        tasks = [task_of(start, client, number=k) for k, client in enumerate("ab")]
        work = [(replace(t, start=replace(t.start, fold=fold)), ClientState()) for t in tasks]
        assert len(trainer.groups(work)) == 1
        found.append(trainer.train(work) + trainer.train(work[:1]))
    for (one, _), (other, _) in zip(*found, strict=True):
        assert other.metrics["first_loss"] == pytest.approx(one.metrics["first_loss"], rel=0.05)
        assert all(f.up.dtype == torch.float32 for f in other.adapter.factors.values())
    save_merged(half, start, ["a", "b"], tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").dtype == torch.float32


@pytest.mark.skipif(not linear_kernel.onednn_available(), reason="this build of torch has no oneDNN linear operator")
def test_the_other_kernel_gives_a_writing_model_the_same_loss(generator: Path) -> None:
    plain, fast = written_by(generator), load_base(str(generator), None, LoRA(), 4, 3, engine=Engine("onednn"))
    start = lively(initial_adapter(plain, 4))
    told = [score(base, start, answered(base), range(20)).metrics()["loss"] for base in (plain, fast)]
    assert told[0] == pytest.approx(told[1], rel=1e-5)


def test_a_fingerprint_is_that_of_the_model_and_not_of_its_adapters(encoder: Path, decoder: Path) -> None:
    one = base_of(encoder)
    before = one.fingerprint()
    one.put(lively(initial_adapter(one, 4)))
    assert one.fingerprint() == before == base_of(encoder, rank=8).fingerprint() != base_of(decoder).fingerprint()
