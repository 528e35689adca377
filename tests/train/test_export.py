"""Exports that others load without fedloom."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from fedloom import IID, Instructions, Limits, LoRA, prepare
from fedloom.cli.main import app
from fedloom.core.errors import Refused
from fedloom.train.base_model import initial_adapter, load_base
from fedloom.train.evaluate import generate_answers
from fedloom.train.export import open_run, save_adapter, save_merged, truncate_adapter
from fedloom.train.peft_weights import lora_layers
from fedloom.train.tokenised import encode_texts
from tests.support.roundtrip import BAR, roundtrip_errors
from tests.support.tiny_models import tiny_encoder, tiny_generator, toy_answers
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


@pytest.mark.slow
def test_a_base_model_is_found_from_elsewhere_and_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_encoder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    prepare(tiny_run(Path("model"))).execute(Path("run"), report=False)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert open_run(tmp_path / "run")[0].name == str(model)
    tiny_encoder(tmp_path / "other" / "model", initializer_range=0.3)
    with pytest.raises(Refused, match="model has other weights than when the run was made"):
        open_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "other")
    model.rename(tmp_path / "moved")
    manifest = tmp_path / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "model"', json.dumps({"name": str(model)})[1:-1]))
    with pytest.raises(Refused, match=r"its base model cannot be loaded: .*It belongs where it was, or a link to it"):
        open_run(tmp_path / "run")


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
    assert "AutoPeftModelForCausalLM" in (outcome.folder / "adapter-r2" / "README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(outcome.folder / "merged")


def test_others_load_a_classifier_by_its_folder_alone(encoder: Path, tmp_path: Path) -> None:
    check_folder_alone(encoder, ["colour", "pet", "\u05db\u05df: other, or 'none'"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_others_load_any_classifier_by_its_folder_alone(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, count: int
) -> None:
    check_folder_alone(request.getfixturevalue(kind), [f"label {number}" for number in range(count)], tmp_path)


def check_folder_alone(model: Path, names: list[str], place: Path) -> None:
    """By peft, by transformers and by a pipeline, at both ranks: the same logits, under the names of the labels."""
    from transformers import pipeline

    base = load_base(str(model), len(names), LoRA(dropout=0.0), 4, seed=3)
    whole, some = lively(initial_adapter(base, 4)), list(examples(6).texts)
    for rank in (4, 2):
        adapter = truncate_adapter(whole, rank)
        folder = save_adapter(base, adapter, names, place / str(rank))
        wanted = logits(base, adapter, encode_texts(examples(6), base.tokenizer, 32))
        inputs = AutoTokenizer.from_pretrained(folder)(some, padding=True, return_tensors="pt")
        for kind in (AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
            loaded = kind.from_pretrained(folder)
            with torch.no_grad():
                assert torch.allclose(loaded.eval()(**inputs).logits, wanted, atol=BAR)
            assert loaded.config.id2label == dict(enumerate(names))
        chosen = pipeline("text-classification", str(folder))(some, batch_size=3)
        assert [one["label"] for one in chosen] == [names[number] for number in wanted.argmax(1)]


def test_the_card_has_metadata_and_no_path_of_this_machine(encoder: Path, tmp_path: Path) -> None:
    folder = save_adapter(base_of(encoder), initial_adapter(base_of(encoder), 4), ("a", "b"), tmp_path / "out")
    data = ModelCard.load(folder / "README.md").data.to_dict()
    assert data["base_model"] == encoder.name
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "text-classification")
    assert "license" not in data, "it is the owner's to choose"
    assert not re.search(r"/(tmp|home|root)/", (folder / "README.md").read_text(encoding="utf-8"))
    assert str(encoder.parent) not in (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_which_date_a_chat_template_was_given(generator: Path, tmp_path: Path) -> None:
    base, said = writer_of(generator), "The chat template writes the date"
    for template, date, told in (
        ("{{ messages }}", None, ""),
        ("{{ strftime_now('%d') }}", "2026-02-03", "2026-02-03"),
    ):
        base.tokenizer.chat_template = template
        folder = save_adapter(base, initial_adapter(base, 4), ("",), tmp_path / (told or "plain"), date)
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert (said in card) == bool(told)
        assert told in card


def test_what_is_to_be_shared_can_be_read(encoder: Path, tmp_path: Path) -> None:
    """Whatever the library or the user's mask gave it; the weights of the base model, which are links, stay as they are."""
    weights, before = encoder / "model.safetensors", os.umask(0o077)
    mode, base = stat.S_IMODE(weights.stat().st_mode), base_of(encoder)
    try:
        folder = save_adapter(base, initial_adapter(base, 4), ("a", "b"), tmp_path / "adapter")
        merged = save_merged(base, initial_adapter(base, 4), ("a", "b"), tmp_path / "merged")
    finally:
        os.umask(before)
    for path in (folder, merged, *folder.rglob("*"), *merged.rglob("*")):
        if not path.is_symlink():
            assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert stat.S_IMODE(weights.stat().st_mode) == mode
    assert (folder / "base" / "model.safetensors").is_symlink()
    assert sum(path.lstat().st_size for path in folder.rglob("*")) < weights.stat().st_size, "no copy of the base"


