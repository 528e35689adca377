"""What a run leaves open and `prepare` finds: the longest text and the date of prompts. Found or given, the bytes are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from fedloom import IID, ByClient, Engine, Half, Instructions, Limits, Private, Refused, Rows, Run, Training, prepare
from fedloom.core.schema import jsonable
from fedloom.data.examples import without_training_examples
from fedloom.deploy.start import run_terms
from fedloom.runs.manifest import settings_hash
from fedloom.runs.prepare import assemble, with_type_chosen
from fedloom.runs.resume import as_settled
from fedloom.train import device
from fedloom.train.chat_template import DATE
from fedloom.train.device import find_device
from fedloom.train.engine.linear_kernel import has_bfloat16
from fedloom.train.tokenised import LONGEST_BY_DEFAULT
from tests.support.tiny_models import tiny_decoder, toy_answers, toy_rows
from tests.support.tiny_runs import tiny_run

LONG = [{**row, "text": f"{row['text']} {'very ' * 200}"} for row in toy_rows(60)]
ONE_LONG = [*toy_rows(59), LONG[1]]
DATED = (
    "{{ strftime_now('%d') }} {% for m in messages %}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %} is : {% endif %}"
)


def dated(generator: Path, folder: Path) -> Path:
    """The same model, with a chat template that reads the clock."""
    for file in generator.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def writing(model: Path, **more: Any) -> Run:
    data = Instructions(toy_answers(60))
    run: Run = tiny_run(
        model, **{"data": data, "partition": IID(3), "limits": Limits(versions=1), "generation": None, **more}
    )
    return run


def test_the_longest_text_is_found_and_recorded(encoder: Path) -> None:
    job = prepare(tiny_run(encoder, data=Rows(toy_rows(60))))
    longest = max(len(row) for texts in (job.train_texts, job.test_texts) for row in texts.ids)
    assert job.run.training.max_length == longest == 14
    assert job.describe()["run"]["training"]["max_length"] == longest  # type: ignore[index]
    assert job.run.date is None
    assert job.describe()["notes"] == []


def test_the_device_and_the_threads_are_this_machines_and_those_of_a_run_that_goes_on(
    encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(tiny_run(encoder, data=Rows(toy_rows(60))), device="auto", threads=None)
    assert [getattr(Run("m", Rows([])), name) for name in ("device", "threads")] == ["auto", None]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "usable_cores", lambda: 4)
    chosen = prepare(run, workers="2").run
    assert (chosen.device, chosen.threads) == (str(find_device("auto")), 2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    elsewhere = jsonable(replace(chosen, device="cuda:1", threads=7))
    settled = as_settled(run, elsewhere)
    assert (settled.device, settled.threads) == ("cuda:1", 7)
    settled = as_settled(replace(run, device="cpu", threads=3), elsewhere)
    assert (settled.device, settled.threads) == ("cpu", 3)


def test_the_type_of_frozen_layers_is_the_processors_unless_records_are_protected_or_it_is_given() -> None:
    run = tiny_run(Path("nowhere"), engine=Engine(bfloat16=None), device="cpu")
    private = replace(run, privacy=Private(clip=1.0, multiplier=1.0, most_answers=1, unit="record"))
    chosen = [with_type_chosen(one).engine for one in (run, private, replace(run, device="meta"))]
    assert [engine and engine.bfloat16 for engine in chosen] == [has_bfloat16("cpu"), False, False]
    for given in (replace(run, engine=Engine(bfloat16=True)), replace(run, engine=None)):
        assert with_type_chosen(given) == given


@pytest.mark.parametrize("then", [True, False])
def test_a_run_goes_on_in_the_type_that_it_began_with_whatever_this_processor_has(then: bool) -> None:
    run = tiny_run(Path("nowhere"), engine=Engine(bfloat16=None))
    began = replace(run, engine=Engine(bfloat16=then))
    assert as_settled(run, jsonable(began)) == as_settled(began, jsonable(began))


@pytest.mark.slow
def test_found_or_given_the_bytes_are_the_same(encoder: Path, tmp_path: Path) -> None:
    left_open = tiny_run(encoder, name="same", engine=Engine(kernel="torch", bfloat16=None))
    found = prepare(left_open)
    given = replace(left_open, training=found.run.training, engine=found.run.engine)
    assert given.engine != left_open.engine
    found.execute(tmp_path / "found", report=False)
    prepare(given).execute(tmp_path / "given", report=False)
    for name in ("manifest.json", "trace.jsonl", "metrics.jsonl"):
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "given" / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(("positions", "wanted"), [(64, 64), (2048, LONGEST_BY_DEFAULT)])
def test_it_is_no_more_than_the_model_reads_and_no_more_than_the_limit(
    tmp_path: Path, positions: int, wanted: int
) -> None:
    """Long texts are cut there, counted, and have the tokens that they have where the number is given."""
    rows = [*toy_rows(59), {**toy_rows(2)[1], "text": "cat " * 3000}]
    model = tiny_decoder(tmp_path / "model", max_position_embeddings=positions)
    job = prepare(tiny_run(model, data=Rows(rows), partition=IID(3)))
    assert job.run.training.max_length == wanted
    cut = f"the end of the text is cut off to fit training.max_length={wanted}"
    assert any(cut in note and note.startswith("1 of ") for note in job.describe()["notes"])  # type: ignore[attr-defined]
    again = prepare(tiny_run(model, data=Rows(rows), partition=IID(3), training=Training(max_length=wanted)))
    assert (again.train_texts, again.test_texts) == (job.train_texts, job.test_texts)


@pytest.mark.slow
def test_texts_that_are_cut_are_counted_on_both_sides(encoder: Path) -> None:
    data = Rows(LONG[:40], test=[*toy_rows(5), *LONG[:3]])
    job = prepare(tiny_run(encoder, data=data, partition=IID(3), training=Training(max_length=16)))
    cut = [note for note in job.describe()["notes"] if "cut off" in note]  # type: ignore[attr-defined]
    assert [note.partition(":")[0] for note in cut] == ["40 of 40 training examples", "3 of 8 test examples"]


@pytest.mark.slow
def test_a_deployment_that_has_no_training_texts_takes_the_limit_and_tells_its_sites(
    encoder: Path, generator: Path, tmp_path: Path
) -> None:
    run = tiny_run(encoder, transfer=Half(), threads=None)
    job = assemble(run, without_training_examples(run.data, run.seed), (), None)
    terms = run_terms(job)
    assert terms.training.max_length == 64 == terms.training.token_limit
    assert terms.run_hash == settings_hash(jsonable(job.run))
    assert terms.date is None
    assert job.run.threads == terms.threads == 1
    talks = writing(dated(generator, tmp_path), transfer=Half())
    job = assemble(talks, without_training_examples(talks.data, talks.seed), (), None)
    assert run_terms(job).date == DATE
    with pytest.raises(Refused, match=r"date.*write a date as 2026-01-31"):
        replace(run_terms(job), date="yesterday")


@pytest.mark.slow
def test_the_date_is_recorded_where_prompts_have_one(generator: Path, tmp_path: Path) -> None:
    model = dated(generator, tmp_path)
    job, other = prepare(writing(model)), prepare(writing(model, date="2031-12-24"))
    assert (job.run.date, other.run.date) == (DATE, "2031-12-24")
    about = job.describe()
    assert about["run"]["date"] == DATE  # type: ignore[index]
    assert f"The chat template writes the date: it is given {DATE} (`date` of the run) on any day." in about["notes"]  # type: ignore[operator]
    assert about["run_hash"] != other.describe()["run_hash"]
    assert prepare(writing(model, date=DATE)).describe() == about


@pytest.mark.parametrize("date", ["20260131", "2026-1-31", "2026-02-30", "today", "2026-W05-6", 20260131])
def test_what_is_no_date_is_refused(date: Any) -> None:
    with pytest.raises(Refused, match=r"date.*write a date as 2026-01-31"):
        Run(model="m", data=Rows(toy_rows(8)), date=date)


def test_a_run_that_goes_on_takes_what_was_found(encoder: Path) -> None:
    """Also from manifests of versions that knew no date and had a length always."""
    run = tiny_run(encoder)
    begun = replace(run, training=replace(run.training, max_length=128))
    settings = json.loads(json.dumps(jsonable(begun)))
    del settings["date"]
    assert as_settled(run, settings) == begun
    other = replace(run, training=replace(run.training, max_length=16), date="2031-12-24")
    assert as_settled(other, settings) == other


def test_options_that_came_later_rename_no_run(encoder: Path) -> None:
    settings = jsonable(tiny_run(encoder, partition=ByClient()))
    before = json.loads(json.dumps(settings))
    del before["data"]["missing"], before["partition"]["smallest"], before["date"]
    del before["engine"]["byte_dropout"], before["training"]["base_dropout"]
    del before["engine"]["cache_dir"], before["engine"]["cache_dir_bytes"]
    assert settings_hash(before) == settings_hash(settings)
    assert settings_hash(settings) != settings_hash(jsonable(tiny_run(encoder, partition=ByClient(smallest=3))))
    torchs = tiny_run(encoder, partition=ByClient(), engine=Engine(kernel="torch", byte_dropout=False))
    still = tiny_run(encoder, partition=ByClient(), training=Training(learning_rate=1e-2, base_dropout=False))
    assert len({settings_hash(settings), settings_hash(jsonable(torchs)), settings_hash(jsonable(still))}) == 3
    dropping = tiny_run(encoder, partition=ByClient(), data=Rows(toy_rows(240), missing="drop"))
    assert settings_hash(settings) != settings_hash(jsonable(dropping))
    kept = Engine(
        kernel="torch", cache_dir="/anywhere", cache_dir_bytes=10**6
    )  # where something is kept changes no run
    assert settings_hash(settings) == settings_hash(jsonable(tiny_run(encoder, partition=ByClient(), engine=kept)))


def test_nobody_reads_a_length_that_is_open() -> None:
    with pytest.raises(Refused, match=r"training\.max_length.*`prepare` returns"):
        _ = Training().token_limit
    assert Training(max_length=9).token_limit == 9
