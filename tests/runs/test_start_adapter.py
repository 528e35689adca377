"""Runs that begin from an adapter: version 0 is that adapter, for every method; what does not fit is refused or noted."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from fedloom import FFA, FedIT, FLoRA, Generation, HLoRA, Instructions, Momentum, Refused, Rows, prepare
from fedloom.core.lora import Adapter, cut_factor
from fedloom.core.policies import Aggregator, aggregator_layers
from fedloom.core.types import Budget
from fedloom.runs.replay import replay
from fedloom.runs.start_adapter import StartAdapter, at_rank, first_version
from fedloom.schedule.rounds import Rounds
from tests.support import toys
from tests.support.folder_runs import interrupt_run
from tests.support.storms import tries
from tests.support.tiny_models import tiny_encoder, tiny_run, toy_answers, toy_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
METHODS = toys.aggregators()
CLOSE = 1e-5
TWO = Rows(toy_rows(200), test=toy_rows(40, seed=1))
"""Examples whose test part depends neither on a seed nor on the order of labels."""


def begun(method: Aggregator, held: Adapter, rank: int) -> Any:
    """The model of version 0, of a server of this rank."""
    adapter, rest = at_rank(toys.fresh(rank, seed=7), held, rank, seed=0)
    run: Any = replace(tiny_run(Path("none"), data=Rows([])), aggregator=method)
    return first_version(run, None, StartAdapter(Adapter(adapter.factors, held.dense), rest, {}, ()))  # type: ignore[arg-type]


def far(one: Any, other: Any) -> float:
    """The largest distance of two products of a layer, relative to the larger one."""
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in other)


@pytest.mark.parametrize("method", METHODS, ids=toys.called)
@given(has=st.integers(1, 10), seed=st.integers(0, 99))
@example(has=7, seed=0)
@tries(2)
def test_version_0_is_the_adapter_for_every_method(method: Aggregator, has: int, seed: int) -> None:
    """Whole where the rank has room or the method a fold, else its best approximation; and every direction of a start can learn."""
    held, rank = toys.adapter(has, seed), 4
    model, wanted = begun(method, held, rank), toys.products(held)
    folds = any(getattr(layer, "has_fold", False) for layer in aggregator_layers(method))
    if has > rank and not folds:
        wanted = {name: toys.best(product, rank) for name, product in wanted.items()}
    assert far(toys.function(model), wanted) < CLOSE
    assert {factor.rank for factor in model.adapter.factors.values()} == {rank}
    assert all(torch.equal(model.adapter.dense[name], tensor) for name, tensor in held.dense.items())
    for budget in (1, 2):
        for factor in method.start(model, Budget(budget, 1), 3).train.factors.values():
            alive = torch.maximum(factor.down.norm(dim=1), factor.up.norm(dim=0))
            assert float(alive.min()) > 1e-3


def test_a_layer_that_is_missing_begins_as_lora_does() -> None:
    held, fresh = toys.adapter(3), toys.fresh(4)
    part, rest = at_rank(fresh, Adapter({"query": held.factors["query"]}), 4, seed=0)
    empty, whole = part.factors["value"], part.factors["query"]
    assert not empty.up.any()
    assert float(empty.down.norm(dim=1).min()) > 0.1
    assert float(whole.up[:, 3].norm()) == 0.0, "the fourth direction is new"
    assert not rest.factors
    assert torch.equal(cut_factor(whole, 3).down, at_rank(fresh, held, 3, 0)[0].factors["query"].down)


# With a model -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("first") / "out"
    prepare(tiny_run(encoder, data=TWO)).execute(out, report=False)
    return out


def end_of(folder: Path) -> dict[str, Any]:
    """The figures of the last version."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return dict([line for line in lines if line["kind"] == "score"][-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=toys.called)
def test_a_run_begins_where_another_ended(encoder: Path, first: Path, method: Any) -> None:
    method = replace(method, clients=6) if hasattr(method, "clients") else method
    job = prepare(tiny_run(encoder, data=TWO, start=str(first), aggregator=method, schedule=Rounds()))
    assert job.evaluate(job.server.state.model)["loss"] == pytest.approx(end_of(first)["loss"], abs=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FLoRA(), FFA(), Momentum(FedIT())], ids=toys.called)