def test_the_tokenizer_is_the_users(generator: Path, tmp_path: Path) -> None:
    """Not as training has left it, which pads and cuts."""
    AutoTokenizer.from_pretrained(generator).save_pretrained(tmp_path / "wanted")
    base = writer_of(generator)
    base.tokenizer(["a", "my cat is here"], padding=True, truncation=True, max_length=3)
    folder = save_adapter(base, initial_adapter(base, 4), ("",), tmp_path / "adapter")
    merged = save_merged(base, initial_adapter(base, 4), ("",), tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        wanted = (tmp_path / "wanted" / name).read_bytes()
        assert (folder / name).read_bytes() == (merged / name).read_bytes() == wanted


@pytest.mark.slow
def test_a_merged_model_keeps_how_the_base_model_writes(tmp_path: Path) -> None:
    model = tiny_generator(tmp_path / "model")
    wanted = GenerationConfig(do_sample=True, temperature=0.3, top_p=0.8, eos_token_id=[2, 5], bos_token_id=1)
    wanted.save_pretrained(model)
    base = writer_of(model)
    merged = save_merged(base, lively(initial_adapter(base, 4)), ("",), tmp_path / "merged")
    kept = GenerationConfig.from_pretrained(merged)
    assert kept.to_diff_dict() == GenerationConfig.from_pretrained(model).to_diff_dict()


@pytest.mark.slow
def test_a_checkpoint_with_another_head_is_a_base_as_well(encoder: Path, tmp_path: Path) -> None:
    """Its head is left out and a new one trained, so its file alone would not load; the folder has the base model whole."""
    other = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "other")
    (weights,) = (tmp_path / "other").glob("*.safetensors")
    before = weights.read_bytes()
    (tmp_path / "4" / "base").mkdir(parents=True)  # of an adapter that was written here before, by links
    (tmp_path / "4" / "base" / weights.name).symlink_to(weights)
    check_folder_alone(tmp_path / "other", ["a", "b", "c"], tmp_path)
    assert weights.read_bytes() == before, "nothing is written through a link"


@pytest.mark.slow
def test_a_checkpoint_in_parts_and_in_bfloat16_is_a_base_as_well(encoder: Path, tmp_path: Path) -> None:
    """Others load it in float32, as it was trained."""
    whole = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "parts")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 1
    check_folder_alone(tmp_path / "parts", ["a", "b"], tmp_path)
    base = base_of(tmp_path / "parts")
    adapter, texts = lively(initial_adapter(base, 4)), encode_texts(examples(6), base.tokenizer, 32)
    merged = AutoModelForSequenceClassification.from_pretrained(save_merged(base, adapter, ("a", "b"), tmp_path / "m"))
    inputs = texts.batch(range(6), torch.device("cpu"))
    inputs.pop("labels")
    with torch.no_grad():
        assert torch.allclose(merged.eval()(**inputs).logits, logits(base, adapter, texts), atol=BAR)


