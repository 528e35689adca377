"""Exports that others load without fedloom."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fedloom import IID, Instructions, Limits, prepare
from fedloom.cli.main import app
from fedloom.core.errors import Refused
from fedloom.train.base_model import initial_adapter
from fedloom.train.evaluate import generate_answers
from fedloom.train.export import open_run, save_adapter, save_merged, truncate_adapter
from fedloom.train.tokenised import encode_texts
from tests.support.roundtrip import BAR, roundtrip_errors
from tests.support.tiny_models import toy_answers
from tests.support.tiny_runs import answered, base_of, examples, frozen, lively, logits, same, tiny_run, writer_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_a_trained_adapter_survives_the_round_trip(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    errors = roundtrip_errors(request.getfixturevalue(kind), tmp_path, range(1, 9))
    assert len(errors) == 9
    assert max(errors.values()) <= BAR


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_the_readme_of_an_adapter_says_how_to_load_it(
    request: pytest.FixtureRequest, elsewhere: Path, kind: str
) -> None:
    base = base_of(request.getfixturevalue(kind))
    adapter = lively(initial_adapter(base, 4))
    card = (save_adapter(base, adapter, ("colour", "pet"), Path("out")) / "README.md").read_text(encoding="utf-8")
    assert "Labels in order: colour, pet" in card
    code = card.partition("```python")[2].partition("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    model, tokenizer = names["model"], names["tokenizer"]
    some = examples(6)
    with torch.no_grad():
        given = model.eval()(**tokenizer(list(some.texts), padding=True, return_tensors="pt")).logits  # type: ignore
    wanted = logits(base, adapter, encode_texts(some, base.tokenizer, 32))
    assert torch.allclose(given, wanted, atol=BAR)


def test_a_merged_model_knows_its_labels_and_leaves_the_base_alone(encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder)
    adapter, before = lively(initial_adapter(base, 4)), frozen(base)
    wanted = logits(base, adapter, encode_texts(examples(6), base.tokenizer, 32))
    save_merged(base, adapter, ("colour", "pet"), tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen(base).items())
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert model.config.id2label == {0: "colour", 1: "pet"}
    with torch.no_grad():
        given = model.eval()(**tokenizer(list(examples(6).texts), padding=True, return_tensors="pt")).logits
    assert torch.allclose(given, wanted, atol=BAR)


def test_the_config_of_an_adapter_says_its_own_rank_and_scaling(encoder: Path, tmp_path: Path) -> None:
    base = base_of(encoder, rank=8, scaling=2.0)
    for rank in (1, 3, 8):
        folder = save_adapter(
            base, truncate_adapter(lively(initial_adapter(base, 8)), rank), ("a", "b"), tmp_path / str(rank)
        )
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"] / config["r"]) == (rank, 2.0)
        assert sorted(config["modules_to_save"]) == ["classifier", "score"]
        assert config["inference_mode"] is True


def test_a_run_folder_gives_back_base_adapter_and_labels(finished: Path, tmp_path: Path) -> None:
    base, adapter, names = open_run(finished)
    assert names == ("colour", "pet")
    again = save_adapter(base, adapter, names, tmp_path / "again")
    original = finished / "adapter" / "adapter_model.safetensors"
    assert (again / "adapter_model.safetensors").read_bytes() == original.read_bytes()
    assert same(truncate_adapter(adapter, 8), truncate_adapter(adapter, 8))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="holds no adapter"):
        open_run(tmp_path)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), "all-linear"])
def test_others_write_the_same_text_token_for_token(
    elsewhere: Path, generator: Path, targets: tuple[str, ...] | str
) -> None:
    base = writer_of(generator, target_modules=targets)
    adapter, texts, some = lively(initial_adapter(base, 4)), answered(base), [0, 7, 3, 12]
    ours = generate_answers(base, adapter, texts, some, 12)
    assert len(set(ours)) > 1
    card = (save_adapter(base, adapter, ("",), Path("out")) / "README.md").read_text(encoding="utf-8")
    code, use = (part.partition("```")[0] for part in card.split("```python")[1:])
    names: dict[str, object] = {}
    exec(code, names)
    assert "Labels" not in card
    merged = AutoModelForCausalLM.from_pretrained(save_merged(base, adapter, ("",), Path("merged")))
    for model in (names["model"], merged):
        for i, text in zip(some, ours, strict=True):
            ids = torch.tensor([texts.ids[i][: texts.answer_starts[i]]])  # type: ignore[index]
            told = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=3)  # type: ignore[attr-defined]
            assert names["tokenizer"].decode(told[0, ids.shape[1] :], skip_special_tokens=True).strip() == text  # type: ignore[attr-defined]
    names["request"] = "my cat is here"
    exec(use, names)


def test_a_run_that_wrote_is_opened_and_exported(generator: Path, tmp_path: Path) -> None:
    run = tiny_run(generator, data=Instructions(toy_answers(80)), partition=IID(2), limits=Limits(versions=1))
    outcome = prepare(run).execute(tmp_path / "run", report=False)
    base, adapter, _ = open_run(outcome.folder)
    assert base.labels is None
    assert same(adapter, outcome.adapter)
    for way in (["--rank", "2"], ["--merged"]):
        assert CliRunner().invoke(app, ["export", str(outcome.folder), *way]).exit_code == 0
    assert "AutoModelForCausalLM" in (outcome.folder / "adapter-r2" / "README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(outcome.folder / "merged")