def test_a_method_goes_on_from_its_own_run(encoder: Path, tmp_path: Path, method: Any) -> None:
    """With all that is folded; the second run is resumed and replayed as any other."""
    run = tiny_run(encoder, aggregator=method)
    prepare(run).execute(tmp_path / "first", report=False)
    again = replace(run, start=str(tmp_path / "first"))
    prepare(again).execute(tmp_path / "second", report=False, keep_updates=True)
    lines = [json.loads(line) for line in (tmp_path / "second" / "metrics.jsonl").read_text().splitlines()]
    zero = next(line for line in lines if line["kind"] == "score" and line["version"] == 0)
    assert zero["loss"] == pytest.approx(end_of(tmp_path / "first")["loss"], abs=CLOSE)
    assert replay(tmp_path / "second").difference == ""
    half = interrupt_run(again, tmp_path / "half", 2, checkpoint_seconds=0.0)
    prepare(again, resume=half).execute(report=False)
    assert (half / "trace.jsonl").read_bytes() == (tmp_path / "second" / "trace.jsonl").read_bytes()
    about = json.loads((half / "manifest.json").read_bytes())
    assert about["start"]["run_hash"] == json.loads((tmp_path / "first" / "manifest.json").read_bytes())["run_hash"]
    assert "version 0 is this adapter" in about["notes"][0]


@pytest.mark.slow
def test_an_adapter_that_changed_is_not_the_one_that_was_begun_with(encoder: Path, first: Path, tmp_path: Path) -> None:
    source = shutil.copytree(first, tmp_path / "source")
    run = tiny_run(encoder, start=str(source))
    half = interrupt_run(run, tmp_path / "half", 2, checkpoint_seconds=0.0)
    prepare(replace(run, seed=9, start=None)).execute(tmp_path / "other", report=False)
    shutil.copytree(tmp_path / "other" / "adapter", source / "adapter", dirs_exist_ok=True)
    with pytest.raises(Refused, match=r"start\.sha256"):
        prepare(run, resume=half)


@pytest.mark.slow
def test_a_lower_rank_is_the_best_approximation_and_a_note_says_what_is_lost(encoder: Path, first: Path) -> None:
    run = tiny_run(encoder, start=str(first), aggregator=HLoRA())
    low = replace(run, plan=replace(run.plan, rank=replace(run.plan.rank, ranks=(2,))))
    job = prepare(low)
    assert {factor.rank for factor in job.server.state.model.adapter.factors.values()} == {2}
    assert any("truncated from rank 8 to 2" in note and "% of its energy is left" in note for note in job._notes())


@pytest.mark.slow
def test_labels_are_matched_by_name(encoder: Path, first: Path) -> None:
    """In another order the rows of the head are turned; other labels get a new head."""
    turned = prepare(tiny_run(encoder, start=str(first), seed=4, data=replace(TWO, labels=("pet", "colour"))))
    assert turned.split.train.names == ("pet", "colour")
    assert turned.evaluate(turned.server.state.model)["loss"] == pytest.approx(end_of(first)["loss"], abs=CLOSE)
    others = [{**row, "label": f"{row['label']}s"} for row in toy_rows(240)]
    job = prepare(tiny_run(encoder, start=str(first), data=Rows(others)))
    assert any("is for other labels (colour, pet)" in note for note in job._notes())
    three = [{**row, "label": row["text"][0]} for row in toy_rows(240) if row["text"][0] in "abc"]
    job = prepare(tiny_run(encoder, start=str(first), data=Rows(three)))
    assert any("has none of this shape (classifier.weight, classifier.bias)" in note for note in job._notes())


@pytest.mark.slow
def test_a_classifier_and_a_writer(generator: Path, tmp_path: Path) -> None:
    """The layers of one that wrote serve a classifier, which gets a new head; not the other way."""
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, toy_answers(80))))
    writer = tiny_run(generator, data=Instructions(tmp_path / "answers.jsonl", answer="answer"))
    wrote = prepare(replace(writer, generation=Generation(0))).execute(tmp_path / "wrote", report=False)
    job = prepare(tiny_run(generator, start=str(wrote.folder)))
    assert far(toys.products(job.server.state.model.adapter), toys.products(wrote.adapter)) < CLOSE
    assert any("The head begins anew" in note for note in job._notes())
    chose = prepare(tiny_run(generator)).execute(tmp_path / "chose", report=False)
    with pytest.raises(Refused, match="the adapter of a classifier, and here text is written"):
        prepare(replace(writer, start=str(chose.folder)))


@pytest.mark.slow
def test_another_base_model_is_refused(first: Path, tmp_path: Path) -> None:
    """By its weights, though its name and its sizes are the same."""
    other = tiny_encoder(tmp_path / "other")
    weights = AutoModelForSequenceClassification.from_pretrained(other, num_labels=2)
    for layer in weights.base_model.encoder.layer:
        torch.nn.init.normal_(layer.attention.self.query.weight)
    weights.base_model.save_pretrained(other)
    with pytest.raises(Refused, match="whose weights are others"):
        prepare(tiny_run(other, start=str(first)))