@pytest.mark.slow
def test_a_model_of_the_hub_is_named_as_the_hub_has_it(encoder: Path, tmp_path: Path) -> None:
    """In a process that has it in its cache: the card's code, the pipeline and transformers load the adapter."""
    cache, code = tmp_path / "cache" / "models--ward--tiny", "b" * 40
    shutil.copytree(encoder, cache / "snapshots" / code)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(code)
    out = tmp_path / "out"
    given = {**os.environ, "HF_HUB_CACHE": str(cache.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.support.hub_adapter", "ward/tiny", str(out)]
    done = subprocess.run(
        command, env=given, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "ward/tiny"
    assert ModelCard.load(out / "README.md").data.base_model == "ward/tiny"


FORMS = [
    None,
    "all-linear",
    ("query", "value"),
    ("attention.self.query", "layer.1.output.dense"),
    r".*\.(query|key)",
    r".*layer\.1\..*\.(query|dense)",
]


@pytest.mark.slow
@pytest.mark.parametrize("targets", FORMS, ids=str)
def test_every_form_of_targets_comes_back(encoder: Path, tmp_path: Path, targets: tuple[str, ...] | str | None) -> None:
    """The run opens to the same layers and tensors, and its adapter loads in plain PEFT at two ranks with equal logits."""
    job = prepare(tiny_run(encoder, lora=LoRA(targets, dropout=0.0), limits=Limits(versions=1)))
    outcome = job.execute(tmp_path / "run", report=False)
    base, adapter, names = open_run(outcome.folder)
    assert lora_layers(base.model).keys() == lora_layers(job.base.model).keys()
    assert same(adapter, outcome.adapter)
    texts = encode_texts(examples(6), base.tokenizer, 32)
    for rank in (8, 2):
        cut = truncate_adapter(adapter, rank)
        folder = save_adapter(base, cut, names, tmp_path / str(rank))
        plain = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        loaded = PeftModel.from_pretrained(plain, folder).eval()
        inputs = AutoTokenizer.from_pretrained(folder)(list(examples(6).texts), padding=True, return_tensors="pt")
        with torch.no_grad():
            assert torch.allclose(loaded(**inputs).logits, logits(base, cut, texts), atol=BAR)


def test_an_expression_is_written_as_names_where_names_will_do(encoder: Path, tmp_path: Path) -> None:
    """Servers of models want names; what names cannot say stays an expression, or whole names."""
    written = []
    for number, targets in enumerate((r".*\.(query|key)", r".*layer\.1\..*query", ("layer.1.attention.self.query",))):
        base = base_of(encoder, target_modules=targets)
        folder = save_adapter(base, initial_adapter(base, 4), ("a", "b"), tmp_path / str(number))
        written.append(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
    assert written == [["key", "query"], r".*layer\.1\..*query", ["layer.1.attention.self.query"]]


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.(q_proj|up_proj)"], ids=str)
def test_the_adapter_of_a_writer_is_one_that_servers_of_models_take(
    generator: Path, tmp_path: Path, targets: str | None
) -> None:
    """What vLLM checks: one rank, names of layers, no biases, no saved modules, nothing but LoRA's two matrices."""
    base = writer_of(generator, target_modules=targets)
    folder = save_adapter(base, initial_adapter(base, 4), ("",), tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    odd = ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    assert not any(config[name] for name in odd)
    assert (config["r"], config["bias"], type(config["target_modules"])) == (4, "none", list)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in file.keys())  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("q_proj",), "all-linear"], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_adapted_is_merged_apart_from_the_embedding(
    tmp_path: Path, tied: bool, targets: tuple[str, ...] | str
) -> None:
    model = tiny_generator(tmp_path / "model", tie_word_embeddings=tied)
    base = writer_of(model, target_modules=targets)
    adapter, texts = lively(initial_adapter(base, 4)), answered(base)
    wanted = logits(base, adapter, texts)
    embedding = base.model.get_base_model().get_input_embeddings().weight
    merged = AutoModelForCausalLM.from_pretrained(save_merged(base, adapter, ("",), tmp_path / "merged")).eval()
    apart = merged.get_output_embeddings().weight.data_ptr() != merged.get_input_embeddings().weight.data_ptr()
    assert apart == ("lm_head" in targets or not tied)
    inputs = texts.batch(range(len(texts.ids)), torch.device("cpu"))
    inputs.pop("labels")
    with torch.no_grad():
        assert torch.allclose(merged(**inputs).logits, wanted, atol=BAR)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
