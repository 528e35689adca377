"""A run of a checkpoint that already classifies: it goes on from what the checkpoint knows, and says what it did."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedloom.core.errors import Refused
from fedloom.data.table import Rows
from fedloom.runs.prepare import prepare
from tests.support.tiny_models import tiny_run, toy_rows


def classifier(encoder: Path, folder: Path, names: tuple[str, ...], **config: Any) -> Path:
    """The encoder with a random head that is sure of what it says."""
    shutil.copytree(encoder, folder, dirs_exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = AutoModelForSequenceClassification.from_pretrained(
            encoder, id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)}, **config
        )
        model.classifier.weight.data *= 20
        model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("names", [("colour", "pet"), ("pet", "colour"), ("PET ", "Colour")])
def test_an_untrained_run_of_a_classifier_is_as_good_as_the_classifier(
    encoder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    folder = classifier(encoder, tmp_path, names)
    job = prepare(tiny_run(folder))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(list(job.split.test.texts), padding=True, return_tensors="pt")
    given = [names[k].strip().casefold() for k in model.eval()(**inputs).logits.argmax(1).tolist()]
    wanted = [job.split.test.names[k] for k in job.split.test.labels]
    accuracy = sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted)
    assert job.evaluate(job.server.state.model)["accuracy"] == pytest.approx(accuracy)
    assert 0 < accuracy < 1
    about = job.describe()
    assert about["partition"]["label_names"] == [name.strip().casefold() for name in names]  # type: ignore[index]
    assert bool(about["notes"]) == (names != ("colour", "pet"))


@pytest.mark.slow
def test_which_rows_a_client_has_does_not_depend_on_the_order_of_the_labels(encoder: Path, tmp_path: Path) -> None:
    jobs = [prepare(tiny_run(m)) for m in (encoder, classifier(encoder, tmp_path, ("pet", "colour")))]
    assert jobs[0].shards == jobs[1].shards
    labels = [[job.split.train.names[k] for k in job.split.train.labels] for job in jobs]
    assert labels[0] == labels[1]


@pytest.mark.slow
def test_notes_on_the_checkpoint_are_in_manifest_and_the_same_each_time_and_on_resume(
    encoder: Path, tmp_path: Path
) -> None:
    model = classifier(encoder, tmp_path / "model", ("a", "b"), problem_type="multi_label_classification")
    run = tiny_run(model)
    prepare(run).execute(tmp_path / "run", report=False)
    about = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [note for note in about["notes"] if "multi_label" in note or "other labels" in note] == about["notes"][:2]
    assert about["notes"] == prepare(run).describe()["notes"]
    about["status"] = "running"
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(about))
    assert prepare(run, resume=tmp_path / "run").describe()["notes"] == about["notes"]


@pytest.mark.slow
def test_a_checkpoint_that_cannot_read_the_texts_is_refused_before_anything_is_written(
    encoder: Path, tmp_path: Path
) -> None:
    """A segment that the model has no row for would be an index error in the middle of the run."""
    folder = shutil.copytree(encoder, tmp_path / "model")
    path = folder / "tokenizer.json"
    about = json.loads(path.read_text())
    for piece in about["post_processor"]["single"]:
        next(iter(piece.values()))["type_id"] = 7
    path.write_text(json.dumps(about))
    with pytest.raises(Refused, match="tells 8 kinds of segments apart"):
        prepare(tiny_run(folder))
    run = tiny_run(encoder, data=Rows([{**row, "text": row["text"] + " now" * 90} for row in toy_rows(40)]))
    with pytest.raises(Refused, match="the model reads 64"):
        prepare(replace(run, training=replace(run.training, max_length=80)))