# PEFT folders ----------------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 12, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": {"query": 2}, "alpha_pattern": {"layer.1.*value": 32}},
    "one layer": {"r": 3, "lora_alpha": 3, "target_modules": ["query"]},
    "higher": {"r": 16, "lora_alpha": 16},
}


def peft_folder(encoder: Path, folder: Path, **config: Any) -> Any:
    """A LoRA that PEFT made and saved, without fedloom; returns the model that it is."""
    torch.manual_seed(3)
    given = {"task_type": TaskType.SEQ_CLS, "target_modules": ["query", "value"], **config}
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2), LoraConfig(**given)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft_is_the_same_function(encoder: Path, tmp_path: Path, kind: str) -> None:
    model = peft_folder(encoder, tmp_path / "peft", **KINDS[kind])
    job = prepare(tiny_run(encoder, start=str(tmp_path / "peft"), aggregator=FLoRA()))
    texts = list(job.split.test.texts[:8])
    with torch.no_grad():
        wanted = model(**job.base.tokenizer(texts, padding=True, return_tensors="pt")).logits
    state = job.server.state.model
    job.base.put(state.adapter, fold=state.fold)
    with torch.no_grad():
        given = job.base.model.eval()(**job.base.tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert torch.allclose(given, wanted, atol=CLOSE)
    notes = " ".join(job._notes())
    assert ("2 layers are not in the adapter" in notes) == (kind == "one layer")
    assert "does not say its labels" in notes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, r"use_dora=True makes it more than up @ down"),
        ({"bias": "all"}, r"bias='all'"),
        (
            {"target_modules": ["query", "key", "value"]},
            r"adapts 2 layers that the run does not .*lora\.target_modules",
        ),
        ({"modules_to_save": ["word_embeddings"]}, r"whole layers that the run does not train"),
    ],
    ids=str,
)
def test_what_a_run_cannot_go_on_with_is_refused(
    encoder: Path, tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    peft_folder(encoder, tmp_path / "peft", **config)
    with pytest.raises(Refused, match=why):
        prepare(tiny_run(encoder, start=str(tmp_path / "peft")))


def test_a_run_without_an_adapter_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for name in ("manifest.json", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    for start, why in ((tmp_path, "it made no version"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(Refused, match=why):
            prepare(tiny_run(Path("no model"), start=str(start)))


@pytest.mark.slow
def test_what_is_no_such_folder_is_refused(encoder: Path, tmp_path: Path) -> None:
    def refused(why: str) -> None:
        with pytest.raises(Refused, match=why) as caught:
            prepare(tiny_run(encoder, start=str(tmp_path / "peft")))
        assert caught.value.field == "start"

    refused("no such folder")
    peft_folder(encoder, tmp_path / "peft")
    config, weights = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    text = config.read_text()
    config.write_text(text.replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    refused("init_lora_weights='pissa'")
    config.write_text(text.replace('"peft_type": "LORA"', '"peft_type": "IA3"'))
    refused("cannot be read|of the kind IA3")
    config.write_text(text.replace('"r": 8', '"r": 4'))
    refused("fits no .*size mismatch")
    config.write_text("{")
    refused("cannot be read")
    config.write_text(text)
    held, whole = load_file(weights), weights.read_bytes()
    weights.write_bytes(whole[:-50])
    refused("adapter_model.safetensors is damaged")
    save_file({name: weight * float("nan") for name, weight in held.items()}, weights)
    refused("not all of its weights are finite numbers")
    embedding = "bert.embeddings.word_embeddings.weight"
    table = AutoModelForSequenceClassification.from_pretrained(encoder).get_parameter(embedding).detach()
    save_file(held | {f"base_model.model.{embedding}": table + 1}, weights)
    refused(f"replaces whole layers that the run does not train .{embedding}")
    save_file(held | {f"base_model.model.{embedding}": table.clone()}, weights)
    prepare(tiny_run(encoder, start=str(tmp_path / "peft")))  # as PEFT saves it beside an adapter
    weights.rename(tmp_path / "peft" / "adapter_model.bin")
    refused("is a pickle, and loading one may run code")
    (tmp_path / "peft" / "adapter_model.bin").unlink()
    refused("it holds no adapter_model.safetensors")
    config.unlink()
    refused("no adapter_config.json")


@pytest.mark.slow
def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    large, small = tiny_encoder(tmp_path / "large", hidden_size=64), tiny_encoder(tmp_path / "small")
    peft_folder(large, tmp_path / "peft")
    with pytest.raises(Refused, match="fits no"):
        prepare(tiny_run(small, start=str(tmp_path / "peft")))
